"""BWCache (arXiv 2509.13789): all blocks are reused together for a while, once the stream has come to rest.

The paper judges at run time, on the call at hand; here its rule is run once, on the calibration mean, and frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.errors import InvalidInput, sentence
from bac.methods.base import ByThreshold, LastStep
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


@dataclass(frozen=True)
class BwCache(ByThreshold):
    """After a computed step at which the streams changed less than the threshold, a window of steps is reused.

    The change of a step is the mean over the streams behind all blocks of |h(now) - h(before)| / |h(before)|, L1 norms.
    Steps of the last half window are all computed.

    Attributes:
        threshold: delta; 0.15 to 0.25 in the paper.
        window: R, the share of all steps that one reuse lasts; about 0.1 in the paper.
        last_step: forced also updates at step K - 1, which the rule does by itself unless R K is below 2.
    """

    threshold: float = 0.2
    window: float = 0.1
    last_step: LastStep = LastStep.FORCED
    name: str = "bwcache"

    def __post_init__(self) -> None:
        """Refuse a threshold or a window out of range."""
        super().__post_init__()
        if not 0 < self.window < 1:
            raise InvalidInput(
                sentence("cache.window", expected="between 0 and 1", got=self.window, mend="the paper takes 0.1")
            )

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule for the profile's checkpoint and sampler.

        Raises:
            InvalidInput: the profile does not have the change of the stream.
        """
        change = profile.require("stream_change", self.name)[1:].mean(axis=0)
        window = max(1, round(self.window * profile.steps))
        resumed = profile.steps - window // 2
        computed = np.ones(profile.steps, dtype=bool)
        step = 1
        while step < resumed:
            if change[step] < self.threshold:
                computed[step + 1 : min(step + 1 + window, resumed)] = False
                step += window
            step += 1
        return self.last_step.applied(self.made(profile, computed))
