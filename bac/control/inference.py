"""Inference beside the loop: a request goes in, an answer comes out later, and neither ever blocks a tick."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numpy as np

from bac.control.clock import Clock
from bac.errors import BacError


@dataclass(frozen=True)
class Observation:
    """What a policy sees.

    Attributes:
        values: whatever the predictor takes, usually key -> float32[To, channels]; the loop does not look at it.
        stamp_ns: when it was sensed, on the loop's clock.
    """

    values: Any
    stamp_ns: int


@dataclass(frozen=True)
class Request:
    """One chunk that is asked for.

    Attributes:
        number: from 0, in the order of asking.
        tick: the tick of asking; the chunk's first action is due at it.
        observation: the newest one.
        level: which schedule, 0 the most accurate.
        committed: float[n, Da], task units, the actions of ``tick`` and the n - 1 ticks after it, which will be
            executed meanwhile and stay as they are; None where there are none or the seam does not ask for them.
        submitted_ns: when, on the loop's clock.
    """

    number: int
    tick: int
    observation: Observation
    level: int
    committed: np.ndarray | None
    submitted_ns: int


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        request: the one that was asked.
        actions: float[N, Da], task units, or None.
        failure: why there are none, a sentence, or None.
        finished_ns: when the work was over, on the loop's clock; it may be fetched later.
    """

    request: Request
    actions: np.ndarray | None
    failure: str | None
    finished_ns: int


Predict = Callable[[Request], np.ndarray]
"""Returns float[N, Da], task units, the first due at ``request.tick``; raises a ``BacError`` to refuse the input."""


class Inference(Protocol):
    """Works on one request at a time. No method waits for the work."""

    @property
    def dead(self) -> str | None:
        """Why nothing will be answered any more, or None while it lives."""

    @property
    def loading(self) -> bool:
        """Whether it is being made ready to work: silence is no stall meanwhile, so this must end by itself."""

    def submit(self, request: Request) -> None:
        """Begin to work on a request; the one before it was answered, or is given up."""

    def poll(self) -> Answer | None:
        """Return what was finished since the last call, if anything."""

    def restart(self) -> None:
        """Give up what is being worked on, and live."""

    def close(self) -> None:
        """Give up."""


class ThreadInference:
    """Runs a predictor in a thread of its own.

    A refusal (``BacError``) answers the request; any other error kills the thread, which is then ``dead`` until it is
    restarted. A thread that hangs cannot be killed: ``restart`` leaves it behind, and what it may still answer is
    thrown away.

    Args:
        predict: called in that thread; it should let go of the interpreter lock while it computes. One that has to load
            first, as ``ProcessPredictor``, says so by a property ``loading``, and for how long at most it does.
        clock: the loop's; the thread stamps its answers on it.
        prepare: called first in every new thread, for instance to pin it to a core.
    """

    def __init__(self, predict: Predict, clock: Clock, prepare: Callable[[], object] = lambda: None) -> None:
        self._predict, self._clock, self._prepare = predict, clock, prepare
        self._worker = _Worker(predict, clock, prepare)

    @property
    def dead(self) -> str | None:
        """Why the thread ended, or None while it runs."""
        return self._worker.dead

    @property
    def loading(self) -> bool:
        """What the predictor says of itself, if it has such a property; else False."""
        return bool(getattr(self._predict, "loading", False))

    def submit(self, request: Request) -> None:
        """Hand a request to the thread."""
        self._worker.requests.put(request)

    def poll(self) -> Answer | None:
        """Return what the thread finished since the last call, if anything."""
        try:
            return self._worker.answers.get_nowait()
        except Empty:
            return None

    def restart(self) -> None:
        """Leave the thread behind and start another."""
        self.close()
        self._worker = _Worker(self._predict, self._clock, self._prepare)

    def close(self) -> None:
        """Let the thread end once it has finished what it works on."""
        self._worker.requests.put(None)


class _Worker:
    """A thread and its two queues."""

    def __init__(self, predict: Predict, clock: Clock, prepare: Callable[[], object]) -> None:
        self.requests: SimpleQueue[Request | None] = SimpleQueue()
        self.answers: SimpleQueue[Answer] = SimpleQueue()
        self.dead: str | None = None
        self._predict, self._clock, self._prepare = predict, clock, prepare
        threading.Thread(target=self._run, name="bac-inference", daemon=True).start()

    def _run(self) -> None:
        try:
            self._prepare()
            while (request := self.requests.get()) is not None:
                self.answers.put(answer_of(self._predict, request, self._clock.now_ns))
        # Whatever ends the thread, SystemExit included: the loop must learn why, and the thread still ends by it.
        except BaseException as error:
            self.dead = f"{type(error).__name__}: {error}"
            raise


def answer_of(predict: Predict, request: Request, finished_ns: Callable[[], int]) -> Answer:
    """Call a predictor, then ask for the time; what it refuses is an answer too."""
    try:
        actions, failure = predict(request), None
    except BacError as refusal:
        actions, failure = None, str(refusal)
    return Answer(request, actions, failure, finished_ns())
