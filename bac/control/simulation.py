"""Inference on a virtual clock: answers come when a latency trace says, so that a run repeats exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from bac.control.clock import NS_PER_MS, Clock
from bac.control.inference import Answer, Predict, Request, answer_of

Latency = Callable[[Request], float]
"""How long a request takes, milliseconds; infinite for one that stalls, NaN for one that kills the inference."""


@dataclass(frozen=True)
class _Work:
    request: Request
    ready_ns: int


class SimulatedInference:
    """Answers a request so many milliseconds of the clock after it was submitted, 0 included.

    Args:
        predict: called when the answer is fetched.
        latency: of each request.
        clock: the loop's.
    """

    def __init__(self, predict: Predict, latency: Latency, clock: Clock) -> None:
        self._predict, self._latency, self._clock = predict, latency, clock
        self._work: _Work | None = None
        self._dead: str | None = None

    @property
    def dead(self) -> str | None:
        """``"simulated crash"`` after a latency of NaN was over, until it is restarted."""
        return self._dead

    @property
    def loading(self) -> bool:
        """False: there is nothing to load."""
        return False

    def submit(self, request: Request) -> None:
        """Begin to work on a request."""
        latency_ms = self._latency(request)
        if math.isnan(latency_ms):
            self._dead = "simulated crash"
        elif math.isfinite(latency_ms):
            self._work = _Work(request, self._clock.now_ns() + round(latency_ms * NS_PER_MS))

    def poll(self) -> Answer | None:
        """Return the answer if its time has come."""
        if self._work is None or self._clock.now_ns() < self._work.ready_ns:
            return None
        work, self._work = self._work, None
        return answer_of(self._predict, work.request, lambda: work.ready_ns)

    def restart(self) -> None:
        """Forget the request and live."""
        self._work, self._dead = None, None

    def close(self) -> None:
        """Forget the request."""
        self._work = None
