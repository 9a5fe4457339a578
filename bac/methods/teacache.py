"""TeaCache (arXiv 2411.19108): all blocks are reused until the model's input has moved far enough.

The paper adds up the input's changes at run time; here its rule is run once, on the calibration mean, and frozen. It
reads the input after the time modulation; this network has none (time enters as a condition token), so the embedded
noisy chunk is the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial

from bac.methods.base import ByThreshold, LastStep
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule

_DEGREE = 4
"""Of the polynomial that maps the input's change to the output's, as in the paper."""


@dataclass(frozen=True)
class TeaCache(ByThreshold):
    """Updates where the output's change, estimated from the input's and added up since the last update, is large.

    The estimate is a polynomial of degree 4 in the relative L1 change of the input, fitted to that of the stream before
    the head over all calibration steps.

    Attributes:
        threshold: the sum at which all blocks update and it begins anew; 0.1 to 0.6 in the authors' code.
        last_step: forced also updates at step K - 1, as the authors' code does.
    """

    threshold: float = 0.3
    last_step: LastStep = LastStep.FORCED
    name: str = "teacache"

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule for the profile's checkpoint and sampler.

        Raises:
            InvalidInput: the profile does not have the change of the stream.
        """
        change = profile.require("stream_change", self.name)
        moved = np.maximum(estimated_change(change[0], change[-1]), 0)
        computed = np.zeros(profile.steps, dtype=bool)
        computed[0] = True
        total = 0.0
        for step in range(1, profile.steps):
            total += float(moved[step])
            if total >= self.threshold:
                computed[step] = True
                total = 0.0
        return self.last_step.applied(self.made(profile, computed))


def estimated_change(given: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return float64[K]: the polynomial fitted to (given, wanted) from step 1 on, at ``given``; 0 at step 0.

    With K steps the degree is at most K - 2, so that K - 1 points do not fit themselves.
    """
    degree = max(0, min(_DEGREE, len(given) - 3))
    fitted = Polynomial.fit(given[1:], wanted[1:], degree)(given) if len(given) > 1 else np.zeros(1)
    fitted[0] = 0
    return fitted
