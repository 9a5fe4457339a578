"""ToCa (arXiv 2410.05317), frozen: evenly spaced full updates, and between them updates of the tokens that matter most.

The paper scores the tokens of every input anew, by the attention they receive and by how long they were not refreshed
(and, for images, by cross-attention entropy and spatial spread, which a row of actions does not have). Here the scores
are means over the calibration observations, so that the schedule is known before the first one: what is lost is that a
token which matters for one observation alone is never chosen for it. With 10 to 16 action tokens there is little to
save in the first place; the method is here to be measured. Where attention is causal, the first tokens receive most.
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
class ToCa(ByUpdates):
    """Full updates of all blocks at evenly spaced steps, partial ones between.

    Attributes:
        updates: S, full updates, step 0 included.
        ratio: share of the tokens that a partial update computes, above 0 to 1; at least one token.
        partial_every: steps between partial updates, counted from the last full one; the paper's is 1.
        age_bonus: what a token's score gains over a cycle of K / S steps without a refresh, where a token that
            receives the mean attention scores 1. It chooses only where there are several partial updates between two
            full ones, which refresh all tokens alike.
        last_step: forced also updates all tokens at step K - 1.
    """

    updates: int = 20
    ratio: float = 0.25
    partial_every: int = 3
    age_bonus: float = 0.25
    last_step: LastStep = LastStep.FORCED
    name: str = "toca"

    def __post_init__(self) -> None:
        """Refuse values out of their ranges."""
        for name, sound, expected in (
            ("ratio", 0 < self.ratio <= 1, "above 0 to 1"),
            ("partial_every", self.partial_every >= 1, "at least 1"),
            ("age_bonus", self.age_bonus >= 0, "at least 0"),
        ):
            if not sound:
                got = getattr(self, name)
                raise InvalidInput(sentence(f"cache.{name}", expected=expected, got=got, mend="choose one of these"))

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule for the profile's checkpoint and sampler.

        Raises:
            InvalidInput: the profile has no attention, or K steps do not have S updates.
        """
        attention = profile.require("attention", self.name).astype(np.float64)
        full = Uniform(self.updates, self.last_step).schedule(profile).mask[0]
        tokens = np.stack([self._layer_tokens(each, full) for each in attention])
        tokens = tokens[[block.layer for block in profile.blocks]]
        return self.made(profile, np.any(tokens >= 0, axis=2), tokens=tokens)

    def _layer_tokens(self, attention: np.ndarray, full: np.ndarray) -> np.ndarray:
        """Return int64[K, T] for the attention [K, T] that the tokens of a layer receive: t where computed, else -1."""
        steps, count = attention.shape
        own = np.arange(count)
        tokens = np.full((steps, count), -1)
        refreshed = np.zeros(count)
        since = np.arange(steps) - np.maximum.accumulate(np.where(full, np.arange(steps), 0))
        chosen = max(1, round(self.ratio * count))
        for step in np.flatnonzero(since % self.partial_every == 0):
            age = (step - refreshed) * self.updates / steps
            score = attention[step] / attention[step].mean() + self.age_bonus * age
            computed = own if full[step] else np.argsort(-score, kind="stable")[:chosen]
            tokens[step, computed] = computed
            refreshed[computed] = step
        return tokens
