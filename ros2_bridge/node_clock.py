"""The node's time: what its loop runs on, and what messages are stamped with."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from bac.control.clock import Clock, MonotonicClock


class NodeClock(Clock, Protocol):
    """A loop's clock that knows ROS time as well."""

    def ros_ns(self) -> int:
        """Return ROS time, nanoseconds: what header stamps are compared with."""

    def wake(self) -> None:
        """End every sleep on this clock, now."""


class SystemClock(MonotonicClock):
    """The monotonic clock for the loop, the system's date as ROS time unless that is set."""

    def __init__(self) -> None:
        self._offset_ns = 0

    def set_ros_ns(self, now_ns: int) -> None:
        """Let ROS time be ``now_ns`` and go on from there: for a recording, whose time is another."""
        self._offset_ns = now_ns - time.time_ns()

    def ros_ns(self) -> int:
        """Return nanoseconds since 1970."""
        return time.time_ns() + self._offset_ns

    def wake(self) -> None:
        """Nothing to do: no sleep is longer than a tick."""


class SimulatedTime:
    """Time as ``/clock`` tells it (``use_sim_time``), for the loop and for stamps alike."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._epoch = 0
        self._changed = threading.Condition()

    def set_ns(self, now_ns: int) -> None:
        """Let it be ``now_ns``; a jump backwards ends every sleep, and the loop that slept stops."""
        with self._changed:
            self._epoch += now_ns < self._now_ns
            self._now_ns = now_ns
            self._changed.notify_all()

    def now_ns(self) -> int:
        """Return the last time told, 0 before the first."""
        return self._now_ns

    def ros_ns(self) -> int:
        """Return the same: ROS time is the simulation's."""
        return self._now_ns

    def sleep_until_ns(self, when_ns: int) -> None:
        """Return when ``/clock`` says ``when_ns`` or later, or jumps back, or the clock is woken."""
        with self._changed:
            epoch = self._epoch
            self._changed.wait_for(lambda: self._now_ns >= when_ns or self._epoch != epoch)

    def wake(self) -> None:
        """End every sleep."""
        with self._changed:
            self._epoch += 1
            self._changed.notify_all()


def loop_ns(clock: NodeClock, stamp_ns: int) -> int:
    """Return a stamp of ROS time on the loop's clock."""
    return clock.now_ns() - (clock.ros_ns() - stamp_ns)
