"""Means with intervals: no score leaves this project without one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bac.errors import InvalidInput, sentence

_Z95 = 1.959964
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(values: np.ndarray) -> Estimate:
    """Return the mean of float[N] with its percentile-bootstrap interval (10,000 resamples, always the same ones).

    For paired comparisons give the differences, episode by episode.

    Raises:
        InvalidInput: no values, or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise InvalidInput(
            sentence("values of a mean", expected="at least one, all finite", got=values.tolist(), mend="play episodes")
        )
    draws = np.random.default_rng(0).integers(values.size, size=(_RESAMPLES, values.size))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def wilson(successes: int, trials: int) -> Estimate:
    """Return a success rate with its Wilson score interval, which stays inside [0, 1] and has width at 0 and 1.

    Raises:
        InvalidInput: not 0 <= successes <= trials, or no trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise InvalidInput(
            sentence(
                "success rate", expected="0 to N successes of N", got=f"{successes} of {trials}", mend="count again"
            )
        )
    rate, z2 = successes / trials, _Z95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    # At 0 and N successes the bound is exact; rounding would leave 1e-17 of it.
    return Estimate(rate, centre - half if successes else 0.0, centre + half if successes < trials else 1.0)
