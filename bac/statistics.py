"""Means with intervals: no score leaves this project without one."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    @property
    def signed(self) -> str:
        """As text with signs, for a difference: ``+0.006 [-0.022, +0.033]``."""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def mean_estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean of float[N] with its interval: Wilson's where all are 0 or 1, else the bootstrap's.

    Raises:
        InvalidInput: no values, or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    return wilson(int(values.sum()), len(values)) if _all_binary(values) else bootstrap_mean(values)


def paired_difference(values: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean of ``values - reference``, float[N] each of the same episodes, with its interval.

    It is Newcombe's where all are 0 or 1, else the bootstrap's of the differences. What is compared with itself, the
    very same object, differs by 0 for certain.

    Raises:
        InvalidInput: unlike lengths, no values, or one that is not finite.
    """
    if values is reference:
        return Estimate(0.0, 0.0, 0.0)
    first, second = (np.asarray(each, dtype=np.float64) for each in (values, reference))
    if first.shape != second.shape:
        raise InvalidInput(
            sentence(
                "paired values",
                expected=f"as many as of the reference, {second.size}",
                got=first.size,
                mend="play the same episodes",
            )
        )
    if not (_all_binary(first) and _all_binary(second)):
        return bootstrap_mean(first - second)
    return newcombe(
        both=int((first * second).sum()),
        first=int((first > second).sum()),
        second=int((second > first).sum()),
        neither=int((first + second == 0).sum()),
    )


def _all_binary(values: np.ndarray) -> bool:
    return values.size > 0 and bool(np.isin(values, (0.0, 1.0)).all())


def bootstrap_mean(values: np.ndarray) -> Estimate:
    """Return the mean of float[N] with its percentile-bootstrap interval (10,000 resamples, always the same ones).

    Values that are all alike give an interval without width: what can only be 0 or 1 goes to ``mean_estimate``.

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


def newcombe(*, both: int, first: int, second: int, neither: int) -> Estimate:
    """Return the difference of two success rates on the same trials, first minus second, with its interval.

    Newcombe's hybrid score interval (Statistics in Medicine 17, 1998, 2635-2650, method 10): from the Wilson intervals
    of both rates and the correlation of the outcomes. It has width where all trials went alike.

    Args:
        both: trials that succeeded in both.
        first: only in the first.
        second: only in the second.
        neither: in none.

    Raises:
        InvalidInput: no trials, or a negative count.
    """
    counts = (both, first, second, neither)
    trials = sum(counts)
    if trials < 1 or min(counts) < 0:
        raise InvalidInput(
            sentence("paired success rates", expected="counts of at least one trial", got=counts, mend="count again")
        )
    one, other = wilson(both + first, trials), wilson(both + second, trials)
    correlation = _correlation(both, first, second, neither)

    def distance(of_one: float, of_other: float) -> float:
        return math.sqrt(of_one**2 - 2 * correlation * of_one * of_other + of_other**2)

    difference = (first - second) / trials
    return Estimate(
        difference,
        difference - distance(one.mean - one.low, other.high - other.mean),
        difference + distance(one.high - one.mean, other.mean - other.low),
    )


def _correlation(both: int, first: int, second: int, neither: int) -> float:
    """Return phi of a paired table, a positive one with the continuity correction of method 10."""
    product = both * neither - first * second
    spread = (both + first) * (second + neither) * (both + second) * (first + neither)
    if spread == 0:
        return 0.0
    corrected = max(product - (both + first + second + neither) / 2, 0.0) if product > 0 else product
    return corrected / math.sqrt(spread)
