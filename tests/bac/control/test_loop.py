"""What the loop promises besides its stories: exact ticks, whole refusals, levels, settings within their ranges."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from scenarios import MS, STALL, Robot, consistent, latencies, named_actions, numbers, play, settings

from bac.control import (
    ActionLimits,
    ControlLoop,
    Degradation,
    LoopSettings,
    Observation,
    Request,
    Seam,
    SimulatedInference,
    VirtualClock,
)
from bac.control.guards import refusal_of
from bac.errors import InvalidInput


def test_importing_control_imports_no_torch() -> None:
    told = subprocess.run(
        [sys.executable, "-c", "import sys, bac.control, bac.control.pytest_plugin; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "False"


@pytest.mark.parametrize("rate_hz", [10.0, 30.0])
def test_tick_times_are_exact_over_a_hundred_thousand_ticks(rate_hz: float) -> None:
    robot, report = play(settings(rate_hz=rate_hz), latencies(50.0), 100_000)
    assert robot.times == [tick * 1_000_000_000 // int(rate_hz) for tick in range(100_000)]
    assert [command.tick for command in robot.commands] == list(range(100_000))
    assert numbers(report, "ticks", "skipped") == [100_000, 0]
    assert report.jitter_ms["max"] == 0
    assert consistent(report)


def test_observations_from_the_past_or_the_future_are_refused() -> None:
    stamps = [0, 50, 20, 900, 400]
    _, report = play(settings(), latencies(0.0), 5, seen=lambda tick: Observation(None, stamps[tick] * MS))
    assert numbers(report, "refused_observations") == [2]
    assert report.observation_age_ms["max"] == 250


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (np.array([[1.0], [np.nan]]), r"^chunk: expected finite actions, got action 1 \[nan\]; check weights\.$"),
        (np.array([[1.0], [-np.inf]]), r"finite actions, got action 1"),
        (np.array([[1.0], [1e6]]), r"^chunk: expected actions within \[-1000\.0\] and \[1000\.0\], got action 1"),
        (np.zeros((2, 3)), r"^chunk: expected 1 as the limits, got 3 channels; check the predictor\.$"),
        (np.zeros((0, 1)), r"^chunk: expected float\[N, Da\], N and Da >= 1, got float64\[0, 1\]"),
        (np.zeros((2, 0)), r"^chunk: expected float\[N, Da\], N and Da >= 1, got float64\[2, 0\]"),
        (np.zeros((2, 1), np.int64), r"got int64\[2, 1\]"),
        ([[1.0]], r"got list"),
    ],
)
def test_a_bad_chunk_is_refused_as_a_whole(bad: object, told: str) -> None:
    limits = ActionLimits(np.array([-1000.0]), np.array([1000.0]))

    def predict(request: Request) -> np.ndarray:
        return bad if request.number == 1 else named_actions(request)  # type: ignore[return-value]

    robot, report = play(settings(), latencies(0.0), 8, predict=predict, limits=limits)
    # Chunk 1, asked for at tick 4, is refused; the tail goes on, and another is asked for with the next observation.
    assert robot.story() == "0 1 2 3 4 200 201 202"
    assert numbers(report, "refused", "accepted", "requests") == [1, 2, 3]
    assert report.counters.last_refusal is not None
    assert re.search(told, report.counters.last_refusal)
    assert consistent(report)


@pytest.mark.parametrize("seam", Seam)
def test_a_chunk_of_another_width_than_the_first_is_refused_where_there_are_no_limits_too(seam: Seam) -> None:
    def predict(request: Request) -> np.ndarray:
        return np.zeros((6, 3)) if request.number == 1 else named_actions(request)

    robot, report = play(settings(seam=seam, deadline_ticks=0), latencies(0.0), 6, predict=predict)
    assert [command.chunk for command in robot.commands] == [0, 0, 0, 0, 0, 2]
    told = "chunk: expected 1 as the chunks before, got 3 channels; check the predictor."
    assert report.counters.last_refusal == told
    assert consistent(report)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_action_at_its_limit_is_within_in_any_precision(dtype: type[np.floating]) -> None:
    limits = ActionLimits(np.array([-0.1, -0.3]), np.array([0.1, 0.3]))
    at = np.stack([limits.low, limits.high]).astype(dtype)
    assert refusal_of(at, limits) is None
    assert refusal_of(np.nextafter(at, dtype(1)), limits) is not None


def test_an_input_that_the_predictor_refuses_is_counted_and_told() -> None:
    def predict(request: Request) -> np.ndarray:
        if request.number == 0:
            raise InvalidInput("observation: expected, got.")
        return named_actions(request)

    robot, report = play(settings(), latencies(0.0), 4, predict=predict)
    assert robot.story() == ". 100 101 102"
    assert (report.counters.last_refusal, report.counters.refused) == ("observation: expected, got.", 1)


def test_degrades_after_misses_and_returns_after_clean_ticks() -> None:
    levels: list[int] = []

    def latency(request: Request) -> float:
        levels.append(request.level)
        # The good schedule takes too long for a while.
        return 150.0 if request.level == 0 and request.tick < 20 else 50.0

    rule = Degradation(levels=2, misses=2, window=10, recover=16)
    _, report = play(settings(degradation=rule), latency, 40)
    assert levels == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    assert numbers(report, "degradations", "recoveries", "deadline_misses") == [1, 1, 2]
    assert report.level == 0


def test_one_slow_chunk_leads_one_level_down_and_no_further() -> None:
    levels: list[int] = []

    def latency(request: Request) -> float:
        levels.append(request.level)
        return 2500.0 if request.number == 1 else 20.0

    rule = Degradation(levels=5, misses=3, window=50, recover=50)
    _, report = play(settings(degradation=rule, rest_age_ms=10_000.0), latency, 60)
    # All its ticks on hold say of level 0 that it is too slow; of level 1 nothing is known before it is asked.
    assert set(levels) == {0, 1}
    assert numbers(report, "degradations", "recoveries", "deadline_misses") == [1, 0, 1]


def test_degradation_stops_at_the_cheapest() -> None:
    rule = Degradation(levels=3, misses=1, window=1, recover=100)
    _, report = play(settings(degradation=rule), latencies(350.0), 60)
    assert (report.level, *numbers(report, "degradations", "recoveries")) == (2, 2, 0)


def test_hold_is_what_the_task_says() -> None:
    robot, _ = play(settings(), latencies(0.0, STALL), 8, hold=lambda action: action * 0)
    assert robot.story() == "0 1 2 3 4 5 =0 =0"


def test_start_moves_the_origin_and_only_before_the_first_tick() -> None:
    clock = VirtualClock()
    loop = ControlLoop(settings(), SimulatedInference(named_actions, latencies(0.0), clock), clock)
    clock.advance_ns(55)
    loop.start()
    robot = Robot(clock)
    loop.run(robot.observe, robot.execute, 2)
    assert robot.times == [55, 55 + 100 * MS]
    with pytest.raises(InvalidInput, match=r"^control loop: expected no tick yet, got 1; make another loop\.$"):
        loop.start()


@pytest.mark.parametrize(
    "changes",
    [
        {"replan_ticks": 0},
        {"deadline_ticks": -1},
        {"stall_ms": 0.0},
        {"jump_ms": -1.0},
        {"restarts": -1},
        {"observation_age_ms": float("nan")},
        {"rest_age_ms": 0.0},
        {"rest_age_ms": float("nan")},
    ],
)
def test_settings_outside_their_ranges_refuse(changes: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=r"^control loop: expected replan_ticks >= 1, deadline_ticks"):
        settings(**changes)


def test_other_settings_refuse_too() -> None:
    with pytest.raises(InvalidInput, match=r"^rate_hz"):
        LoopSettings(0.0, 8)
    with pytest.raises(InvalidInput, match=r"^degradation: expected at least 1 level and 1 <= misses <= window"):
        Degradation(misses=9, window=3)
    with pytest.raises(InvalidInput, match=r"^action limits: expected low and high as two vectors"):
        ActionLimits(np.array([1.0]), np.array([0.0]))
