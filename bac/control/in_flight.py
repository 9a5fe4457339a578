"""The one request that inference works on: held to its deadline, and given up when inference dies or is silent."""

from __future__ import annotations

from bac.control.clock import NS_PER_MS
from bac.control.inference import Answer, Inference, Request
from bac.control.loop_types import LoopCounters, LoopSettings
from bac.control.statistics import RecentStatistics
from bac.errors import sentence


class InFlight:
    """Hands requests to inference and takes their answers, one at a time. For the loop's thread.

    Args:
        settings: deadline, silence and restarts that are allowed.
        inference: where chunks come from.
        counters: the loop's; misses, requests and what became of those without a chunk are counted here.
    """

    def __init__(self, settings: LoopSettings, inference: Inference, counters: LoopCounters) -> None:
        self._settings, self._inference, self._counters = settings, inference, counters
        self._request: Request | None = None
        self._lost: str | None = None
        self._deadline_ns = 0
        self._counted = False
        self._missed: int | None = None
        self._heard_ns = 0
        self.latency = RecentStatistics()

    @property
    def request(self) -> Request | None:
        """The request that was submitted and neither answered nor given up, if there is one."""
        return self._request

    @property
    def lost(self) -> str | None:
        """Why no chunk will come any more, a sentence, or None while one may."""
        return self._lost

    def submit(self, request: Request, deadline_ns: int) -> None:
        """Let inference begin; its deadline tick begins at ``deadline_ns``."""
        self._request, self._deadline_ns, self._counted = request, deadline_ns, False
        self._counters.requests += 1
        self._inference.submit(request)

    def fetch(self, tick: int) -> Answer | None:
        """Return the answer to the request if it is there; whether it is in time is counted."""
        answer = self._inference.poll()
        if answer is None:
            return None
        request = self._request
        if request is None or answer.request.number != request.number:
            self._counters.ignored += 1
            return None
        # ``act`` of the deadline tick sees what is not there. If that tick was skipped, its beginning decides.
        if tick > self._deadline(request) and answer.finished_ns > self._deadline_ns:
            self._miss(request)
        self._request = None
        self.latency.add((answer.finished_ns - request.submitted_ns) / NS_PER_MS)
        return answer

    def revive(self, now_ns: int) -> bool:
        """Give up a request that died or stalled, start inference again if that is allowed; return whether it did."""
        if self._inference.loading:
            self._heard_ns = now_ns
        reason = None if self._request is None else self._inference.dead or self._stall(self._request, now_ns)
        if self._request is None or reason is None:
            return False
        self._miss(self._request)
        self._request = None
        self._counters.given_up += 1
        if self._counters.restarts < self._settings.restarts:
            self._counters.restarts += 1
            self._inference.restart()
        else:
            mend = "start it again or allow restarts"
            self._lost = sentence("inference", expected="an answer", got=reason, mend=mend)
        return True

    def overdue(self, tick: int) -> bool:
        """Return whether there is a request whose deadline has come."""
        return self._request is not None and tick >= self._deadline(self._request)

    def missed(self, tick: int) -> int | None:
        """Return the level of a request that missed its deadline since the last call, this tick's included, or None."""
        if self._request is not None and self.overdue(tick):
            self._miss(self._request)
        missed, self._missed = self._missed, None
        return missed

    def _miss(self, request: Request) -> None:
        """Count the request as missed, once, and keep its level for the next ``missed``."""
        if not self._counted:
            self._counted, self._missed = True, request.level
            self._counters.deadline_misses += 1

    def _deadline(self, request: Request) -> int:
        return request.tick + self._settings.deadline_ticks

    def _stall(self, request: Request, now_ns: int) -> str | None:
        age_ms = (now_ns - max(request.submitted_ns, self._heard_ns)) / NS_PER_MS
        limit = self._settings.stall_ms
        return None if limit is None or age_ms <= limit else f"none for {age_ms:.0f} ms"
