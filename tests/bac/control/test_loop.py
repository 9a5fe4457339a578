"""Every way in which inference, sensors and clock can misbehave, told tick by tick."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from scenarios import CRASH, LENGTH, STALL, Robot, consistent, latencies, named_actions, numbers, play, settings

from bac.control import (
    ActionLimits,
    CommandKind,
    ControlLoop,
    Degradation,
    Fallback,
    LoopSettings,
    Observation,
    Request,
    Seam,
    SimulatedInference,
    VirtualClock,
)
from bac.errors import InvalidInput

MS = 1_000_000


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


def test_no_latency_executes_the_first_actions_of_every_chunk() -> None:
    robot, report = play(settings(deadline_ticks=0), latencies(0.0), 10)
    assert robot.story() == "0 1 2 3 100 101 102 103 200 201"
    assert numbers(report, "waited", "held", "tail", "deadline_misses", "late_actions") == [0, 0, 0, 0, 0]
    assert numbers(report, "requests", "accepted", "replaced_actions") == [3, 3, 4]
    assert report.action_age_ms["max"] == 300


def test_inference_within_the_deadline_drops_what_is_late_and_never_stalls() -> None:
    robot, report = play(settings(deadline_ticks=2), latencies(150.0), 14)
    # The first chunk is due when it arrives, for the robot rested; the others lose two actions each.
    assert robot.story() == ". . 0 1 2 3 102 103 104 105 202 203 204 205"
    assert numbers(report, "waited", "executed", "held", "tail", "deadline_misses") == [2, 12, 0, 0, 0]
    assert numbers(report, "requests", "accepted", "late_actions", "replaced_actions") == [4, 3, 4, 2]
    assert report.observation_age_ms["max"] == 0
    assert report.action_age_ms["max"] == 500
    assert consistent(report)


def test_slow_inference_lives_on_the_tail_and_counts_its_misses() -> None:
    robot, report = play(settings(deadline_ticks=1), latencies(50.0, 250.0), 12)
    assert robot.story() == ". 0 1 2 3 4 5 103 104 105 =105 203"
    assert numbers(report, "deadline_misses", "tail", "held", "requests") == [2, 3, 1, 3]
    assert consistent(report)


def test_very_slow_inference_holds_between_chunks() -> None:
    # 900 ms: a chunk of 6 actions asked for on the move is over before it comes, one asked for at rest is not.
    robot, report = play(settings(), latencies(0.0, 900.0), 34)
    moved, rested = "0 1 2 3 4 5" + 16 * " =5", " 200 201 202 203 204 205" + 6 * " =205"
    assert robot.story() == moved + rested
    assert numbers(report, "requests", "accepted", "late_actions", "held") == [5, 4, 2 * LENGTH, 22]
    assert consistent(report)


def test_fallback_stop_ends_the_loop_with_the_reason() -> None:
    robot, report = play(settings(fallback=Fallback.STOP), latencies(0.0, STALL), 34)
    assert robot.story() == "0 1 2 3 4 5 !"
    assert report.stopped == "control loop: no action is due at tick 6, and the fallback is stop."
    assert numbers(report, "executed", "stops", "ticks", "deadline_misses") == [6, 1, 7, 1]
    assert consistent(report)


def test_jittery_inference_gives_the_newest_chunk_that_is_there() -> None:
    robot, report = play(settings(deadline_ticks=2), latencies(50, 120, 310, 10, 250, 40), 26)
    assert robot.story() == (
        ". 0 1 2 3 4 102 103 104 105 =105 =105 204 301 302 303 304 305 =305 403 404 501 502 503 504 601"
    )
    assert numbers(report, "deadline_misses", "late_actions", "replaced_actions") == [2, 12, 4]
    assert consistent(report)


def test_stalled_inference_is_given_up_and_started_again() -> None:
    robot, report = play(settings(stall_ms=350.0, restarts=1), latencies(0.0, STALL, 0.0), 12)
    assert robot.story() == "0 1 2 3 4 5 =5 =5 200 201 202 203"
    assert numbers(report, "given_up", "restarts", "deadline_misses", "held", "tail") == [1, 1, 1, 2, 1]
    assert consistent(report)


def test_stalled_inference_without_a_restart_stops_after_the_tail() -> None:
    robot, report = play(settings(stall_ms=150.0), latencies(0.0, STALL), 20)
    assert robot.story() == "0 1 2 3 4 5 !"
    assert report.stopped == ("inference: expected an answer, got none for 200 ms; start it again or allow restarts.")
    assert consistent(report)


def test_crashed_inference_restarts_as_often_as_allowed() -> None:
    robot, report = play(settings(restarts=1), latencies(0.0, CRASH, 0.0, CRASH), 20)
    assert robot.story() == "0 1 2 3 4 200 201 202 203 204 205 !"
    assert report.stopped == ("inference: expected an answer, got simulated crash; start it again or allow restarts.")
    assert numbers(report, "restarts", "given_up", "stops") == [1, 2, 1]
    assert consistent(report)


def test_bursty_observations_are_never_inferred_from_twice() -> None:
    bursts = {0: 0, 1: 90, 9: 880, 10: 1000, 11: 1100, 12: 1200, 13: 1300}
    inferred: list[int] = []

    def predict(request: Request) -> np.ndarray:
        inferred.append(request.observation.stamp_ns // MS)
        return named_actions(request)

    def seen(tick: int) -> Observation | None:
        return Observation(None, bursts[tick] * MS) if tick in bursts else None

    robot, report = play(settings(), latencies(0.0), 14, predict=predict, seen=seen)
    assert inferred == [0, 90, 880, 1300]
    assert robot.story() == "0 1 2 3 100 101 102 103 104 200 201 202 203 300"
    assert report.observation_age_ms["max"] == 710
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
        (np.zeros((0, 1)), r"^chunk: expected float\[N, Da\], N >= 1, got float64\[0, 1\]"),
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


def test_degradation_stops_at_the_cheapest() -> None:
    rule = Degradation(levels=3, misses=1, window=1, recover=100)
    _, report = play(settings(degradation=rule), latencies(350.0), 60)
    assert (report.level, *numbers(report, "degradations", "recoveries")) == (2, 2, 0)


def test_inpainting_asks_for_the_committed_actions_and_keeps_them() -> None:
    asked: list[list[float] | None] = []

    def predict(request: Request) -> np.ndarray:
        asked.append(None if request.committed is None else request.committed[:, 0].tolist())
        return named_actions(request)

    rules = settings(seam=Seam.INPAINT, deadline_ticks=2)
    robot, _ = play(rules, latencies(0.0, 50.0, 150.0), 12, predict=predict)
    # Chunk 1 comes a tick early and its action 101 is not taken: 5, committed, is.
    assert asked == [None, [4, 5], [104, 105]]
    assert robot.story() == "0 1 2 3 4 5 102 103 104 105 202 203"


def test_hold_is_what_the_task_says() -> None:
    robot, _ = play(settings(), latencies(0.0, STALL), 8, hold=lambda action: action * 0)
    assert robot.story() == "0 1 2 3 4 5 =0 =0"


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_every_action_meets_its_own_tick(seed: int) -> None:
    """No action before or after its tick, none from before a gap, none twice, order kept, all bounded and counted."""
    draw = random.Random(seed)
    trace = [draw.choice([0, 30, 80, 170, 400, 900, STALL, CRASH]) for _ in range(50)]
    asked: dict[int, int] = {}

    def predict(request: Request) -> np.ndarray:
        asked[request.number] = request.tick
        return named_actions(request)

    seam = draw.choice([Seam.REPLACE, Seam.INPAINT])
    limits = {"stall_ms": 600.0, "observation_age_ms": 250.0 if seed % 2 else None}
    rules = settings(seam=seam, deadline_ticks=draw.randint(0, 3), restarts=1000, **limits)
    gaps = {tick for tick in range(400) if draw.random() < 0.2}
    clock = VirtualClock()
    loop = ControlLoop(rules, SimulatedInference(predict, lambda r: trace[r.number % 50], clock), clock)
    rest, executed, previous, gap = {}, [], -1, -1
    while loop.tick < 390:
        tick = loop.wait()
        assert clock.now_ns() == tick * 100 * MS
        loop.sense(None if tick in gaps else Observation(None, clock.now_ns()))
        command = loop.act()
        assert command.tick == tick > previous
        previous = tick
        assert loop.report().buffered <= rules.capacity
        if command.kind is not CommandKind.EXECUTE:
            gap = tick if "stale" in command.reason else gap
            continue
        number, index = divmod(int(command.action[0]), 100)
        # Due at the tick of asking plus its index, or, from rest, at the tick of arriving plus its index.
        rest.setdefault(number, tick - index)
        assert tick == rest[number] + index
        assert tick >= asked[number] + index
        assert asked[number] > gap
        executed.append((number, index))
        if draw.random() < 0.1:
            clock.advance_ns(draw.randrange(90 * MS))
    assert executed == sorted(set(executed))
    assert len(executed) > 50
    assert consistent(loop.report())


def test_an_hour_of_virtual_time_in_constant_memory() -> None:
    draw = random.Random(0)
    trace = [draw.choice([20.0, 60.0, 150.0, 350.0, STALL, CRASH]) for _ in range(1009)]
    rules = settings(stall_ms=1000.0, restarts=10**6, degradation=Degradation(levels=3))
    clock = VirtualClock()
    loop = ControlLoop(rules, SimulatedInference(named_actions, lambda r: trace[r.number % 1009], clock), clock)

    def play_until(tick: int) -> int:
        loop.run(lambda: Observation(None, clock.now_ns()), lambda _: None, tick)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    early, late = play_until(2_000), play_until(36_000)
    tracemalloc.stop()
    report = loop.report()
    assert clock.now_ns() == 3_599_900 * MS
    assert numbers(report, "ticks", "skipped") == [36_000, 0]
    assert consistent(report)
    assert late - early < 16_384  # a list of 34,000 numbers would take 270,000 bytes


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
