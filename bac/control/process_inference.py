"""A predictor in a process of its own: a crash of its libraries, or a kill, does not take the loop with it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bac.control.inference import Predict, Request, answer_of
from bac.errors import InvalidInput


class ProcessDied(RuntimeError):
    """The process of a ``ProcessPredictor`` ended before it answered."""


class ProcessPredictor:
    """A ``Predict`` that another process computes; give it to ``ThreadInference``, whose thread waits for the answer.

    The process starts at the first call, and again at the first call after it died. A call while another still waits,
    from a thread that was left behind, kills the process that hangs: no answer can reach the wrong request.

    Args:
        make: called in the process, returns the predictor; picklable.
    """

    def __init__(self, make: Callable[[], Predict]) -> None:
        self._make = make
        self._process: Any = None
        self._pipe: Connection | None = None
        self._waiting: Connection | None = None

    @property
    def pid(self) -> int | None:
        """Id of the process, or None before the first call."""
        return None if self._process is None else self._process.pid

    def __call__(self, request: Request) -> np.ndarray:
        """Return float[N, Da] as ``Predict`` does.

        Raises:
            ProcessDied: the process ended meanwhile.
            BacError: the predictor refused the input.
        """
        if self._waiting is not None:
            self.close()
        pipe = self._waiting = self._running()
        pid = self.pid
        try:
            pipe.send(request)
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            raise ProcessDied(f"inference process {pid} died") from error
        finally:
            if self._waiting is pipe:
                self._waiting = None
        if answer.failure is not None:
            raise InvalidInput(answer.failure)
        actions: np.ndarray = answer.actions
        return actions

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()  # one that is stopped, or hangs in a library, does not end for less
            self._process.join()

    def _running(self) -> Connection:
        if self._pipe is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(self._make, theirs), daemon=True)
            self._process.start()
            theirs.close()  # so that the end of the process ends the pipe
        return self._pipe


def _serve(make: Callable[[], Predict], pipe: Connection) -> None:
    predict = make()
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(answer_of(predict, request))
