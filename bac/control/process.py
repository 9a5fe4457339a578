"""Process hygiene for real time: what keeps ticks on time, each optional, each reported, none required.

Nothing here is needed for a right result, and most of it needs rights that a robot's service has and a user has not. So
what the system refuses is told in the report and changes nothing.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bac.errors import InvalidInput, sentence

_LOCK_CURRENT_AND_FUTURE = 3
"""``MCL_CURRENT | MCL_FUTURE`` of Linux's mlockall."""


@dataclass(frozen=True)
class Hygiene:
    """What to ask of the system; the default asks for nothing.

    Attributes:
        cores: of the calling thread and those it starts; None leaves them.
        torch_threads: of torch's products, if torch is loaded; None leaves them.
        freeze_gc: take all that exists out of garbage collection, and collect no more by itself. Reference counting
            goes on; what lives in cycles is only freed by ``gc.collect``.
        lock_memory: keep all pages in memory.
        switch_interval_ms: how long one Python thread may keep the interpreter from another, above 0; Python's own is
            5 ms, which a tick then waits for while inference prepares its inputs. None leaves it.
        priority: SCHED_FIFO priority of the calling thread alone, in [1, 99]; None leaves the scheduler as it is.
    """

    cores: Sequence[int] | None = None
    torch_threads: int | None = None
    freeze_gc: bool = False
    lock_memory: bool = False
    switch_interval_ms: float | None = None
    priority: int | None = None

    def __post_init__(self) -> None:
        counts = [
            1 if self.torch_threads is None else self.torch_threads,
            1 if self.priority is None else self.priority,
        ]
        interval_ms = 1.0 if self.switch_interval_ms is None else self.switch_interval_ms
        fine = min(counts) >= 1 and counts[1] <= 99 and interval_ms > 0
        if not fine or (self.cores is not None and not self.cores):
            raise InvalidInput(
                sentence(
                    "process hygiene",
                    expected="cores, torch_threads of at least 1, switch_interval_ms above 0 and a priority of 1 to 99",
                    got=self,
                    mend="correct it",
                )
            )

    def apply(self) -> dict[str, str]:
        """Ask for each; return what was asked for -> ``done`` or why not."""
        asked: dict[str, Callable[[], str | None]] = {}
        if self.cores is not None:
            asked["cores"] = self._pin
        if self.torch_threads is not None:
            asked["torch_threads"] = self._limit_torch
        if self.freeze_gc:
            asked["freeze_gc"] = _freeze
        if self.lock_memory:
            asked["lock_memory"] = _lock
        if self.switch_interval_ms is not None:
            asked["switch_interval_ms"] = self._switch
        if self.priority is not None:
            asked["priority"] = self._prioritise
        return {name: _tried(attempt) for name, attempt in asked.items()}

    def _pin(self) -> None:
        os.sched_setaffinity(0, self.cores or ())

    def _limit_torch(self) -> str | None:
        torch = sys.modules.get("torch")
        if torch is None:
            return "torch is not loaded"
        torch.set_num_threads(self.torch_threads)
        return None

    def _switch(self) -> None:
        sys.setswitchinterval((self.switch_interval_ms or 5.0) / 1e3)

    def _prioritise(self) -> None:
        # Threads that it starts, inference above all, must not inherit it.
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(self.priority or 1))


def _freeze() -> None:
    gc.collect()
    gc.freeze()
    gc.disable()


def _lock() -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    return os.strerror(ctypes.get_errno()) if libc.mlockall(_LOCK_CURRENT_AND_FUTURE) else None


def _tried(attempt: Callable[[], str | None]) -> str:
    try:
        return attempt() or "done"
    except (OSError, AttributeError) as refusal:  # no right to it, or a system without it
        return str(refusal)
