"""ERTACache (arXiv 2508.21091): the whole stack's residual is reused, times a factor that corrects what reuse errs.

The paper's correction is affine, factor and offset, by least squares on calibration runs. Here nothing but the head's
layer norm reads the stream at a reused step, and a layer norm removes a common offset: what remains is the factor,
fitted on centred channels. Its other half, moving the time steps of the sampler, would make another sampler of a
fixed DDPM grid, for which this schedule would not be made; it refuses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.errors import InvalidInput, sentence
from bac.methods.base import ByThreshold, LastStep
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


@dataclass(frozen=True)
class ErtaCache(ByThreshold):
    """All blocks update where the residual is too far from that of the last update, and are scaled in between.

    Attributes:
        threshold: lambda, the relative L1 change of the residual since the last update, calibration mean, at which all
            blocks update; 0.08 to 0.6 in the paper.
        corrected: whether reused residuals are scaled.
        adjusted_timesteps: the paper's other half; refused.
        last_step: forced also updates at step K - 1.
    """

    threshold: float = 0.3
    corrected: bool = True
    adjusted_timesteps: bool = False
    last_step: LastStep = LastStep.FORCED
    name: str = "ertacache"

    def __post_init__(self) -> None:
        """Refuse a threshold out of range, and adjusted time steps."""
        super().__post_init__()
        if self.adjusted_timesteps:
            raise InvalidInput(
                sentence(
                    "cache.adjusted_timesteps",
                    expected="false",
                    got="true, which moves a sampler's fixed grid",
                    mend="choose the grid by sampler=ddim sampler.steps=N instead",
                )
            )

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule for the profile's checkpoint and sampler.

        Raises:
            InvalidInput: the profile does not have the change of the residual.
        """
        change = profile.require("residual_change", self.name)
        slope = profile.require("residual_slope", self.name)
        source = 0
        computed = np.zeros(profile.steps, dtype=bool)
        factors = np.ones(profile.steps)
        for step in range(profile.steps):
            if step == 0 or change[source, step] >= self.threshold or (step == profile.steps - 1 and self._forced):
                source, computed[step] = step, True
            factors[step] = slope[source, step]
        shape = (len(profile.blocks), profile.steps, 1)
        forecast = np.broadcast_to(factors[:, None], shape) if self.corrected else None
        return self.made(profile, computed, forecast)

    @property
    def _forced(self) -> bool:
        return self.last_step is LastStep.FORCED
