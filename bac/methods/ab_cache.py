"""AB-Cache (arXiv 2504.10540): reused features extrapolated by the Adams-Bashforth multistep formula."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.errors import InvalidInput, sentence
from bac.methods.base import ByUpdates, LastStep
from bac.methods.forecast import forecast_of, require_history
from bac.methods.uniform import Uniform
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule

_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the latest slopes, the latest first."""


@dataclass(frozen=True)
class AdamsBashforth(ByUpdates):
    """Adams-Bashforth prediction on a uniform schedule.

    A slope is the difference of two neighbouring computed features over the steps between them; the prediction is the
    latest feature plus the steps since it times the formula's mean of the latest slopes. So k slopes read k + 1
    features, and k = 1 is linear extrapolation (what the paper calls order 2, in values).

    Attributes:
        updates: S, evenly spaced updates, step 0 included; the paper alternates, S = K / 2.
        slopes: k, 1 to 4. The first predictions have fewer.
        last_step: forced also updates at step K - 1.

    Raises:
        InvalidInput: a number of slopes that has no formula.
    """

    updates: int = 20
    slopes: int = 1
    last_step: LastStep = LastStep.FORCED
    name: str = "ab_cache"

    def __post_init__(self) -> None:
        if self.slopes not in _ADAMS_BASHFORTH:
            raise InvalidInput(sentence("cache.slopes", expected="1 to 4", got=self.slopes, mend="choose one of these"))

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule; the profile gives only blocks, steps and provenance.

        Raises:
            InvalidInput: more updates than steps, or more slopes than the history has.
        """
        mask = Uniform(self.updates, self.last_step).schedule(profile).mask
        require_history("slopes", self.slopes + 1, mask)
        forecast = forecast_of(mask, self.slopes + 1, self._weights)
        return self.made(profile, mask, forecast)

    def _weights(self, seen: np.ndarray, step: int) -> np.ndarray:
        features = np.eye(len(seen))
        slopes = (features[:-1] - features[1:]) / (seen[:-1] - seen[1:])[:, None]
        formula = _ADAMS_BASHFORTH.get(len(slopes), ())
        return features[0] + (step - seen[0]) * np.array(formula) @ slopes if formula else features[0]
