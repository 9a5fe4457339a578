"""Every way in which inference, sensors and clock can misbehave, told tick by tick, with every counter."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scenarios import (
    CRASH,
    LENGTH,
    MS,
    STALL,
    Leaping,
    Robot,
    consistent,
    latencies,
    named_actions,
    numbers,
    play,
    settings,
)

from bac.control import (
    ControlLoop,
    Degradation,
    Fallback,
    LoopCounters,
    LoopReport,
    Observation,
    Request,
    Seam,
    SimulatedInference,
    VirtualClock,
)


def test_no_latency_executes_the_first_actions_of_every_chunk() -> None:
    robot, report = play(settings(deadline_ticks=0), latencies(0.0), 10)
    assert robot.story() == "0 1 2 3 100 101 102 103 200 201"
    assert report.counters == LoopCounters(
        ticks=10, executed=10, requests=3, accepted=3, accepted_actions=18, replaced_actions=4
    )
    assert report.action_age_ms["max"] == 300
    assert consistent(report)


def test_inference_within_the_deadline_drops_what_is_late_and_never_stalls() -> None:
    robot, report = play(settings(deadline_ticks=2), latencies(150.0), 14)
    # The first chunk is due when it arrives, for the robot rested; the others lose two actions each.
    assert robot.story() == ". . 0 1 2 3 102 103 104 105 202 203 204 205"
    assert report.counters == LoopCounters(
        ticks=14, executed=12, waited=2, requests=4, accepted=3, accepted_actions=18, late_actions=4, replaced_actions=2
    )
    assert report.observation_age_ms["max"] == 0
    assert report.action_age_ms["max"] == 500
    # Fetched at whole ticks, finished between them.
    assert report.latency_ms == {"count": 3, "mean": 150.0, "p50": 150.0, "p99": 150.0, "max": 150.0}
    assert consistent(report)


def test_slow_inference_lives_on_the_tail_and_counts_its_misses() -> None:
    robot, report = play(settings(deadline_ticks=1), latencies(50.0, 250.0), 12)
    assert robot.story() == ". 0 1 2 3 4 5 103 104 105 =105 203"
    assert [command.reason for command in robot.commands if command.reason] == [
        "no answer since tick 0",
        "no answer since tick 8",
    ]
    assert report.counters == LoopCounters(
        ticks=12,
        executed=10,
        held=1,
        waited=1,
        tail=3,
        requests=3,
        accepted=3,
        deadline_misses=2,
        accepted_actions=18,
        late_actions=6,
    )
    assert (report.latency_ms["mean"], report.latency_ms["max"]) == ((50 + 250 + 250) / 3, 250)
    assert consistent(report)


def test_very_slow_inference_holds_between_chunks() -> None:
    # 900 ms: a chunk of 6 actions asked for on the move is over before it comes, one asked for at rest is not.
    robot, report = play(settings(), latencies(0.0, 900.0), 34)
    moved, rested = "0 1 2 3 4 5" + 16 * " =5", " 200 201 202 203 204 205" + 6 * " =205"
    assert robot.story() == moved + rested
    assert report.counters == LoopCounters(
        ticks=34,
        executed=12,
        held=22,
        tail=6,
        requests=5,
        accepted=4,
        deadline_misses=4,
        accepted_actions=24,
        late_actions=2 * LENGTH,
    )
    assert consistent(report)


def test_a_chunk_made_for_a_robot_at_rest_is_dropped_if_the_world_is_too_old_in_it() -> None:
    # Fetched at tick 6, chunk 0 is of what was seen 600 ms ago; chunk 1, asked for at once, of 500 ms ago.
    robot, report = play(settings(rest_age_ms=500.0), latencies(550.0, 450.0), 18)
    assert robot.story() == 11 * ". " + "100 101 102 103 104 205 =205"
    assert [command.reason for command in robot.commands[:11]] == [
        *6 * ["no answer since tick 0"],
        *5 * ["no answer since tick 6"],
    ]
    # Chunk 0, and of chunk 2, asked for at tick 11 on the move, what was due before tick 16.
    assert report.counters == LoopCounters(
        ticks=18,
        executed=6,
        held=1,
        waited=11,
        tail=4,
        requests=4,
        accepted=3,
        deadline_misses=4,
        accepted_actions=18,
        late_actions=LENGTH + 5,
        replaced_actions=1,
    )
    assert consistent(report)


def test_a_minute_old_chunk_never_moves_a_robot_unless_the_settings_say_so() -> None:
    _, report = play(settings(), latencies(60_000.0), 1_300)
    assert numbers(report, "executed", "accepted", "late_actions") == [0, 2, 2 * LENGTH]
    assert consistent(report)
    _, report = play(settings(rest_age_ms=math.inf), latencies(60_000.0), 1_300)
    assert numbers(report, "executed", "accepted", "late_actions") == [LENGTH, 2, LENGTH]
    assert consistent(report)


def test_fallback_stop_ends_the_loop_with_the_reason() -> None:
    robot, report = play(settings(fallback=Fallback.STOP), latencies(0.0, STALL), 34)
    assert robot.story() == "0 1 2 3 4 5 !"
    assert report.stopped == "control loop at tick 6: no answer since tick 4, and the fallback is stop."
    assert report.counters == LoopCounters(
        ticks=7, executed=6, stops=1, tail=1, requests=2, accepted=1, deadline_misses=1, accepted_actions=6
    )
    assert consistent(report)


def test_jittery_inference_gives_the_newest_chunk_that_is_there() -> None:
    robot, report = play(settings(deadline_ticks=2), latencies(50, 120, 310, 10, 250, 40), 26)
    assert robot.story() == (
        ". 0 1 2 3 4 102 103 104 105 =105 =105 204 301 302 303 304 305 =305 403 404 501 502 503 504 601"
    )
    assert report.counters == LoopCounters(
        ticks=26,
        executed=22,
        held=3,
        waited=1,
        requests=7,
        accepted=7,
        deadline_misses=2,
        accepted_actions=42,
        late_actions=12,
        replaced_actions=4,
    )
    assert (report.latency_ms["count"], report.latency_ms["max"]) == (7, 310)
    assert consistent(report)


@pytest.mark.parametrize(("deadline_ticks", "tail"), [(1, 1), (5, 0)])
def test_stalled_inference_is_given_up_and_started_again(deadline_ticks: int, tail: int) -> None:
    # Silent from tick 4 to tick 8: whether its deadline was before or is still to come, the chunk is missed.
    rules = settings(stall_ms=350.0, restarts=1, deadline_ticks=deadline_ticks)
    robot, report = play(rules, latencies(0.0, STALL, 0.0), 12)
    assert robot.story() == "0 1 2 3 4 5 =5 =5 200 201 202 203"
    assert report.counters == LoopCounters(
        ticks=12,
        executed=10,
        held=2,
        tail=tail,
        requests=3,
        accepted=2,
        given_up=1,
        deadline_misses=1,
        accepted_actions=12,
        restarts=1,
    )
    assert consistent(report)


def test_stalled_inference_without_a_restart_stops_after_the_tail() -> None:
    robot, report = play(settings(stall_ms=150.0), latencies(0.0, STALL), 20)
    assert robot.story() == "0 1 2 3 4 5 !"
    assert report.stopped == "inference: expected an answer, got none for 200 ms; start it again or allow restarts."
    assert report.counters == LoopCounters(
        ticks=7, executed=6, stops=1, tail=1, requests=2, accepted=1, given_up=1, deadline_misses=1, accepted_actions=6
    )
    assert consistent(report)


@pytest.mark.parametrize("deadline_ticks", [0, 1, 3])
def test_crashed_inference_restarts_as_often_as_allowed_and_every_crash_is_a_miss(deadline_ticks: int) -> None:
    # Found dead a tick after it was asked: past its deadline, at it, and before it.
    rules = settings(restarts=1, deadline_ticks=deadline_ticks, degradation=Degradation(3, 1, 1, 100))
    robot, report = play(rules, latencies(0.0, CRASH, 0.0, CRASH), 20)
    assert robot.story() == "0 1 2 3 4 200 201 202 203 204 205 !"
    assert report.stopped == "inference: expected an answer, got simulated crash; start it again or allow restarts."
    assert report.counters == LoopCounters(
        ticks=12,
        executed=11,
        stops=1,
        tail=2 if deadline_ticks == 0 else 0,
        requests=4,
        accepted=2,
        given_up=2,
        deadline_misses=2,
        accepted_actions=12,
        replaced_actions=1,
        restarts=1,
        degradations=2,
    )
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
    assert report.counters == LoopCounters(
        ticks=14, executed=14, requests=4, accepted=4, accepted_actions=24, replaced_actions=5
    )
    assert report.observation_age_ms["max"] == 710
    assert consistent(report)


def test_a_robot_whose_sensor_is_silent_holds_and_says_so() -> None:
    def seen(tick: int) -> Observation | None:
        return Observation(None, 100 * MS) if tick == 1 else None

    # No fault of inference, so no reason to degrade.
    robot, report = play(settings(degradation=Degradation(3, 1, 1, 100)), latencies(0.0), 9, seen=seen)
    assert robot.story() == ". 0 1 2 3 4 5 =5 =5"
    assert [command.reason for command in robot.commands if command.reason] == 3 * ["no new observation"]
    assert report.counters == LoopCounters(
        ticks=9, executed=6, held=2, waited=1, requests=1, accepted=1, accepted_actions=6
    )


def test_an_observation_that_is_handed_over_again_is_none() -> None:
    robot, report = play(
        settings(degradation=Degradation(3, 1, 1, 100)),
        latencies(0.0),
        9,
        seen=lambda tick: Observation(None, min(tick, 1) * 100 * MS),
    )
    # A driver that keeps its last frame is as silent as one that gives none.
    assert robot.story() == "0 1 2 3 100 101 102 103 104"
    assert report.counters.requests == 2
    robot, report = play(
        settings(degradation=Degradation(3, 1, 1, 100)), latencies(0.0), 9, seen=lambda tick: Observation(None, 0)
    )
    assert robot.story() == "0 1 2 3 4 5 =5 =5 =5"
    assert [command.reason for command in robot.commands if command.reason] == 3 * ["no new observation"]
    assert numbers(report, "requests", "degradations", "refused_observations") == [1, 0, 0]


def test_a_refused_chunk_leaves_no_action_due_and_nothing_to_wait_for() -> None:
    robot, report = play(settings(), latencies(0.0), 2, predict=lambda request: np.array([[np.nan]]))
    assert [command.reason for command in robot.commands] == 2 * ["no action is due"]
    assert numbers(report, "refused", "waited", "deadline_misses") == [2, 2, 0]


def test_an_overslept_loop_skips_ticks_and_drops_their_actions() -> None:
    robot, report = play(settings(), latencies(0.0), 8, clock=Leaping(3, 250.0))
    assert [command.tick for command in robot.commands] == [0, 1, 4, 5, 6, 7]
    assert robot.story() == "0 1 100 101 102 103"
    assert report.counters == LoopCounters(
        ticks=6,
        skipped=2,
        executed=6,
        requests=2,
        accepted=2,
        accepted_actions=12,
        replaced_actions=2,
        overslept_actions=2,
    )
    assert report.jitter_ms["max"] == 250
    assert consistent(report)


def play_late(late_ms: dict[int, float], latency_ms: float, ticks: int, **rules: object) -> tuple[Robot, LoopReport]:
    """Play with so many ms between ``sense`` and ``act`` of some ticks."""
    clock = VirtualClock()
    loop = ControlLoop(settings(**rules), SimulatedInference(named_actions, latencies(latency_ms), clock), clock)
    robot = Robot(clock)
    while loop.tick + 1 < ticks:
        loop.wait()
        loop.sense(robot.observe())
        clock.advance_ns(round(late_ms.get(loop.tick, 0) * MS))
        robot.execute(loop.act())
    assert consistent(loop.report())
    return robot, loop.report()


@pytest.mark.parametrize(
    ("late_ms", "ticks", "story"), [(99.0, [0, 1, 2, 3], "0 1 2 3"), (350.0, [0, 1, 5, 6], "0 1 5 100")]
)
def test_a_tick_that_is_over_when_the_loop_comes_to_act_is_skipped(
    late_ms: float, ticks: list[int], story: str
) -> None:
    # Tick 2 begins at 200 ms. At 550, actions 2 to 4 are late, and what is executed is what is due then.
    robot, report = play_late({2: late_ms}, 0.0, ticks[-1] + 1, fallback=Fallback.STOP)
    assert [command.tick for command in robot.commands] == ticks
    assert [time // (100 * MS) for time in robot.times] == ticks
    assert robot.story() == story
    skipped = ticks[-1] + 1 - len(ticks)
    assert numbers(report, "ticks", "skipped", "overslept_actions") == [len(ticks), skipped, skipped]


def test_a_loop_that_is_kept_from_acting_for_as_long_as_a_clock_may_jump_stops() -> None:
    robot, report = play_late({2: 1101.0}, 0.0, 4)
    assert robot.story() == "0 1 ! !"
    bound = "clock: expected a time at most 1000 ms after it was due"
    assert report.stopped == f"{bound}, got +1001.000 ms; start a new loop."


def test_a_chunk_that_is_fetched_after_its_tick_begins_with_the_tick_that_is_on() -> None:
    robot, report = play_late({0: 250.0}, 50.0, 5)
    assert [command.tick for command in robot.commands] == [2, 3, 4]
    assert robot.story() == "0 1 2"
    assert numbers(report, "skipped", "overslept_actions", "late_actions", "deadline_misses") == [2, 0, 0, 0]


@pytest.mark.parametrize(("latency_ms", "misses"), [(90.0, 0), (110.0, 1)])
def test_a_deadline_that_passes_between_sense_and_act_is_judged_by_when_the_chunk_was_finished(
    latency_ms: float, misses: int
) -> None:
    # Asked for at tick 0, due to be there at tick 1, which begins at 100 ms; act of tick 0 comes at 350.
    _, report = play_late({0: 350.0}, latency_ms, 3)
    assert numbers(report, "deadline_misses") == [misses]


def test_a_chunk_that_came_while_its_deadline_was_overslept_is_missed_if_it_came_after_it() -> None:
    # Asked for at tick 4 with its deadline at tick 5; the loop wakes at tick 7, and the answer is there.
    rules = settings(degradation=Degradation(3, 1, 1, 100))
    robot, report = play(rules, latencies(0.0, 250.0), 8, clock=Leaping(6, 250.0))
    assert robot.story() == "0 1 2 3 4 103"
    late = LoopCounters(
        ticks=6,
        skipped=2,
        executed=6,
        requests=2,
        accepted=2,
        deadline_misses=1,
        accepted_actions=12,
        late_actions=3,
        overslept_actions=1,
        degradations=1,
    )
    assert report.counters == late
    assert consistent(report)
    # Finished at the deadline, and it is no fault of inference that nobody was awake to take it.
    robot, report = play(rules, latencies(0.0, 100.0), 8, clock=Leaping(6, 250.0))
    assert robot.story() == "0 1 2 3 4 103"
    assert (report.counters.deadline_misses, report.counters.degradations) == (0, 0)
    # Not even there when the loop wakes.
    robot, report = play(rules, latencies(0.0, STALL), 8, clock=Leaping(6, 250.0))
    assert robot.story() == "0 1 2 3 4 =4"
    assert numbers(report, "deadline_misses", "degradations", "overslept_actions") == [1, 1, 1]


def test_inpainting_asks_for_the_committed_actions_and_keeps_them() -> None:
    asked: list[list[float] | None] = []

    def predict(request: Request) -> np.ndarray:
        asked.append(None if request.committed is None else request.committed[:, 0].tolist())
        return named_actions(request)

    rules = settings(seam=Seam.INPAINT, deadline_ticks=2)
    robot, report = play(rules, latencies(0.0, 50.0, 150.0), 12, predict=predict)
    # Chunk 1 comes a tick early and its action 101 is not taken: 5, committed, is.
    assert asked == [None, [4, 5], [104, 105]]
    assert robot.story() == "0 1 2 3 4 5 102 103 104 105 202 203"
    assert report.counters == LoopCounters(
        ticks=12, executed=12, requests=3, accepted=3, accepted_actions=18, late_actions=3, kept_actions=1
    )
    assert consistent(report)


def test_blending_executes_the_mean_of_all_chunks_that_know_the_tick() -> None:
    rules = settings(seam=Seam.BLEND, decay=0.0, replan_ticks=2)
    robot, report = play(rules, latencies(0.0, 150.0), 14)
    # Of two chunks each, for the newer one comes two ticks late: tick 4 is the mean of action 4 and action 102.
    assert robot.story() == "0 1 2 3 53 54 153 154 253 254 353 354 453 454"
    assert report.counters == LoopCounters(
        ticks=14,
        executed=14,
        tail=6,
        requests=7,
        accepted=6,
        deadline_misses=6,
        accepted_actions=36,
        late_actions=10,
        replaced_actions=10,
    )
    assert consistent(report)


def test_blending_weighs_older_chunks_more() -> None:
    rules = settings(seam=Seam.BLEND, decay=math.log(2), replan_ticks=2)
    robot, report = play(rules, latencies(0.0), 8)
    # Of three chunks from tick 4 on, weighted 1, 1/2, 1/4: (4 + 102/2 + 200/4) / (7/4) = 60.
    expected = [0, 1, (2 + 100 / 2) / 1.5, (3 + 101 / 2) / 1.5, 60, 61, 160, 161]
    executed = [float(command.action[0]) for command in robot.commands if command.action is not None]
    assert executed == pytest.approx(expected, abs=1e-12)
    assert [command.chunk for command in robot.commands] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert report.counters == LoopCounters(
        ticks=8, executed=8, requests=4, accepted=4, accepted_actions=24, replaced_actions=12
    )
    assert consistent(report)


def test_what_is_further_ahead_than_the_capacity_is_cut_and_counted() -> None:
    robot, report = play(settings(capacity=4, deadline_ticks=2), latencies(0.0, 150.0), 14)
    assert robot.story() == "0 1 2 3 =3 =3 100 101 102 103 202 203 204 205"
    assert report.counters == LoopCounters(
        ticks=14, executed=12, held=2, requests=4, accepted=3, accepted_actions=18, late_actions=2, cut_actions=4
    )
    assert consistent(report)
