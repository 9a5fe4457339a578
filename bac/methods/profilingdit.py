"""ProfilingDiT (arXiv 2504.03140), translated: a contiguous range of layers is cached as one sum, the others live.

The paper chooses layers by whether their attention looks at the foreground or the background of a video. Action tokens
have neither, so the range is the one that errs least when reused, by the calibration's reuse error; what remains of the
method is the contiguous range and the list of full steps.
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
class ProfilingDit(ByUpdates):
    """One contiguous range of layers at evenly spaced steps, all others at every step.

    Attributes:
        updates: S, steps at which the range updates, step 0 included.
        cached_layers: length of the range.
        last_step: forced also updates the range at step K - 1.
    """

    updates: int = 20
    cached_layers: int = 6
    last_step: LastStep = LastStep.FORCED
    name: str = "profilingdit"

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule for the profile's checkpoint and sampler.

        Raises:
            InvalidInput: more cached layers than there are, or none.
        """
        layers = np.array([block.layer for block in profile.blocks])
        count = int(layers.max()) + 1
        if not 1 <= self.cached_layers <= count:
            raise InvalidInput(
                sentence("cache.cached_layers", expected=f"1 to {count}", got=self.cached_layers, mend="choose one")
            )
        errors = np.bincount(layers, weights=profile.reuse_error())
        first = int(np.convolve(errors, np.ones(self.cached_layers), mode="valid").argmin())
        mask = Uniform(self.updates, self.last_step).schedule(profile).mask.copy()
        mask[(layers < first) | (layers >= first + self.cached_layers)] = True
        return self.made(profile, mask)
