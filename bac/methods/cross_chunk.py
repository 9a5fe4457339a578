"""Cross-chunk reuse: every other update takes the feature that the previous control tick had at the same step.

After the conditioned diffusion tokenizer's cache, which carries features from one segment of a sequence to the next;
here the segments are the chunks of an episode, and a feature's tokens move on by the actions executed in between. Two
things speak against it: each chunk starts from noise of its own, so that features of early steps are about another
noise, and of T tokens only T minus the executed ones have a counterpart. It is here to be measured, by episodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.methods.base import ByUpdates, LastStep
from bac.methods.late import Late
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


@dataclass(frozen=True)
class CrossChunk(ByUpdates):
    """The updates of ``Late``, in turn computed by even and by odd chunks; the others recall them.

    Step 0 and a forced last step are computed by all.

    Attributes:
        updates: S, updates of all blocks, recalled ones included; about half of them are computed in a chunk.
        power: of ``Late``; 1 spaces evenly.
        last_step: forced also updates at step K - 1.
    """

    updates: int = 20
    power: float = 3.6
    last_step: LastStep = LastStep.FORCED
    name: str = "cross_chunk"

    def __post_init__(self) -> None:
        """Refuse a power below 1."""
        Late(power=self.power)

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule; the profile gives only blocks, steps and provenance.

        Raises:
            InvalidInput: a number of updates that K steps do not have.
        """
        mask = Late(self.updates, self.power, self.last_step).schedule(profile).mask
        always = [0, profile.steps - 1] if self.last_step is LastStep.FORCED else [0]
        turns = np.setdiff1d(np.flatnonzero(mask[0]), always)
        recall = np.zeros((2, *mask.shape), dtype=bool)
        recall[0, :, turns[0::2]] = True
        recall[1, :, turns[1::2]] = True
        return self.made(profile, mask, recall=recall)
