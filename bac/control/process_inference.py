"""A predictor in a process of its own: a crash of its libraries, or a kill, does not take the loop with it."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bac.control.inference import Predict, Request, answer_of
from bac.errors import InvalidInput, Unavailable, sentence


class ProcessDied(RuntimeError):
    """The process of a ``ProcessPredictor`` ended before it was ready, or before it answered."""


class ProcessPredictor:
    """A ``Predict`` that another process computes; give it to ``ThreadInference``, whose thread waits for the answer.

    The process starts with ``start`` or at the first call, and again at the first call after it died. A call while
    another still waits, from a thread that was left behind, kills the process that hangs: no answer can reach the wrong
    request. A process that still loads is not killed: the later call waits for it, and the earlier one is refused.

    Args:
        make: called in the process, returns the predictor; picklable.
    """

    def __init__(self, make: Callable[[], Predict]) -> None:
        self._make = make
        self._starting, self._changing = threading.Lock(), threading.Lock()
        self._process: Any = None
        self._pipe: Connection | None = None
        self._waiting: Connection | None = None
        self._calls = 0
        self._loading = self._ready = False

    @property
    def pid(self) -> int | None:
        """Id of the process, or None before the first call."""
        return None if self._process is None else self._process.pid

    @property
    def loading(self) -> bool:
        """Whether the process was started and has not made its predictor yet."""
        return self._loading

    def start(self) -> None:
        """Return when the process runs and has made its predictor; best before a loop begins.

        Raises:
            ProcessDied: it ended meanwhile.
        """
        self._started()

    def __call__(self, request: Request) -> np.ndarray:
        """Return float[N, Da] as ``Predict`` does.

        Raises:
            ProcessDied: the process ended meanwhile.
            BacError: the predictor refused the input, or a later call came while the process loaded.
        """
        with self._changing:
            self._calls += 1
            call = self._calls
            if self._waiting is not None:
                self.close()
                self._waiting = None
        pipe = self._started()
        with self._changing:
            if call != self._calls:
                got = "a later one while it loaded"
                raise Unavailable(sentence("inference process", expected="one request", got=got, mend="ask again"))
            self._waiting = pipe
            pid = self.pid
        try:
            pipe.send(request)
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            if self._pipe is pipe:
                self._ready = False
            raise ProcessDied(f"inference process {pid} died") from error
        finally:
            with self._changing:
                if self._waiting is pipe:
                    self._waiting = None
        if answer.failure is not None:
            raise InvalidInput(answer.failure)
        actions: np.ndarray = answer.actions
        return actions

    def close(self) -> None:
        """End the process, whatever it does."""
        self._ready = False
        if self._process is not None:
            self._process.kill()  # one that is stopped, or hangs in a library, does not end for less
            self._process.join()

    def _started(self) -> Connection:
        with self._starting:
            if self._pipe is not None and self._ready and self._process.is_alive():
                return self._pipe
            self.close()
            self._loading = True
            try:
                pipe = self._pipe = self._spawned()
                pipe.recv()
            except (EOFError, OSError) as error:
                self.close()
                raise ProcessDied(f"inference process {self.pid} died while it loaded") from error
            finally:
                self._loading = False
            self._ready = True
            return pipe

    def _spawned(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._make, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process ends the pipe
        return ours


def _serve(make: Callable[[], Predict], pipe: Connection) -> None:
    predict = make()
    pipe.send(True)  # it is ready
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(answer_of(predict, request))
