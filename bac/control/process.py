"""Process hygiene for real time: what keeps ticks on time, each optional, each reported, none required.

Nothing here is needed for a right result, and most of it needs rights that a robot's service has and a user has not. So
what the system refuses is told in the report and changes nothing.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from bac.errors import InvalidInput, Unavailable, sentence

_LOCK_CURRENT_AND_FUTURE = 3
"""``MCL_CURRENT | MCL_FUTURE`` of Linux's mlockall."""

_Undo = Callable[[], object]


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
        return self._ask(ExitStack())

    @contextmanager
    def applied(self) -> Iterator[dict[str, str]]:
        """Ask for each, as ``apply``, and give it back when the block ends; to be entered and left in one thread."""
        with ExitStack() as given_back:
            yield self._ask(given_back)

    def _ask(self, given_back: ExitStack) -> dict[str, str]:
        asked: dict[str, Callable[[], _Undo]] = {}
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
        return {name: _tried(attempt, given_back) for name, attempt in asked.items()}

    def _pin(self) -> _Undo:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores or ())
        return partial(os.sched_setaffinity, 0, before)

    def _limit_torch(self) -> _Undo:
        torch = sys.modules.get("torch")
        if torch is None:
            raise Unavailable("torch is not loaded")
        before = torch.get_num_threads()
        torch.set_num_threads(self.torch_threads)
        return partial(torch.set_num_threads, before)

    def _switch(self) -> _Undo:
        before_s = sys.getswitchinterval()
        sys.setswitchinterval((self.switch_interval_ms or 5.0) / 1e3)
        return partial(sys.setswitchinterval, before_s)

    def _prioritise(self) -> _Undo:
        before = os.sched_getscheduler(0) | os.SCHED_RESET_ON_FORK, os.sched_getparam(0)
        # Threads that it starts, inference above all, must not inherit it. To take that flag back needs more rights.
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(self.priority or 1))
        return partial(os.sched_setscheduler, 0, *before)


def _freeze() -> _Undo:
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def thaw() -> None:
        gc.unfreeze()
        if collecting:
            gc.enable()

    return thaw


def _lock() -> _Undo:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_LOCK_CURRENT_AND_FUTURE):
        raise OSError(os.strerror(ctypes.get_errno()))
    return libc.munlockall


def _tried(attempt: Callable[[], _Undo], given_back: ExitStack) -> str:
    try:
        given_back.callback(attempt())
    # No right to it, a system without it, no torch (Unavailable), or a number that no core has.
    except (OSError, AttributeError, ValueError, OverflowError) as refusal:
        return str(refusal)
    return "done"
