"""HyCa: channels of planted dynamics get the solvers that suit them, and predictions by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import BLOCKS, random_profile

from bac.channels import ChannelTotals
from bac.errors import InvalidInput
from bac.methods import HyCa, LastStep
from bac.methods.hyca import k_means
from bac.passes import optimise
from bac.plan import Add, lower, verify
from bac.profile import FeatureProfile
from bac.solvers import Solver

STEPS, WIDTH = 30, 24
SOLVERS = list(Solver)


def with_errors(errors: np.ndarray, dynamics: np.ndarray, steps: int = STEPS) -> FeatureProfile:
    return replace(random_profile(seed=0, steps=steps), solver_mse=errors, channel_dynamics=dynamics)


def planted() -> FeatureProfile:
    """Return a profile of noisy channels: a third each stands still, moves along a line, along a parabola."""
    draw = np.random.default_rng(0)
    step = np.arange(STEPS)
    courses = np.stack([0 * step, step / 2, (step - 10) ** 2 / 20])
    course = np.repeat(courses, WIDTH // 3, axis=0).T[:, None, None]
    totals = ChannelTotals(len(BLOCKS), STEPS)
    for block in range(len(BLOCKS)):
        noise = draw.normal(scale=0.01, size=(STEPS, 8, 4, WIDTH))
        totals.add(block, torch.from_numpy(5 + course + noise).float())
    return replace(random_profile(seed=0, steps=STEPS), **totals.statistics())


@pytest.mark.parametrize("updates", [2, 20])
def test_fewer_steps_than_solvers_need_are_refused_first(updates: int) -> None:
    told = r"cache=hyca: expected a sampler of at least 6 steps, got 5; use one of more steps, or another method\."
    with pytest.raises(InvalidInput, match=told):
        HyCa(updates).schedule(random_profile(seed=0, steps=5))
    with pytest.raises(InvalidInput, match="a profile with solver_mse"):
        HyCa(2).schedule(random_profile(seed=0, steps=6))


@pytest.mark.parametrize("updates", [4, 10])
def test_planted_dynamics_get_the_solver_that_suits_them(updates: int) -> None:
    schedule = HyCa(updates).schedule(planted())
    assert schedule.groups is not None
    assert schedule.forecast is not None
    third = WIDTH // 3
    assert all(row.tolist() == [0] * third + [1] * third + [2] * third for row in schedule.groups)
    step = int(np.flatnonzero(~schedule.mask[0])[-1])
    seen = np.flatnonzero(schedule.mask[0, :step])[::-1][:3]
    held, line, parabola = schedule.forecast[0, step].T
    assert held.tolist() == [1, 0, 0]
    # Exact where the gaps between updates differ, too: 7 and 8 steps.
    assert line @ (3 - seen) == pytest.approx(3 - step)
    assert line[2] == 0
    assert parabola @ (3 - seen) ** 2 == pytest.approx((3 - step) ** 2)
    verify(optimise(lower(schedule)), schedule)


def test_every_solver_predicts_by_its_coefficients() -> None:
    # Five channels, each of which one solver alone predicts without error.
    errors = np.tile((1 - np.eye(5))[None, :, None, :], (4, 1, len(BLOCKS), 1))
    dynamics = np.tile(np.array([1.0, 2.0, 4.0, 8.0, 16.0]), (3, len(BLOCKS), 1))
    schedule = HyCa(6, last_step=LastStep.FREE).schedule(with_errors(errors, dynamics))
    assert schedule.groups is not None
    assert (schedule.groups == np.arange(5)).all()
    # Updates at 0, 5, 10, ...; step 13 is 3 after 10.
    values = np.random.default_rng(0).normal(size=STEPS)
    slope, before = (values[10] - values[5]) / 5, (values[5] - values[0]) / 5
    for group, solver in enumerate(SOLVERS):
        a, b = solver.coefficients(3, 5)
        terms = [(source, weight[group]) for source, weight in schedule.terms(2, 13) if isinstance(weight, tuple)]
        assert [source for source, _ in terms] == [10, 5, 0]
        expected = values[10] + a * slope + b * (slope - before) / 5
        assert sum(weight * values[source] for source, weight in terms) == pytest.approx(expected)
    # With one update behind all hold, with two there is no curvature.
    assert schedule.terms(2, 3) == ((0, 1.0),)
    assert schedule.terms(2, 8) == (
        (5, (1.0, *[pytest.approx(1.6)] * 4)),
        (0, (0.0, *[pytest.approx(-0.6)] * 4)),
    )


def test_a_cluster_takes_the_least_summed_error() -> None:
    # Two clusters, far apart; in each one channel errs much by what the other two prefer.
    dynamics = np.tile(np.array([1.0, 1.01, 0.99, 90.0, 91.0, 92.0]), (3, len(BLOCKS), 1))
    errors = np.ones((4, 5, len(BLOCKS), 6))
    errors[:, 0, :, :3] = [0.5, 0.5, 3]
    errors[:, 2, :, :3] = [0.9, 0.9, 0.2]
    errors[:, 4, :, 3:] = [0.1, 0.1, 0.2]
    for seed in range(5):
        schedule = HyCa(6, clusters=2, seed=seed).schedule(with_errors(errors, dynamics))
        assert schedule.groups is not None
        assert schedule.forecast is not None
        assert (schedule.groups == [0, 0, 0, 1, 1, 1]).all()
        taylor, moulton = (SOLVERS[row].coefficients(3, 5) for row in (2, 4))
        # The weight of the third feature is b / h^2.
        assert schedule.forecast[0, 13, 2] == pytest.approx([taylor[1] / 25, moulton[1] / 25])
    one = HyCa(6, clusters=1).schedule(with_errors(errors, dynamics))
    assert one.forecast is not None
    assert one.forecast.shape[3] == 1


@pytest.mark.parametrize(("updates", "row"), [(15, 0), (10, 1), (8, 1), (6, 2), (4, 3), (2, 3)])
def test_errors_come_from_the_nearest_interval(updates: int, row: int) -> None:
    errors = np.ones((4, 5, len(BLOCKS), 3))
    errors[row, 0] = 0.5
    errors[np.arange(4) != row, 1] = 0.5
    schedule = HyCa(updates).schedule(with_errors(errors, np.ones((3, len(BLOCKS), 3))))
    # Hold everywhere.
    assert all(isinstance(op, Add) for step in lower(schedule).steps for op in step if not hasattr(op, "block"))


def test_clusters_are_found_and_equal_seeds_find_equal_ones() -> None:
    draw = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), 25)
    points = np.array([[0, 0], [10, 0], [0, 10], [10, 10]])[truth] + draw.normal(size=(100, 2))
    for seed in range(5):
        found = k_means(points, 4, np.random.default_rng(seed))
        assert all(len(np.unique(found[truth == number])) == 1 for number in range(4))
        assert len(np.unique(found)) == 4
        assert np.array_equal(found, k_means(points, 4, np.random.default_rng(seed)))


def test_more_clusters_than_different_channels() -> None:
    assert len(np.unique(k_means(np.repeat(np.eye(2), 3, axis=0), 8, np.random.default_rng(0)))) == 2
    assert (k_means(np.zeros((5, 3)), 8, np.random.default_rng(0)) == 0).all()


def test_refuses_no_clusters_before_any_work() -> None:
    with pytest.raises(InvalidInput, match=r"cache\.clusters: expected at least 1, got 0"):
        HyCa(clusters=0)


def test_refuses_a_profile_without_the_statistics() -> None:
    told = r"cache=hyca: expected a profile with solver_mse, got one without; run scripts/calibrate\.py"
    with pytest.raises(InvalidInput, match=told):
        HyCa(4).schedule(random_profile(seed=0, steps=STEPS))
