"""The latency budget: what a chunk may take on this device, and the verdict of timed calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bac.control.clock import NS_PER_MS, Clock, MonotonicClock, TickGrid, require_rate
from bac.errors import InvalidInput, sentence

FEWEST_CALLS = 100
"""Fewer have no 99th percentile but nearly their slowest."""

_BINS = 20
_BAR = 40


@dataclass(frozen=True)
class LatencyBudget:
    """What calls may take.

    Attributes:
        p99_ms: at most so long for 99 of 100 calls, milliseconds.
        rate_hz: calls begin so often, as on the robot, and a call must be over before the next begins; None lets one
            begin as soon as the other ends. Pauses matter: caches and clock frequencies cool down in them.
    """

    p99_ms: float
    rate_hz: float | None = None

    def __post_init__(self) -> None:
        longest = math.inf
        if self.rate_hz is not None:
            require_rate(self.rate_hz)
            longest = 1e3 / self.rate_hz
        if not 0 < self.p99_ms <= longest or math.isinf(self.p99_ms):
            within = "" if self.rate_hz is None else f", at most the period of {longest:g} ms"
            raise InvalidInput(
                sentence(
                    "latency budget", expected=f"more than 0 ms{within}", got=f"{self.p99_ms} ms", mend="correct it"
                )
            )

    def measure(
        self, call: Callable[[], object], *, calls: int, warmup: int = 5, clock: Clock | None = None
    ) -> LatencyVerdict:
        """Call, paced by ``rate_hz``, and judge.

        Args:
            call: what is timed; it must wait for its device itself.
            calls: timed calls, at least 100: fewer have no 99th percentile.
            warmup: untimed calls before them, not paced.
            clock: the time; by default the monotonic clock.
        """
        if calls < FEWEST_CALLS or warmup < 0:
            raise InvalidInput(
                sentence(
                    "latency calls",
                    expected=f"at least {FEWEST_CALLS} timed and 0 warm-up calls",
                    got=f"{calls} and {warmup}",
                    mend="time more calls",
                )
            )
        time = MonotonicClock() if clock is None else clock
        for _ in range(warmup):
            call()
        taken_ms, tick, overruns = [], 0, 0
        grid = None if self.rate_hz is None else TickGrid(time.now_ns(), self.rate_hz)
        for _ in range(calls):
            if grid is not None:
                time.sleep_until_ns(grid.at_ns(tick))
            began = time.now_ns()
            call()
            ended = time.now_ns()
            taken_ms.append((ended - began) / NS_PER_MS)
            # After an overrun the next call waits for a tick of the grid, as the loop does.
            if grid is not None:
                overruns += ended > grid.at_ns(tick + 1)
                tick = max(tick, grid.index(ended))
            tick += 1
        return self.judge(taken_ms, overruns)

    def judge(self, taken_ms: Sequence[float], overruns: int = 0) -> LatencyVerdict:
        """Judge calls that took so many milliseconds each, ``overruns`` of them until after the next should begin.

        Raises:
            InvalidInput: no calls, or one that took no time a call can take.
        """
        values = np.asarray(taken_ms, np.float64)
        if not values.size or not (np.isfinite(values) & (values >= 0)).all():
            raise InvalidInput(
                sentence("latencies", expected="at least one, finite, in ms", got=values.tolist(), mend="time calls")
            )
        return LatencyVerdict(self, tuple(values.tolist()), overruns)


@dataclass(frozen=True)
class LatencyVerdict:
    """Timed calls against their budget.

    Attributes:
        budget: what they were held to.
        taken_ms: of each call, in order, milliseconds.
        overruns: how many calls were not over when the next should have begun, whether they took or began too long.
    """

    budget: LatencyBudget
    taken_ms: tuple[float, ...]
    overruns: int = 0

    @property
    def p50_ms(self) -> float:
        """The median."""
        return float(np.percentile(self.taken_ms, 50))

    @property
    def p99_ms(self) -> float:
        """The 99th percentile: the least call that 99 % of the calls did not exceed."""
        return float(np.percentile(self.taken_ms, 99, method="inverted_cdf"))

    @property
    def kept(self) -> bool:
        """Whether the 99th percentile is within the budget."""
        return self.p99_ms <= self.budget.p99_ms

    def __str__(self) -> str:
        pace = "" if self.budget.rate_hz is None else f" at {self.budget.rate_hz:g} Hz, {self.overruns} overrun(s)"
        return (
            f"latency budget {'kept' if self.kept else 'exceeded'}: p99 {self.p99_ms:.1f} ms of "
            f"{self.budget.p99_ms:g} ms (p50 {self.p50_ms:.1f}, max {max(self.taken_ms):.1f}, "
            f"{len(self.taken_ms)} calls{pace})"
        )

    def histogram(self) -> str:
        """Return the calls as text: a line per bin of equal width, and where the budget is."""
        each_and_budget = (*self.taken_ms, self.budget.p99_ms)
        low, high = min(each_and_budget), max(each_and_budget)
        counts, edges = np.histogram(self.taken_ms, bins=_BINS, range=(low, max(high, low + 1e-3)))
        lines = []
        holding = max(int(np.searchsorted(edges, self.budget.p99_ms)) - 1, 0)
        for number, (count, left, right) in enumerate(zip(counts, edges[:-1], edges[1:], strict=True)):
            mark = " <- budget" if number == holding else ""
            bar = "#" * math.ceil(_BAR * count / max(counts))
            lines.append(f"{left:9.2f} - {right:9.2f} ms {count:6d} {bar}{mark}".rstrip())
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "budget": asdict(self.budget),
            "kept": self.kept,
            "p50_ms": self.p50_ms,
            "p99_ms": self.p99_ms,
            "max_ms": max(self.taken_ms),
            "overruns": self.overruns,
            "taken_ms": [round(each, 4) for each in self.taken_ms],
        }
