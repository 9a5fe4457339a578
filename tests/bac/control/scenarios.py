"""A loop on the virtual clock, 10 Hz, whose actions name themselves: action i of chunk n is ``100 n + i``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bac.control import (
    Command,
    CommandKind,
    ControlLoop,
    LoopReport,
    LoopSettings,
    Observation,
    Request,
    SimulatedInference,
    VirtualClock,
)

MS = 1_000_000
LENGTH = 6
STALL, CRASH = float("inf"), float("nan")


def named_actions(request: Request) -> np.ndarray:
    return np.arange(LENGTH, dtype=np.float64)[:, None] + 100.0 * request.number


def settings(**changes: object) -> LoopSettings:
    return LoopSettings(**{"rate_hz": 10.0, "replan_ticks": 4, **changes})


class Robot:
    """Writes down what it is told; its sensor gives an observation per tick, or what ``seen`` says."""

    def __init__(self, clock: VirtualClock, seen: Callable[[int], Observation | None] | None = None) -> None:
        self.clock, self.seen, self.ticks = clock, seen, 0
        self.commands: list[Command] = []
        self.times: list[int] = []

    def observe(self) -> Observation | None:
        self.ticks += 1
        return Observation(None, self.clock.now_ns()) if self.seen is None else self.seen(self.ticks - 1)

    def execute(self, command: Command) -> None:
        self.commands.append(command)
        self.times.append(self.clock.now_ns())

    def story(self) -> str:
        """Return per tick what was executed: a number, ``=number`` for a held one, ``.`` waiting, ``!`` stopped."""
        signs = {CommandKind.EXECUTE: "", CommandKind.HOLD: "=", CommandKind.WAIT: ".", CommandKind.STOP: "!"}
        return " ".join(signs[c.kind] + ("" if c.action is None else f"{c.action[0]:g}") for c in self.commands)


class Leaping(VirtualClock):
    """A clock that is somewhere else after the n-th sleep."""

    def __init__(self, sleep: int, by_ms: float) -> None:
        super().__init__(10_000 * MS)
        self._left, self._by_ns = sleep, round(by_ms * MS)

    def sleep_until_ns(self, when_ns: int) -> None:
        super().sleep_until_ns(when_ns)
        self._left -= 1
        if self._left == 0:
            self._now_ns += self._by_ns


def latencies(*trace_ms: float) -> Callable[[Request], float]:
    """Return the latency of each request in turn, the last one for all that follow."""
    return lambda request: trace_ms[min(request.number, len(trace_ms) - 1)]


def play(
    rules: LoopSettings,
    latency: Callable[[Request], float],
    ticks: int,
    *,
    predict: Callable[[Request], np.ndarray] = named_actions,
    seen: Callable[[int], Observation | None] | None = None,
    clock: VirtualClock | None = None,
    **options: object,
) -> tuple[Robot, LoopReport]:
    clock = VirtualClock() if clock is None else clock
    loop = ControlLoop(rules, SimulatedInference(predict, latency, clock), clock, **options)
    robot = Robot(clock, seen)
    return robot, loop.run(robot.observe, robot.execute, ticks)


def numbers(report: LoopReport, *names: str) -> Sequence[int]:
    return [getattr(report.counters, name) for name in names]


def consistent(report: LoopReport) -> bool:
    """Return whether the counters add up as ``LoopCounters`` says: ticks, requests and actions."""
    c = report.counters
    ended = c.accepted + c.refused + c.given_up + report.in_flight
    dropped = c.late_actions + c.cut_actions + c.overslept_actions + c.dropped_at_stop
    actions = c.executed + c.replaced_actions + c.kept_actions + dropped + report.buffered
    return (
        c.ticks == c.executed + c.held + c.waited + c.stops
        and c.requests == ended
        and c.accepted_actions == actions
        and c.given_up <= c.deadline_misses <= c.requests
    )
