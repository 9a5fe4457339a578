"""FoCa (arXiv 2508.16211): reused features forecast by a second-order BDF step, then calibrated by Heun's.

A slope that begins as the distance from a prediction keeps that prediction's errors: over an interval of N steps it takes
over 1 - 2^(1-N) of the slope before, with the other sign. At N = 5 that is 15/16, so the weights of older features
alternate and hardly fade, and independent noise in them adds up: expect little of long intervals on DDPM.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.errors import InvalidInput, sentence
from bac.methods.base import ByUpdates, LastStep
from bac.methods.uniform import Uniform
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule

_LONGEST_INTERVAL = 8


@dataclass(frozen=True)
class FoCa(ByUpdates):
    """FoCa prediction on a uniform schedule.

    With F_k the feature at step k, predicted or computed, and g the difference of the last two computed ones::

        F_{k+1} = 2 F_k - F_{k-1} + (g - (F_k - F_{k-1})) / 2

    Here g is divided by the steps between the two, so that both differences are slopes per step. The prediction then
    goes on with slope s <- (s + g) / 2. At an update F_k is the computed feature and the slope its distance from the
    prediction one step before. Up to the second update features are held; there the slope is g, as nothing better is
    known. Predictions are read again, so a prediction depends on all computed features so far.

    Attributes:
        updates: S, evenly spaced updates, step 0 included. The interval K / S is at most 8: a prediction nears a
            straight line, which drifts; the paper's are 4 to 8.
        last_step: forced also updates at step K - 1.
    """

    updates: int = 20
    last_step: LastStep = LastStep.FORCED
    name: str = "foca"

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule; the profile gives only blocks, steps and provenance.

        Raises:
            InvalidInput: intervals of more than 8 steps, or more updates than steps.
        """
        mask = Uniform(self.updates, self.last_step).schedule(profile).mask
        if self.updates * _LONGEST_INTERVAL < profile.steps:
            raise InvalidInput(
                sentence(
                    "cache.updates",
                    expected=f"intervals of at most {_LONGEST_INTERVAL} steps",
                    got=f"{self.updates} updates in {profile.steps} steps",
                    mend=f"choose at least {-(-profile.steps // _LONGEST_INTERVAL)}",
                )
            )
        forecast = np.broadcast_to(unrolled(mask[0]), (*mask.shape, int(mask[0].sum())))
        return self.made(profile, mask, forecast)


def unrolled(updates: np.ndarray) -> np.ndarray:
    """Return float64[K, S]: at each reused step the prediction as weights of the features computed so far.

    Args:
        updates: bool[K], S of them True, the first one included.
    """
    count = int(updates.sum())
    computed = np.eye(count)
    forecast = np.zeros((len(updates), count))
    now = slope = secant = np.zeros(count)
    seen, latest = 0, 0
    for step, update in enumerate(updates):
        before = now
        if update:
            now = computed[seen]
            if seen:
                secant = (now - computed[seen - 1]) / (step - latest)
                slope = secant if seen == 1 else now - before
            seen, latest = seen + 1, step
        else:
            slope = (slope + secant) / 2
            now = before + slope
            forecast[step, :seen] = now[:seen][::-1]
    return forecast
