"""AsymRnR (arXiv 2412.11706), frozen: where neighbouring tokens have nearly the same feature, one computes it for all.

The paper merges alike tokens before the attention of a video transformer, per layer and step as far as these are
redundant, and queries apart from keys and values. Here redundancy is the mean cosine of the features of neighbouring
action tokens over the calibration observations, and only queries are merged: keys and values stay those of all tokens,
since 10 to 16 of them cost too little to be worth another map. The feed-forward branch is merged likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.errors import InvalidInput, sentence
from bac.methods.base import ByUpdates, LastStep
from bac.methods.uniform import Uniform
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


@dataclass(frozen=True)
class AsymRnR(ByUpdates):
    """Evenly spaced updates of all blocks, in which the most redundant tokens take their left neighbour's feature.

    Attributes:
        updates: S, update steps, step 0 included.
        merge_ratio: share of all (block, update step, neighbouring tokens) places that merge, those of the highest
            redundancy; 0 to 1. Where several in a row merge, the leftmost token stands for all.
        last_step: forced also updates at step K - 1.
    """

    updates: int = 20
    merge_ratio: float = 0.25
    last_step: LastStep = LastStep.FORCED
    name: str = "asymrnr"

    def __post_init__(self) -> None:
        """Refuse a ratio out of its range."""
        if not 0 <= self.merge_ratio <= 1:
            raise InvalidInput(
                sentence("cache.merge_ratio", expected="0 to 1", got=self.merge_ratio, mend="choose one of these")
            )

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule for the profile's checkpoint and sampler.

        Raises:
            InvalidInput: the profile has no token likeness, or K steps do not have S updates.
        """
        likeness = profile.require("token_likeness", self.name)
        mask = Uniform(self.updates, self.last_step).schedule(profile).mask
        likeness = np.where(mask[:, :, None], likeness, -np.inf)
        places = round(self.merge_ratio * int(mask.sum()) * likeness.shape[2])
        merged = np.zeros(likeness.shape, dtype=bool)
        merged.flat[np.argsort(-likeness, axis=None, kind="stable")[:places]] = True
        # Column t + 1 of a map: t + 1 itself, or, where it merges, whatever stands for t.
        alone = np.pad(~merged, ((0, 0), (0, 0), (1, 0)), constant_values=True)
        tokens = np.maximum.accumulate(np.where(alone, np.arange(alone.shape[2]), 0), axis=2)
        return self.made(profile, mask, tokens=tokens)
