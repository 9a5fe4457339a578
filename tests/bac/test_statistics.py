"""Intervals against known values."""

from __future__ import annotations

import numpy as np
import pytest

from bac.errors import InvalidInput
from bac.statistics import Estimate, bootstrap_mean, mean_estimate, newcombe, paired_difference, wilson


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


# As printed by Fagerland, Lydersen and Laake for Newcombe's interval: airway responsiveness before and after a
# transplantation (Bentur et al. 2009; Statistics in Medicine 33, 2014, 2850), response before and after a therapy (Cavo
# et al. 2012; Statistical Analysis of Contingency Tables, 2017, chapter 8).
@pytest.mark.parametrize(
    ("table", "mean", "low", "high", "rounding"),
    [((1, 1, 7, 12), -0.286, -0.507, -0.026, 5e-4), ((59, 6, 16, 80), -0.0621, -0.1186, -0.0046, 5e-5)],
)
def test_newcombe_is_the_published_one(
    table: tuple[int, int, int, int], mean: float, low: float, high: float, rounding: float
) -> None:
    both, first, second, neither = table
    estimate = newcombe(both=both, first=first, second=second, neither=neither)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((mean, low, high), abs=rounding)
    mirrored = newcombe(both=both, first=second, second=first, neither=neither)
    assert (mirrored.mean, mirrored.low, mirrored.high) == pytest.approx((-mean, -high, -low), abs=rounding)


def test_outcomes_that_are_all_alike_leave_a_doubt() -> None:
    ones, zeros = np.ones(100), np.zeros(100)
    assert mean_estimate(ones) == wilson(100, 100)
    alike = paired_difference(ones, np.ones(100))
    assert alike.mean == 0
    # Of rates of 1 and 1 the Wilson interval begins at 0.963.
    assert (alike.low, alike.high) == pytest.approx((-0.037, 0.037), abs=5e-4)
    apart = paired_difference(ones, zeros)
    assert (apart.mean, apart.high) == (1, 1)
    assert 0.9 < apart.low < 1
    assert paired_difference(ones, ones) == Estimate(0, 0, 0)


def test_outcomes_are_paired_by_episode() -> None:
    ours, theirs = np.array([1, 1, 1, 0, 0, 0, 0.0]), np.array([1, 0, 0, 1, 0, 0, 0.0])
    assert paired_difference(ours, theirs) == newcombe(both=1, first=2, second=1, neither=3)
    assert paired_difference(list(ours), list(theirs)) == paired_difference(ours, theirs)


def test_scores_between_0_and_1_are_bootstrapped() -> None:
    ours, theirs = np.random.default_rng(2).random((2, 30))
    assert mean_estimate(ours) == bootstrap_mean(ours)
    assert paired_difference(ours, theirs) == bootstrap_mean(ours - theirs)
    assert paired_difference(np.ones(30), theirs) == bootstrap_mean(1 - theirs)


def test_what_cannot_be_paired_refuses() -> None:
    with pytest.raises(InvalidInput, match="paired values: expected as many as of the reference, 2, got 3; play"):
        paired_difference([0.0, 1.0, 1.0], [0.0, 1.0])
    with pytest.raises(InvalidInput, match="values of a mean: expected at least one"):
        mean_estimate([])
    for counts in ((0, 0, 0, 0), (3, -1, 0, 0)):
        with pytest.raises(InvalidInput, match="paired success rates: expected counts of at least one trial, got"):
            newcombe(both=counts[0], first=counts[1], second=counts[2], neither=counts[3])


def test_prints_with_its_interval() -> None:
    assert str(wilson(8, 10)) == "0.800 [0.490, 0.943]"
