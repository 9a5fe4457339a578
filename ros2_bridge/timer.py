"""A timer for transports that have none of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Timer:
    """Calls from a thread of its own, at a pace, until it is closed.

    Args:
        period_s: from call to call.
        call: what is called.
    """

    def __init__(self, period_s: float, call: Callable[[], None]) -> None:
        self._period_s, self._call = period_s, call
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ros2-bridge-timer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Call no more; a second call does nothing."""
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._period_s):
            self._call()
