"""TaylorSeer (arXiv 2503.06923): evenly spaced updates, reused features predicted by a Taylor series in the step.

On DDPM every step draws fresh noise, so differences of features amplify it by about 1 / gap^order: expect orders above
1 to hurt there, and to help on DDIM.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import numpy as np

from bac.errors import InvalidInput, sentence
from bac.methods.base import ByUpdates, LastStep
from bac.methods.forecast import differences, forecast_of, require_history
from bac.methods.uniform import Uniform
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


@dataclass(frozen=True)
class TaylorSeer(ByUpdates):
    """Taylor prediction on a uniform schedule.

    Attributes:
        updates: S, evenly spaced updates, step 0 included; the paper's interval N is K / S, 3 to 7 there.
        order: O of the series, 0 (reuse as it is) to 4; 1 to 4 in the paper. The first predictions have lower orders.
        first_steps: steps at the beginning that all update; 3 in the authors' code.
        last_step: forced also updates at step K - 1.

    Raises:
        InvalidInput: an order or a number of first steps out of range.
    """

    updates: int = 20
    order: int = 1
    first_steps: int = 3
    last_step: LastStep = LastStep.FORCED
    name: str = "taylorseer"

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 4:
            raise InvalidInput(sentence("cache.order", expected="0 to 4", got=self.order, mend="choose one of these"))
        if self.first_steps < 1:
            raise InvalidInput(
                sentence("cache.first_steps", expected="at least 1", got=self.first_steps, mend="step 0 must update")
            )

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule; the profile gives only blocks, steps and provenance.

        Raises:
            InvalidInput: more updates or first steps than there are steps, or an order above the history.
        """
        if self.first_steps > profile.steps:
            raise InvalidInput(
                sentence("cache.first_steps", expected=f"1 to {profile.steps}", got=self.first_steps, mend="choose one")
            )
        mask = Uniform(self.updates, self.last_step).schedule(profile).mask.copy()
        mask[:, : self.first_steps] = True
        require_history("order", self.order + 1, mask)
        forecast = forecast_of(mask, self.order + 1, self._weights)
        return self.made(profile, mask, forecast)

    def _weights(self, seen: np.ndarray, step: int) -> np.ndarray:
        ahead = float(step - seen[0])
        terms = differences(seen, min(self.order, len(seen) - 1))
        return np.sum([term * ahead**order / factorial(order) for order, term in enumerate(terms)], axis=0)
