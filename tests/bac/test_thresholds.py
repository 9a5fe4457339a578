"""Methods that judge at run time in their papers, frozen here: golden masks, and the rules written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toys import BLOCKS, random_profile

from bac.errors import InvalidInput
from bac.methods import BwCache, ErtaCache, LastStep, TeaCache
from bac.methods.base import ByThreshold
from bac.methods.teacache import estimated_change
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule

STEPS = 20


def profile_with(**statistics: np.ndarray) -> FeatureProfile:
    steps = next(iter(statistics.values())).shape[-1]
    return replace(random_profile(seed=0, steps=steps), **statistics)


def moving(change: np.ndarray) -> np.ndarray:
    """Return the same change of every stream, float64[blocks + 1, K]."""
    return np.tile(change, (len(BLOCKS) + 1, 1))


def shared_steps(schedule: CacheSchedule) -> list[int]:
    assert (schedule.mask == schedule.mask[0]).all()
    return np.flatnonzero(schedule.mask[0]).tolist()


def test_bwcache_reuses_for_a_window_after_the_streams_rest() -> None:
    change = np.full(STEPS, 0.5)
    change[[5, 6, 9, 10, 14]] = 0.1
    # R = 3 steps. 5 rests: 6-8 are reused, 9 is computed and rests: 10-12; 13 moves, 14 rests: 15-17; the rest is full.
    method = BwCache(0.2, window=0.15, last_step=LastStep.FREE)
    assert shared_steps(method.schedule(profile_with(stream_change=moving(change)))) == [
        0, 1, 2, 3, 4, 5, 9, 13, 14, 18, 19,
    ]  # fmt: skip


def test_bwcache_computes_the_last_half_window() -> None:
    method = BwCache(0.2, window=0.4, last_step=LastStep.FREE)  # R = 8: steps 16 to 19 are computed
    schedule = method.schedule(profile_with(stream_change=moving(np.full(STEPS, 0.1))))
    assert shared_steps(schedule) == [0, 1, 10, 16, 17, 18, 19]


def test_bwcache_averages_the_streams_behind_the_blocks() -> None:
    change = moving(np.full(STEPS, 0.1))
    change[0] = 9.0  # what the first block sees is behind no block
    assert len(shared_steps(BwCache(0.2).schedule(profile_with(stream_change=change)))) < STEPS
    change[1] = 9.0
    assert len(shared_steps(BwCache(0.2).schedule(profile_with(stream_change=change)))) == STEPS


def test_bwcache_equals_its_online_rule_on_the_calibration_mean() -> None:
    for seed in range(50):
        draw = np.random.default_rng(seed)
        change = draw.uniform(0, 0.4, (len(BLOCKS) + 1, STEPS))
        threshold, window = float(draw.uniform(0.1, 0.3)), float(draw.choice([0.05, 0.1, 0.2, 0.35]))
        schedule = BwCache(threshold, window, LastStep.FREE).schedule(profile_with(stream_change=change))
        reuse_left, length, online = 0, max(1, round(window * STEPS)), []
        for step in range(STEPS):
            if reuse_left and step < STEPS - length // 2:
                reuse_left -= 1
                continue
            online.append(step)
            rests = np.mean([row[step] for row in change[1:]]) < threshold
            reuse_left = length if step > 0 and rests else 0
        assert shared_steps(schedule) == online


def test_teacache_updates_when_the_sum_reaches_the_threshold() -> None:
    # Output changes by twice what the input does, which a polynomial gives exactly.
    given = np.array([0, 0.05, 0.10, 0.15, 0.02, 0.03, 0.25, 0.01, 0.07, 0.11])
    change = moving(given)
    change[-1] = 2 * given
    # Doubled and summed: .1 .3 | .3 | .04 .1 .6 | .02 .16 .38 |
    schedule = TeaCache(0.29, LastStep.FREE).schedule(profile_with(stream_change=change))
    assert shared_steps(schedule) == [0, 2, 3, 6, 9]


def test_teacache_equals_its_online_rule_on_the_calibration_mean() -> None:
    for seed in range(20):
        change = np.random.default_rng(seed).uniform(0.01, 0.4, (len(BLOCKS) + 1, STEPS))
        change[:, 0] = 0
        coefficients = np.polyfit(change[0][1:], change[-1][1:], 4)
        total, online = 0.0, [0]
        for step in range(1, STEPS):
            total += max(0.0, float(np.polyval(coefficients, change[0][step])))
            if total >= 0.5:
                total = 0.0
                online.append(step)
        schedule = TeaCache(0.5, LastStep.FREE).schedule(profile_with(stream_change=change))
        assert shared_steps(schedule) == online


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_teacache_takes_few_steps(steps: int) -> None:
    fitted = estimated_change(np.linspace(0, 1, steps), np.linspace(0, 2, steps))
    assert fitted.shape == (steps,)
    assert np.isfinite(fitted).all()
    assert fitted[0] == 0


def distances(positions: list[float]) -> np.ndarray:
    """Return how far steps are from each other whose residuals lie on a line."""
    place = np.array(positions)
    return np.abs(place[:, None] - place[None, :])


def test_ertacache_updates_where_the_residual_is_too_far_from_the_last_update() -> None:
    change = distances([0, 0.1, 0.2, 0.3, 0.45, 0.5, 0.65, 0.7])
    profile = profile_with(residual_change=change, residual_slope=np.ones((8, 8)))
    assert shared_steps(ErtaCache(0.29, last_step=LastStep.FREE).schedule(profile)) == [0, 3, 6]
    assert shared_steps(ErtaCache(0.29).schedule(profile)) == [0, 3, 6, 7]


def test_ertacache_scales_what_it_reuses() -> None:
    change = distances([0, 0.1, 0.2, 0.3, 0.45, 0.5, 0.65, 0.7])
    slope = np.random.default_rng(0).uniform(0.5, 1.5, (8, 8))
    schedule = ErtaCache(0.29).schedule(profile_with(residual_change=change, residual_slope=slope))
    for block in range(len(BLOCKS)):
        assert [schedule.terms(block, step) for step in (2, 3, 5)] == [
            ((0, slope[0, 2]),),
            ((3, 1.0),),
            ((3, slope[3, 5]),),
        ]
    plain = ErtaCache(0.29, corrected=False).schedule(profile_with(residual_change=change, residual_slope=slope))
    assert plain.terms(0, 5) == ((3, 1.0),)


def test_ertacache_does_not_move_the_samplers_grid() -> None:
    with pytest.raises(InvalidInput, match=r"cache\.adjusted_timesteps: expected false, got true, which moves a sam"):
        ErtaCache(adjusted_timesteps=True)


@pytest.mark.parametrize("method", [BwCache, TeaCache, ErtaCache])
def test_refusals(method: type[ByThreshold]) -> None:
    for threshold in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match=r"cache\.threshold: expected above 0, got"):
            method(threshold=threshold)
    with pytest.raises(InvalidInput, match=rf"cache={method.name}: expected a profile with (stream|residual)_change"):
        method().schedule(random_profile(seed=0))


@pytest.mark.parametrize("window", [0.0, 1.0, float("nan")])
def test_bwcache_refuses_windows_that_are_no_share(window: float) -> None:
    with pytest.raises(InvalidInput, match=r"cache\.window: expected between 0 and 1"):
        BwCache(window=window)
