"""Time in whole nanoseconds on a clock that is passed in, and the grid of ticks on it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

from bac.errors import InvalidInput, sentence

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000


class Clock(Protocol):
    """A monotonic clock; only differences of its readings mean something."""

    def now_ns(self) -> int:
        """Return the time, nanoseconds."""

    def sleep_until_ns(self, when_ns: int) -> None:
        """Return when the clock reads ``when_ns`` or later; at once if it does already."""


class MonotonicClock:
    """The system's monotonic clock; it does not follow changes of the date."""

    def now_ns(self) -> int:
        """Return ``time.monotonic_ns()``."""
        return time.monotonic_ns()

    def sleep_until_ns(self, when_ns: int) -> None:
        """Sleep; again if woken early."""
        while (remaining := when_ns - time.monotonic_ns()) > 0:
            time.sleep(remaining / NS_PER_S)


class VirtualClock:
    """A clock that stands still but when somebody sleeps or moves it: simulations and tests.

    Args:
        now_ns: what it reads at first.
    """

    def __init__(self, now_ns: int = 0) -> None:
        self._now_ns = now_ns

    def now_ns(self) -> int:
        """Return the virtual time, nanoseconds."""
        return self._now_ns

    def sleep_until_ns(self, when_ns: int) -> None:
        """Move to ``when_ns`` unless that is past."""
        self._now_ns = max(self._now_ns, when_ns)

    def advance_ns(self, by_ns: int) -> None:
        """Let ``by_ns`` pass.

        Raises:
            InvalidInput: time would run backwards.
        """
        if by_ns < 0:
            raise InvalidInput(sentence("virtual clock", expected="time to go on", got=f"{by_ns} ns", mend="add time"))
        self._now_ns += by_ns


@dataclass(frozen=True)
class TickGrid:
    """Ticks of a fixed rate: tick n begins ``n / rate`` after the origin, rounded down to a nanosecond once.

    Every time is worked out from the origin, so nothing adds up over the ticks.

    Attributes:
        origin_ns: when tick 0 begins.
        rate_hz: ticks per second, in (0, 1e6].
    """

    origin_ns: int
    rate_hz: float

    def __post_init__(self) -> None:
        require_rate(self.rate_hz)

    @cached_property
    def period_ns(self) -> Fraction:
        """Nanoseconds from tick to tick, exactly."""
        return NS_PER_S / Fraction(self.rate_hz)

    def at_ns(self, tick: int) -> int:
        """Return when a tick begins."""
        numerator, denominator = self._ratio
        return self.origin_ns + tick * numerator // denominator

    def index(self, when_ns: int) -> int:
        """Return the tick that ``when_ns`` lies in: the last one that has begun."""
        numerator, denominator = self._ratio
        # at_ns(n) <= when  <=>  n * period < when - origin + 1, for floor(x) <= y is x < y + 1.
        return -((when_ns - self.origin_ns + 1) * denominator // -numerator) - 1

    @cached_property
    def _ratio(self) -> tuple[int, int]:
        return self.period_ns.as_integer_ratio()


def require_rate(rate_hz: float) -> None:
    """Refuse a rate that is no control rate.

    Raises:
        InvalidInput: it is not in (0, 1e6].
    """
    if not 0 < rate_hz <= 1e6:
        raise InvalidInput(sentence("rate_hz", expected="more than 0, at most 1e6", got=rate_hz, mend="correct it"))


def ticks_for(latency_ms: float, rate_hz: float) -> int:
    """Return after how many ticks something is there that takes ``latency_ms``: the ticks it takes, rounded up."""
    require_rate(rate_hz)
    if not 0 <= latency_ms < float("inf"):
        raise InvalidInput(sentence("latency", expected="at least 0 ms, finite", got=latency_ms, mend="correct it"))
    grid = TickGrid(0, rate_hz)
    latency_ns = round(latency_ms * NS_PER_MS)
    tick = grid.index(latency_ns)
    return tick if grid.at_ns(tick) == latency_ns else tick + 1
