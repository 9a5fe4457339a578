"""A predictor in a process of its own: a crash of its libraries, or a kill, does not take the loop with it."""

from __future__ import annotations

import math
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bac.control.inference import Predict, Request
from bac.errors import BacError, InvalidInput, Unavailable, sentence


class ProcessDied(RuntimeError):
    """The process of a ``ProcessPredictor`` ended, or was ended, before it was ready or before it answered."""


@dataclass(frozen=True)
class _Reply:
    """What the process sends: that it is ready (none of these), a chunk, why it refused, or what it dies of."""

    actions: Any = None
    refusal: str | None = None
    death: str | None = None


_ENDING_S = 60.0
"""How long a killed process may take to end: it may hold much memory, or wait for a device."""

_UNTOLD = _Reply(death="killed, or crashed outside of Python")


class ProcessPredictor:
    """A ``Predict`` that another process computes; give it to ``ThreadInference``, whose thread waits for the answer.

    The process starts with ``start`` or at the first call. A call that finds it dead says so, and the next one starts
    it again: so a loop counts every death, and its ``restarts`` bound them. A call while another still waits, from a
    thread that was left behind, kills the process that hangs: no answer can reach the wrong request. A process that
    still loads is not killed: the later call waits for it, and the earlier one is refused.

    Args:
        make: called in the process, returns the predictor; picklable.
        load_s: a process that has not made its predictor after so many seconds of real time is killed, for a control
            loop waits while it loads. Five minutes is the default: reading weights, compiling and capturing take less,
            and a file system or a driver that hangs takes for ever.

    Raises:
        InvalidInput: ``load_s`` is not above 0 and finite.
    """

    def __init__(self, make: Callable[[], Predict], load_s: float = 300.0) -> None:
        if not 0 < load_s < math.inf:
            raise InvalidInput(sentence("load_s", expected="finite seconds above 0", got=load_s, mend="correct it"))
        self._make, self._load_s = make, load_s
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
        """Whether the process has not made its predictor yet, or the one before it is being ended."""
        return self._loading

    def start(self) -> None:
        """Return when the process runs and has made its predictor; best before a loop begins.

        Raises:
            ProcessDied: it ended meanwhile, or took longer than ``load_s``; the sentence says of what it died.
        """
        self._started()

    def __call__(self, request: Request) -> np.ndarray:
        """Return float[N, Da] as ``Predict`` does.

        Raises:
            ProcessDied: the process ended, meanwhile or since the last call; the sentence says of which exception, if
                it was one.
            BacError: the predictor refused the input, or a later call came while the process loaded.
        """
        with self._changing:
            self._calls += 1
            call = self._calls
            if self._waiting is not None:
                with self._while_loading():
                    self.close()
                self._waiting = None
            elif self._ready and not self._process.is_alive():
                self._ready = False
                raise ProcessDied(f"inference process {self.pid} died: {_UNTOLD.death}")
        pipe = self._started()
        with self._changing:
            if call != self._calls:
                got = "a later one while it loaded"
                raise Unavailable(sentence("inference process", expected="one request", got=got, mend="ask again"))
            self._waiting = pipe
            pid = self.pid
        try:
            reply = _exchanged(pipe, request)
        finally:
            with self._changing:
                if self._waiting is pipe:
                    self._waiting = None
        if reply.death is not None:
            if self._pipe is pipe:
                self._ready = False
            raise ProcessDied(f"inference process {pid} died: {reply.death}")
        if reply.refusal is not None:
            raise InvalidInput(reply.refusal)
        actions: np.ndarray = reply.actions
        return actions

    def close(self) -> None:
        """End the process, whatever it does.

        Raises:
            ProcessDied: it was killed and did not end within a minute, as one that waits for a broken driver.
        """
        self._ready = False
        if self._process is not None:
            self._process.kill()  # one that is stopped, or hangs in a library, does not end for less
            self._process.join(_ENDING_S)
            if self._process.is_alive():
                raise ProcessDied(f"inference process {self.pid} was killed and did not end within {_ENDING_S:g} s")

    @contextmanager
    def _while_loading(self) -> Iterator[None]:
        """Say so meanwhile: a predictor that is not there is not silent."""
        self._loading = True
        try:
            yield
        finally:
            self._loading = False

    def _started(self) -> Connection:
        with self._starting:
            if self._pipe is not None and self._ready and self._process.is_alive():
                return self._pipe
            with self._while_loading():
                self.close()
                pipe = self._pipe = self._spawned()
                ready = pipe.poll(self._load_s)
                death = _received(pipe).death if ready else f"killed after {self._load_s:g} s"
                if death is not None:
                    self.close()
                    raise ProcessDied(f"inference process {self.pid} died while it loaded: {death}")
            self._ready = True
            return pipe

    def _spawned(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self._make, theirs), daemon=True)
        try:
            process.start()
        except BaseException:  # as of a predictor that cannot be pickled
            ours.close()
            raise
        finally:
            theirs.close()  # so that the end of the process ends the pipe
        self._process = process
        return ours


def _exchanged(pipe: Connection, request: Request) -> _Reply:
    try:
        pipe.send(request)
    except OSError:
        return _UNTOLD
    return _received(pipe)


def _received(pipe: Connection) -> _Reply:
    try:
        reply: _Reply = pipe.recv()
    except (EOFError, OSError):
        return _UNTOLD
    return reply


def _serve(make: Callable[[], Predict], pipe: Connection) -> None:
    try:
        predict = make()
        pipe.send(_Reply())
        while (request := _asked(pipe)) is not None:
            pipe.send(_served(predict, request))
    # Whatever ends the process, SystemExit included: who waits for it must learn why, and the process still ends by it.
    except BaseException as error:
        pipe.send(_Reply(death=f"{type(error).__name__}: {error}"))
        raise


def _asked(pipe: Connection) -> Request | None:
    try:
        request: Request = pipe.recv()
    except EOFError:
        return None
    return request


def _served(predict: Predict, request: Request) -> _Reply:
    try:
        return _Reply(actions=predict(request))
    except BacError as refusal:
        return _Reply(refusal=str(refusal))
