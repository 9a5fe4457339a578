"""Whatever happens: every action meets its own tick, everything is counted, and nothing grows."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
from reference import ReferencePlan
from scenarios import CRASH, LENGTH, MS, STALL, consistent, named_actions, numbers, settings

from bac.control import CommandKind, ControlLoop, Degradation, Observation, Request, Seam, SimulatedInference
from bac.control import VirtualClock as Clock

TICKS, REST_AGE_MS, GAP_MS = 390, 700.0, 250.0


class Told:
    """What should happen, worked out beside a loop from when its chunks were asked for and when they came."""

    def __init__(self, loop: ControlLoop, clock: Clock, plan: ReferencePlan) -> None:
        self.loop, self.clock, self.plan = loop, clock, plan
        self.asked: dict[int, tuple[int, float, int]] = {}
        self.finished: dict[int, float] = {}
        self.acted: set[int] = set()
        self.looks: list[tuple[int, int]] = []
        self.executed_tick = self.stale_tick = -1

    def submitted(self, request: Request, latency_ms: float) -> float:
        self.asked[request.number] = (request.tick, self.clock.now_ns() + latency_ms * MS, len(self.looks))
        return latency_ms

    def arrived(self, request: Request) -> np.ndarray:
        tick, chunk = self.loop.tick, named_actions(request)
        self.finished[request.number] = self.asked[request.number][1]
        self.plan.forget_before(tick)
        rested = self.executed_tick < request.tick and not self.plan.ticks
        first = tick if rested else request.tick
        age_ns = self.clock.now_ns() - request.observation.stamp_ns
        outlived = rested and first > request.tick and age_ns > REST_AGE_MS * MS
        if request.tick > self.stale_tick and not outlived:
            committed = 0 if request.committed is None else len(request.committed)
            self.plan.put(request.number, first, chunk[:, 0], tick, committed)
        return chunk

    def look(self) -> None:
        """Note that the loop asks for answers now."""
        self.looks.append((self.clock.now_ns() // (100 * MS), self.clock.now_ns()))

    def act(self, stale: bool) -> tuple[int, float] | None:
        """Return chunk and action that this tick should execute."""
        tick = self.loop.tick
        self.acted.add(tick)
        self.look()
        due = self.plan.take(tick)
        if stale:
            self.plan.ticks.clear()
            self.stale_tick = tick
            return None
        self.executed_tick = self.executed_tick if due is None else tick
        return due

    def misses(self, deadline_ticks: int) -> int:
        """Return how many chunks were not there in time: at the last look in the deadline tick, or when it began."""
        missed, last = 0, max(self.asked)
        for number, (tick, _, before) in self.asked.items():
            deadline = tick + deadline_ticks
            if number in self.finished:
                looked = [at for on, at in self.looks[before:] if on == deadline]
                missed += self.finished[number] > max([deadline * 100 * MS, *looked])
            else:
                missed += number < last or not self.loop.report().in_flight or self.loop.tick >= deadline
        return missed


@pytest.mark.parametrize("seed", range(36))
def test_whatever_happens_every_action_meets_its_own_tick(seed: int) -> None:
    """No action before or after its tick, none from before a gap, none twice, order kept, all bounded and counted."""
    draw = random.Random(seed)
    trace = [draw.choice([0, 30, 80, 170, 400, 900, STALL, CRASH]) for _ in range(50)]
    seam = list(Seam)[seed % 3]
    rules = settings(
        seam=seam,
        capacity=draw.choice([3, 5, 8]),
        deadline_ticks=draw.randint(0, 3),
        stall_ms=950.0,
        restarts=1000,
        rest_age_ms=REST_AGE_MS,
        observation_age_ms=GAP_MS if seed % 2 else None,
    )
    gaps = {tick for tick in range(TICKS + 5) if draw.random() < 0.2}
    clock = Clock()

    def predict(request: Request) -> np.ndarray:
        return told.arrived(request)

    inference = SimulatedInference(predict, lambda r: told.submitted(r, trace[r.number % 50]), clock)
    loop = ControlLoop(rules, inference, clock)
    told = Told(loop, clock, ReferencePlan(rules.capacity, seam))
    executed: list[int] = []
    newest, woken_ns = 0, 0
    while loop.tick < TICKS:
        before, executed_before = loop.tick, told.executed_tick
        tick = loop.wait()
        # The tick after the last, or the one that is on for who slept too long.
        assert tick == max(before + 1, woken_ns // (100 * MS))
        assert clock.now_ns() == max(tick * 100 * MS, woken_ns)
        if tick not in gaps:
            newest = clock.now_ns()
        clock.advance_ns(draw.choice([0, 0, 0, 25 * MS, 130 * MS]))
        told.look()
        loop.sense(None if tick in gaps else Observation(None, newest))
        clock.advance_ns(draw.choice([0, 0, 0, 25 * MS, 290 * MS]))
        command = loop.act()
        due = told.act(rules.observation_age_ms is not None and clock.now_ns() - newest > GAP_MS * MS)
        tick = clock.now_ns() // (100 * MS)
        assert command.tick == loop.tick == tick
        assert loop.report().buffered == len(told.plan.ticks) <= rules.capacity
        assert (command.kind is CommandKind.EXECUTE) == (due is not None)
        if due is not None:
            assert (command.chunk, float(command.action[0])) == (due[0], pytest.approx(due[1], abs=1e-9))
            if seam is not Seam.BLEND:
                executed.append(int(command.action[0]))
                number, index = divmod(executed[-1], 100)
                # Only a robot that has been at rest since it was asked may begin a chunk later than it was due.
                begins = number not in {each // 100 for each in executed[:-1]}
                asked = told.asked[number][0]
                assert not begins or tick == asked + index or executed_before < asked
        woken_ns = clock.now_ns()
        if draw.random() < 0.2:
            clock.advance_ns(draw.choice([draw.randrange(70), draw.randrange(100, 400)]) * MS)
            woken_ns = clock.now_ns()
    assert executed == sorted(set(executed))
    report = loop.report()
    assert consistent(report)
    assert report.counters.deadline_misses == told.misses(rules.deadline_ticks)
    assert report.counters.skipped == loop.tick + 1 - len(told.acted)
    # Else the run would not have shown what it is for.
    assert min(numbers(report, "executed", "skipped", "given_up", "late_actions", "overslept_actions")) > 0
    assert report.counters.cut_actions > 0 or rules.capacity > LENGTH


def test_an_hour_of_virtual_time_in_constant_memory() -> None:
    draw = random.Random(0)
    trace = [draw.choice([20.0, 60.0, 150.0, 350.0, STALL, CRASH]) for _ in range(1009)]
    rules = settings(stall_ms=1000.0, restarts=10**6, degradation=Degradation(levels=3))
    clock = Clock()
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
