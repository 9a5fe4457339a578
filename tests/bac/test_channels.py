"""Channel statistics against naive arithmetic, and the solvers they compare by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import BLOCKS, PROVENANCE, random_inputs, small_network

from bac.channels import ChannelTotals
from bac.executors import ChunkNoise
from bac.profiler import profile_features
from bac.solvers import Solver, measured_intervals
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, ddpm

STEPS = 17


def predicted(features: np.ndarray, solver: Solver, latest: int, interval: int, step: int) -> np.ndarray:
    now, before, earlier = (features[latest - back * interval] for back in range(3))
    slope = (now - before) / interval
    curve = (now - 2 * before + earlier) / interval**2
    a, b = solver.coefficients(step - latest, interval)
    return now + a * slope + b * curve


@pytest.mark.parametrize(
    ("solver", "weights"),
    [
        (Solver.HOLD, [1, 0, 0]),
        (Solver.ADAMS_BASHFORTH, [2, -1, 0]),
        (Solver.TAYLOR, [1 + 1 + 1 / 2, -1 - 1, 1 / 2]),
        # 4/3 F0 - 1/3 F1 + 2/3 (2 (F0 - F1) - (F1 - F2)).
        (Solver.BDF, [8 / 3, -7 / 3, 2 / 3]),
        (Solver.ADAMS_MOULTON, [3, -3, 1]),
    ],
)
def test_solvers_one_interval_ahead_by_hand(solver: Solver, weights: list[float]) -> None:
    for interval in (1, 4):
        features = np.zeros((2 * interval + 1, 3))
        features[[2 * interval, interval, 0]] = np.eye(3)
        assert predicted(features, solver, 2 * interval, interval, 3 * interval) == pytest.approx(weights)


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_solvers_between_updates(ahead: int) -> None:
    line, parabola = (np.array([(3 + 0.5 * t) ** power for t in range(12)]) for power in (1, 2))
    for solver in set(Solver) - {Solver.HOLD}:
        assert predicted(line, solver, 8, 4, 8 + ahead) == pytest.approx(line[8 + ahead])
    exact = [s for s in Solver if predicted(parabola, s, 8, 4, 8 + ahead) == pytest.approx(parabola[8 + ahead])]
    assert exact == [Solver.ADAMS_MOULTON]
    # The BDF formula for unequal steps as it stands in textbooks, with the slope extrapolated to the new step.
    now, before, earlier = parabola[[8, 4, 0]]
    ratio, slope = ahead / 4, (now - before) / 4
    new_slope = slope + ahead * (slope - (before - earlier) / 4) / 4
    textbook = (1 + ratio) ** 2 * now - ratio**2 * before + ahead * (1 + ratio) * new_slope
    assert predicted(parabola, Solver.BDF, 8, 4, 8 + ahead) == pytest.approx(textbook / (1 + 2 * ratio))


def test_intervals_need_two_for_the_past_and_one_to_predict() -> None:
    assert [measured_intervals(steps) for steps in (5, 6, 8, 9, 15, 24, 100)] == [
        (), (2,), (2,), (2, 3), (2, 3, 5), (2, 3, 5, 8), (2, 3, 5, 8),
    ]  # fmt: skip


def test_equals_naive_arithmetic() -> None:
    features = np.random.default_rng(0).normal(size=(STEPS, 3, 4, 5)).cumsum(axis=0)
    totals = ChannelTotals(1, STEPS)
    # Two batches of unequal size: a mean of means would show.
    totals.add(0, torch.from_numpy(features[:, :1]).float())
    totals.add(0, torch.from_numpy(features[:, 1:]).float())
    found = totals.statistics()
    for row, interval in enumerate([2, 3, 5]):
        for column, solver in enumerate(Solver):
            squares = [
                (features[step] - predicted(features, solver, latest, interval, step)) ** 2
                for latest in range(2 * interval, STEPS - interval + 1, interval)
                for step in range(latest + 1, latest + interval)
            ]
            expected = np.mean(squares, axis=(0, 1, 2))
            # float32 features, moments that cancel by one digit.
            np.testing.assert_allclose(found["solver_mse"][row, column, 0], expected, rtol=1e-4)
    rms = [
        np.sqrt(np.mean(each**2, axis=(0, 1, 2)))
        for each in (features, np.diff(features, axis=0), np.diff(features, 2, axis=0), features[4:] - features[:-4])
    ]
    expected = np.stack([rms[1] / rms[0], rms[2] / rms[1], rms[3] / rms[1] / 4])
    np.testing.assert_allclose(found["channel_dynamics"][:, 0], expected, rtol=1e-5)


def test_dynamics_of_a_line_a_zigzag_and_nothing() -> None:
    step = torch.arange(50.0)[:, None, None]
    features = torch.cat((1000 + step, (-1) ** step, torch.zeros(50, 1, 1), torch.ones(50, 1, 1)), dim=2)[:, None]
    totals = ChannelTotals(1, 50)
    totals.add(0, features)
    speed, roughness, persistence = totals.statistics()["channel_dynamics"][:, 0]
    assert speed == pytest.approx([1 / 1024.6, 2, 0, 0], rel=1e-4)
    assert roughness == pytest.approx([0, 2, 0, 0])
    assert persistence == pytest.approx([1, 0, 0, 0])


@pytest.mark.parametrize("steps", [5, 9])
def test_profiler_measures_them_where_steps_allow(steps: int) -> None:
    trunk, inputs = DiffusionTransformerTrunk(small_network()), random_inputs(1, batch=3, steps=steps)
    sampler = ddpm(DiffusionProcess(train_steps=steps))
    profile = profile_features(trunk, sampler, PROVENANCE, [inputs])
    if steps == 5:
        assert profile.solver_mse is profile.channel_dynamics is None
        return
    assert profile.solver_mse is not None
    assert profile.channel_dynamics is not None
    assert profile.solver_mse.shape == (2, 5, len(BLOCKS), 16)
    assert profile.channel_dynamics.shape == (3, len(BLOCKS), 16)
    # Blocks are told apart, and batches count by their rows.
    assert len(np.unique(profile.solver_mse.mean(axis=(0, 1, 3)))) == len(BLOCKS)
    observation, noise = inputs
    parts = [
        (observation[part], ChunkNoise(noise.initial[part], noise.steps[:, part]))
        for part in (slice(0, 1), slice(1, 3))
    ]
    parted = profile_features(trunk, sampler, PROVENANCE, parts)
    np.testing.assert_allclose(parted.solver_mse, profile.solver_mse, rtol=1e-3)
    np.testing.assert_allclose(parted.channel_dynamics, profile.channel_dynamics, rtol=1e-4)
