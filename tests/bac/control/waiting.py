"""Waiting, in real time, for what threads and processes do beside a loop on the virtual clock."""

from __future__ import annotations

import threading
from collections.abc import Callable

from bac.control import Observation, Request, ThreadInference
from bac.control.inference import Answer


def request(number: int = 0) -> Request:
    return Request(number, 0, Observation(None, 0), 0, None, 0)


def answer_from(inference: ThreadInference) -> Answer:
    """Wait, in real time, for what a thread does."""
    done = threading.Event()
    while (answer := inference.poll()) is None:
        assert inference.dead is None
        done.wait(0.001)
    return answer


def until(happens: Callable[[], object]) -> None:
    while not happens():
        threading.Event().wait(0.001)


class Settled(ThreadInference):
    """A thread that the loop finds finished, or dead, at the tick after it submitted."""

    def poll(self) -> Answer | None:
        if getattr(self, "waiting", False):
            kept: list[Answer] = []
            until(lambda: self.dead or kept or kept.extend(a for a in [super(Settled, self).poll()] if a))
            self.waiting = False
            return kept[0] if kept else None
        return super().poll()

    def submit(self, request: Request) -> None:
        super().submit(request)
        self.waiting = True
