"""Sensors that fall silent and clocks that jump, told tick by tick."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scenarios import MS, Leaping, Robot, consistent, latencies, named_actions, numbers, play, settings

from bac.control import (
    ControlLoop,
    Degradation,
    Fallback,
    LoopCounters,
    Observation,
    Request,
    Seam,
    SimulatedInference,
    VirtualClock,
)


def silent(*gap: int) -> Callable[[int], Observation | None]:
    """Return a sensor of 10 Hz that gives nothing in these ticks."""
    return lambda tick: None if tick in gap else Observation(None, tick * 100 * MS)


def test_a_plan_from_before_a_gap_is_never_taken_up_again() -> None:
    rules = settings(replan_ticks=8, deadline_ticks=2, observation_age_ms=150.0)

    def predict(request: Request) -> np.ndarray:
        return np.arange(16.0)[:, None] + 100 * request.number

    robot, report = play(rules, latencies(200.0), 17, predict=predict, seen=silent(5, 6, 7))
    # Chunk 0 reaches to tick 17; its actions 4 to 15 are dropped at tick 6, which is stale. Tick 8 sees again and asks.
    assert robot.story() == ". . 0 1 2 3 =3 =3 =3 =3 100 101 102 103 104 105 106"
    assert [command.reason for command in robot.commands[6:10]] == [
        "the newest observation is stale",
        "the newest observation is stale",
        "no answer since tick 8",
        "no answer since tick 8",
    ]
    assert numbers(report, "stale", "held", "executed", "late_actions", "dropped_at_stop") == [2, 4, 11, 12, 0]
    assert consistent(report)


@pytest.mark.parametrize("seam", list(Seam))
def test_a_chunk_in_flight_across_a_gap_is_dropped_and_another_asked_for_at_once(seam: Seam) -> None:
    asked: list[tuple[int, int]] = []

    def predict(request: Request) -> np.ndarray:
        asked.append((request.tick, 0 if request.committed is None else len(request.committed)))
        return named_actions(request)

    rules = settings(deadline_ticks=2, observation_age_ms=50.0, seam=seam)
    robot, report = play(rules, latencies(200.0, 300.0, 200.0), 13, predict=predict, seen=silent(5, 6))
    # Chunk 1, asked for at tick 4, comes at tick 7: nobody saw what the robot did at ticks 5 and 6.
    assert robot.story() == ". . 0 1 2 =2 =2 =2 =2 200 201 202 203"
    assert asked == [(0, 0), (4, 2 if seam is Seam.INPAINT else 0), (7, 0)]
    # Three actions of chunk 0 at the gap, and the six of chunk 1.
    assert numbers(report, "stale", "accepted", "requests", "late_actions") == [2, 3, 4, 3 + 6]
    assert consistent(report)


def test_an_observation_of_a_tick_that_turns_stale_within_it_counts_as_from_before() -> None:
    clock = VirtualClock()
    loop = ControlLoop(
        settings(observation_age_ms=50.0), SimulatedInference(named_actions, latencies(80.0), clock), clock
    )
    robot = Robot(clock)
    for tick in range(4):
        loop.wait()
        loop.sense(robot.observe())
        clock.advance_ns((60 if tick == 0 else 0) * MS)
        robot.execute(loop.act())
    # What was asked for at tick 0 is dropped at tick 1, and what tick 1 asks for begins at tick 2.
    assert robot.story() == ". . 100 101"
    assert numbers(loop.report(), "stale", "accepted", "late_actions", "requests") == [1, 2, 6, 2]


def test_a_stale_tick_is_no_miss_of_inference() -> None:
    rule = Degradation(levels=2, misses=2, window=10, recover=100)
    rules = settings(deadline_ticks=2, observation_age_ms=50.0, degradation=rule)
    robot, report = play(rules, latencies(200.0), 14, seen=silent(5, 6, 7))
    # Nor are the two ticks that the chunk after it may take.
    assert robot.story() == ". . 0 1 2 =2 =2 =2 =2 =2 200 201 202 203"
    assert (report.level, *numbers(report, "stale", "held", "degradations")) == (0, 3, 5, 0)
    # A chunk after it that takes longer is one.
    robot, report = play(rules, latencies(200.0, 200.0, 500.0), 15, seen=silent(5, 6, 7))
    assert robot.story() == ". . 0 1 2" + 8 * " =2" + " 200 201"
    assert (report.level, *numbers(report, "deadline_misses", "degradations")) == (1, 1, 1)


def test_a_clock_that_jumps_back_while_the_loop_is_awake_is_refused_at_once() -> None:
    clock = VirtualClock(10_000 * MS)
    loop = ControlLoop(settings(), SimulatedInference(named_actions, latencies(0.0), clock), clock)
    robot = Robot(clock)

    def execute(command: object) -> None:
        robot.execute(command)
        if len(robot.commands) == 3:
            clock._now_ns -= 5_000 * MS

    report = loop.run(robot.observe, execute, 20)
    assert robot.story() == "0 1 2 !"
    told = "clock: expected no time before one it has told, got -5000.000 ms; start a new loop."
    assert report.stopped == robot.commands[-1].reason == told
    assert clock.now_ns() == 5_200 * MS
    assert report.counters == LoopCounters(
        ticks=4,
        executed=3,
        stops=1,
        requests=1,
        accepted=1,
        accepted_actions=6,
        dropped_at_stop=3,
        refused_observations=1,
    )


@pytest.mark.parametrize(("awake", "story"), [(False, "0 1 2 !"), (True, "0 1 !")], ids=["asleep", "awake"])
def test_a_clock_that_jumps_back_within_a_tick_is_refused_at_once(awake: bool, story: str) -> None:
    clock = VirtualClock(10_000 * MS)
    loop = ControlLoop(settings(), SimulatedInference(named_actions, latencies(0.0), clock), clock)
    robot = Robot(clock)
    while loop.stopped is None:
        loop.wait()
        clock.advance_ns(90 * MS)
        loop.sense(robot.observe())
        clock._now_ns -= (80 if awake and loop.tick == 2 else 0) * MS
        robot.execute(loop.act())
        clock._now_ns -= (80 if not awake and loop.tick == 2 else 0) * MS
    assert robot.story() == story
    assert loop.stopped == "clock: expected no time before one it has told, got -80.000 ms; start a new loop."
    assert consistent(loop.report())


def test_a_clock_that_jumps_back_before_the_first_tick_is_refused_too() -> None:
    clock = VirtualClock(10_000 * MS)
    loop = ControlLoop(settings(), SimulatedInference(named_actions, latencies(0.0), clock), clock)
    clock._now_ns = 0
    robot = Robot(clock)
    assert loop.run(robot.observe, robot.execute, 20).stopped is not None
    assert (robot.story(), clock.now_ns()) == ("!", 0)


def test_a_stale_observation_stops_motion_until_a_fresh_one_comes() -> None:
    def seen(tick: int) -> Observation | None:
        return None if 2 <= tick < 6 else Observation(None, tick * 100 * MS)

    robot, report = play(settings(observation_age_ms=150.0), latencies(0.0), 8, seen=seen)
    assert robot.story() == "0 1 2 =2 =2 =2 100 101"
    assert robot.commands[3].reason == "the newest observation is stale"
    assert numbers(report, "stale", "held") == [3, 3]
    robot, report = play(settings(observation_age_ms=150.0, fallback=Fallback.STOP), latencies(0.0), 8, seen=seen)
    assert robot.story() == "0 1 2 !"
    assert report.stopped == "control loop at tick 3: the newest observation is stale, and the fallback is stop."
    # Action 3, due at the tick of the stop, and the two behind it.
    assert numbers(report, "dropped_at_stop") == [3]
    assert consistent(report)


@pytest.mark.parametrize(
    ("by_ms", "told", "refused"),
    [
        (5000.0, "a time at most 1000 ms after it was due, got +5000.000 ms", 0),
        (-500.0, "no time before one it has told, got -400.000 ms", 1),
    ],
    ids=["ahead", "back"],
)
def test_a_clock_that_jumps_is_refused(by_ms: float, told: str, refused: int) -> None:
    robot, report = play(settings(), latencies(0.0), 20, clock=Leaping(5, by_ms))
    assert robot.story() == "0 1 2 3 !"
    assert report.stopped == robot.commands[-1].reason == f"clock: expected {told}; start a new loop."
    # Beside the observations of before the jump, one from after a jump back is from the past.
    assert report.counters == LoopCounters(
        ticks=5,
        executed=4,
        stops=1,
        requests=1,
        accepted=1,
        accepted_actions=6,
        dropped_at_stop=2,
        refused_observations=refused,
    )
    assert consistent(report)


def test_what_comes_after_a_clock_jumped_is_dropped() -> None:
    robot, report = play(settings(), latencies(0.0, 50.0), 20, clock=Leaping(6, 5000.0))
    assert robot.story() == "0 1 2 3 4 !"
    # Action 5 of chunk 0, and chunk 1, which was finished meanwhile: long after its deadline by this clock, but before
    # the deadline tick began.
    assert report.counters == LoopCounters(
        ticks=6, executed=5, stops=1, requests=2, accepted=2, accepted_actions=12, dropped_at_stop=7
    )
    assert report.buffered == 0
    assert consistent(report)
