"""Intervals against known values."""

from __future__ import annotations

import numpy as np
import pytest

from bac.errors import InvalidInput
from bac.statistics import Estimate, bootstrap_mean, wilson


def test_bootstrap_is_deterministic() -> None:
    values = np.random.default_rng(0).random(20)
    assert bootstrap_mean(values) == bootstrap_mean(values.copy())


def test_bootstrap_covers_the_mean_as_the_normal_interval_does() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert estimate.mean == pytest.approx(values.mean())
    # 10,000 resamples leave about 2 % of noise on each end of the interval.
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_of_one_value_is_a_point() -> None:
    assert bootstrap_mean(np.array([0.5])) == Estimate(0.5, 0.5, 0.5)


@pytest.mark.parametrize("values", [[], [0.1, np.nan], [np.inf]])
def test_bootstrap_refuses(values: list[float]) -> None:
    with pytest.raises(InvalidInput, match="values of a mean: expected at least one, all finite, got"):
        bootstrap_mean(np.array(values))


# 81/263 as printed by Newcombe 1998 (Statistics in Medicine 17, method 3); the others from the score equation.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    estimate = wilson(successes, trials)
    assert estimate.mean == successes / trials
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert 0 <= estimate.low <= estimate.high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 10), (11, 10), (1, -1)])
def test_wilson_refuses(successes: int, trials: int) -> None:
    with pytest.raises(
        InvalidInput, match=f"success rate: expected 0 to N successes of N, got {successes} of {trials}"
    ):
        wilson(successes, trials)


def test_prints_with_its_interval() -> None:
    assert str(wilson(8, 10)) == "0.800 [0.490, 0.943]"
