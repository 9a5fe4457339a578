"""Skip-Cache, the training-free analogue of Skip-DiT (arXiv 2411.17616): the outer layers live, the middle cached.

Skip-DiT retrains the network with long skip connections, so that the cached deep feature enters the last layer beside
a fresh shallow one. Without retraining there is no such connection: here the first and the last layer are computed at
every step and everything between them is reused as one sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from bac.methods.base import ByUpdates, LastStep
from bac.methods.uniform import Uniform
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


@dataclass(frozen=True)
class SkipCache(ByUpdates):
    """Outer layers always, middle layers at evenly spaced steps.

    Attributes:
        updates: S, updates of the middle, step 0 included; the paper's interval is 2 to 6.
        last_step: forced also updates the middle at step K - 1.
    """

    updates: int = 20
    last_step: LastStep = LastStep.FORCED
    name: str = "skip_cache"

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule; the profile gives only blocks, steps and provenance."""
        mask = Uniform(self.updates, self.last_step).schedule(profile).mask.copy()
        outer = {profile.blocks[0].layer, profile.blocks[-1].layer}
        mask[[block.layer in outer for block in profile.blocks]] = True
        return self.made(profile, mask)
