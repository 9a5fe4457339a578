"""The control loop: fixed ticks on a clock, inference beside it, and a rule for everything that can be late or wrong.

::

    tick       0     1     2     3     4     5     6     7     8     9    10   ...
    sense      o0    o1    o2    o3    o4    o5    o6    o7    o8    o9   o10        the newest observation
    inference  |--- chunk 0 ---|                               |--- chunk 1 ---|     replan_ticks 8, deadline_ticks 3
    act        wait  wait  wait  c0[0] c0[1] c0[2] c0[3] c0[4] c0[5] c0[6] c0[7] ..  it rested: c0 begins when ready
                                                                     11: c1[3] ...   c1[0..2] are late: dropped

Action i of a chunk asked for at tick t is due at tick t + i. Only if the robot has been at rest since tick t is the
whole chunk due from the tick at which it arrives, unless its observation is older than ``rest_age_ms`` by then: it is
dropped whole. A tick without a fresh observation ends the plan: what is buffered is dropped, and so is the answer to a
request made at that tick or before it.
A tick that is over before ``sense`` or ``act`` came to it is skipped there and then, like one that was overslept.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bac.control.chunk_buffer import ActionChunk, ChunkBuffer, DueAction, Seam
from bac.control.clock import NS_PER_MS, Clock, TickGrid
from bac.control.degradation import Degrader
from bac.control.guards import ActionLimits, refusal_of
from bac.control.in_flight import InFlight
from bac.control.inference import Inference, Observation, Request
from bac.control.loop_types import Command, CommandKind, Fallback, LoopCounters, LoopReport, LoopSettings
from bac.control.statistics import RecentStatistics
from bac.errors import InvalidInput, sentence

Hold = Callable[[np.ndarray], np.ndarray]
"""(last executed action float[Da]) -> what keeps the robot where it is, float[Da]."""


def repeat(action: np.ndarray) -> np.ndarray:
    """Hold by the same target again: right for absolute actions, wrong for deltas and velocities."""
    return action


class ControlLoop:
    """Ticks at a fixed rate. For one thread; only ``inference`` works beside it.

    A tick is ``wait``, ``sense``, ``act``, in this order; ``run`` does all three for as long as it should.

    Args:
        settings: rate and rules.
        inference: where chunks come from.
        clock: the loop's time; observations are stamped on it.
        limits: of actions; a chunk outside is refused as a whole.
        hold: what keeps the robot where it is.
    """

    def __init__(
        self,
        settings: LoopSettings,
        inference: Inference,
        clock: Clock,
        *,
        limits: ActionLimits | None = None,
        hold: Hold = repeat,
    ) -> None:
        self._settings, self._clock = settings, clock
        self._limits, self._hold = limits, hold
        self._buffer = ChunkBuffer(settings.capacity, settings.seam, settings.decay)
        self._degrader = Degrader(settings.degradation)
        self._grid = TickGrid(clock.now_ns(), settings.rate_hz)
        self._tick = -1
        self._newest: Observation | None = None
        self._newest_tick = -1
        self._told_ns = self._grid.at_ns(0)
        self._counters = LoopCounters()
        self._flight = InFlight(settings, inference, self._counters)
        self._next_request = 0
        self._requested_stamp: int | None = None
        self._channels: int | None = None
        self._executed_tick = -1
        self._executed: np.ndarray | None = None
        self._stale_tick = -1
        self._resuming = False
        self._stopped: str | None = None
        self._jitter, self._observation_age, self._action_age = (RecentStatistics() for _ in range(3))

    @property
    def grid(self) -> TickGrid:
        """When the ticks are."""
        return self._grid

    @property
    def tick(self) -> int:
        """The tick that is on, -1 before the first."""
        return self._tick

    @property
    def stopped(self) -> str | None:
        """Why the loop stopped, a sentence, or None while it runs."""
        return self._stopped

    @property
    def level(self) -> int:
        """Which schedule chunks are asked of now, 0 the most accurate."""
        return self._degrader.level

    @property
    def inference_lost(self) -> str | None:
        """Why no chunk will come any more, a sentence, or None while one may."""
        return self._flight.lost

    def ahead(self, count: int) -> np.ndarray:
        """Return float[n, Da], n <= count: what is due at the ticks after this one, up to the first gap."""
        return self._buffer.ahead(self._tick + 1, count)

    def start(self) -> None:
        """Let tick 0 begin now; without it, tick 0 began when the loop was made."""
        if self._tick >= 0:
            raise InvalidInput(
                sentence("control loop", expected="no tick yet", got=self._tick, mend="make another loop")
            )
        self._grid = TickGrid(self._clock.now_ns(), self._settings.rate_hz)
        self._told_ns = self._grid.at_ns(0)

    def run(
        self,
        observe: Callable[[], Observation | None],
        execute: Callable[[Command], object],
        ticks: int | None = None,
    ) -> LoopReport:
        """Tick until the loop stops, or until ``ticks`` ticks are over, skipped ones included.

        Where the last of them is overslept, the tick that is on then is the last.

        Args:
            observe: returns what was sensed since the last tick, or None; must not block.
            execute: moves the robot; must not block.
            ticks: None goes on for ever.
        """
        while self._stopped is None and (ticks is None or self._tick + 1 < ticks):
            self.wait()
            self.sense(observe())
            execute(self.act())
        return self.report()

    def wait(self) -> int:
        """Sleep until the next tick begins, or skip to the one that is on; return it."""
        due_ns = self._grid.at_ns(self._tick + 1)
        # A clock that stands before a time it has told would take as long as it jumped to come to the next tick.
        if self._now_ns() >= self._told_ns:
            self._clock.sleep_until_ns(due_ns)
        now_ns = self._now_ns()
        if not self._in_time(now_ns, due_ns):
            self._tick += 1
            return self._tick
        self._counters.skipped += self._move_on(now_ns) - 1
        self._jitter.add((now_ns - due_ns) / NS_PER_MS)
        return self._tick

    def sense(self, observation: Observation | None) -> None:
        """Take an observation, fetch what inference finished, and ask for the next chunk if it is time."""
        now_ns = self._look()
        if observation is not None:
            if observation.stamp_ns > now_ns or (self._newest and observation.stamp_ns < self._newest.stamp_ns):
                self._counters.refused_observations += 1
            else:
                # One that was sensed when the last one was may be handed over anew by a sensor that is silent.
                if self._newest is None or observation.stamp_ns > self._newest.stamp_ns:
                    self._newest_tick = self._tick
                self._newest = observation
        self._fetch(now_ns)
        if self._stopped is None and self._flight.revive(now_ns):
            self._requested_stamp, self._next_request = None, self._tick
        self._request(now_ns)

    def act(self) -> Command:
        """Return what to do in this tick, or in the one that is on if it is over."""
        now_ns = self._look()
        self._fetch(now_ns)
        missed = self._flight.missed(self._tick)
        command = self._command(now_ns)
        self._counters.ticks += 1
        change = self._degrade(missed, command)
        self._counters.degradations += change > 0
        self._counters.recoveries += change < 0
        return command

    def report(self) -> LoopReport:
        """Return counters and statistics so far."""
        return LoopReport(
            counters=self._counters.copy(),
            jitter_ms=self._jitter.to_json(),
            observation_age_ms=self._observation_age.to_json(),
            action_age_ms=self._action_age.to_json(),
            latency_ms=self._flight.latency.to_json(),
            level=self._degrader.level,
            in_flight=self._flight.request is not None,
            buffered=len(self._buffer),
            stopped=self._stopped,
        )

    def _now_ns(self) -> int:
        """Read the clock; one that has told a later time stops the loop."""
        now_ns = self._clock.now_ns()
        if now_ns < self._told_ns:
            back = f"{(now_ns - self._told_ns) / NS_PER_MS:+.3f} ms"
            self._stop(sentence("clock", expected="no time before one it has told", got=back, mend="start a new loop"))
        self._told_ns = max(now_ns, self._told_ns)
        return now_ns

    def _look(self) -> int:
        """Read the clock; a tick that is over is skipped, for whatever is due in it would be late."""
        now_ns, due_ns = self._now_ns(), self._grid.at_ns(self._tick + 1)
        if self._stopped is None and now_ns >= due_ns and self._in_time(now_ns, due_ns):
            self._counters.skipped += self._move_on(now_ns)
        return now_ns

    def _in_time(self, now_ns: int, due_ns: int) -> bool:
        """Return whether the clock may tell this where a tick was due; if not it has jumped, and the loop stops."""
        late_ns = now_ns - due_ns
        if now_ns >= self._told_ns and 0 <= late_ns <= self._settings.jump_ms * NS_PER_MS:
            return True
        bound = f"a time at most {self._settings.jump_ms:g} ms after it was due"
        self._stop(sentence("clock", expected=bound, got=f"{late_ns / NS_PER_MS:+.3f} ms", mend="start a new loop"))
        return False

    def _move_on(self, now_ns: int) -> int:
        """Come to the tick that is on; count the actions of those before it, and return how many these are."""
        before, self._tick = self._tick, self._grid.index(now_ns)
        self._counters.overslept_actions += self._buffer.forget_before(self._tick)
        return self._tick - before

    def _fetch(self, now_ns: int) -> None:
        answer = self._flight.fetch(self._tick)
        if answer is None:
            return
        reason = answer.failure or refusal_of(answer.actions, self._limits, self._channels)
        if reason is not None:
            self._counters.refused += 1
            self._counters.last_refusal = reason
            self._next_request = self._tick
            return
        assert answer.actions is not None  # the guards refuse anything else
        self._channels = answer.actions.shape[1]
        self._counters.accepted += 1
        self._counters.accepted_actions += len(answer.actions)
        if self._stopped is not None:
            self._counters.dropped_at_stop += len(answer.actions)
        else:
            self._take(answer.request, answer.actions, now_ns)

    def _take(self, request: Request, actions: np.ndarray, now_ns: int) -> None:
        rested = self._executed_tick < request.tick and not len(self._buffer)
        first = self._tick if rested else request.tick
        late = first > request.tick and _older(request.observation, now_ns, self._settings.rest_age_ms)
        if late or request.tick <= self._stale_tick:
            # Nothing is buffered, in either case, so that another is asked for at once.
            self._counters.late_actions += len(actions)
            return
        self._resuming = False
        committed = 0 if request.committed is None else len(request.committed)
        chunk = ActionChunk(actions, first, request.number, request.observation.stamp_ns, committed)
        # Within act() this tick's action is still to be taken, and so it is within sense().
        taken = self._buffer.put(chunk, self._tick)
        self._counters.late_actions += taken.late
        self._counters.kept_actions += taken.kept
        self._counters.cut_actions += taken.cut
        self._counters.replaced_actions += taken.replaced

    def _degrade(self, missed: int | None, command: Command) -> int:
        """Tell the degrader whether inference was too slow, and at which level; return the change."""
        request, level = self._flight.request, self._degrader.level
        held = command.kind is CommandKind.HOLD and self._lacks_a_chunk()
        if held and request is not None and request.level != level:
            return 0  # what is waited for was asked of another level
        return self._degrader.tick(held or missed == level)

    def _lacks_a_chunk(self) -> bool:
        """Return whether it is inference that a tick without an action waits for longer than it may."""
        return not self._starved() and (not self._resuming or self._flight.overdue(self._tick))

    def _starved(self) -> bool:
        """Return whether there is nothing to ask inference about."""
        return self._flight.request is None and self._newest_tick < self._tick

    def _request(self, now_ns: int) -> None:
        newest, due = self._newest, self._tick >= self._next_request or not len(self._buffer)
        idle = self._flight.request is None and self._flight.lost is None and self._stopped is None
        if not (idle and due) or newest is None or self._stale(now_ns) or newest.stamp_ns == self._requested_stamp:
            return
        committed = None
        if self._settings.seam is Seam.INPAINT:
            ahead = self._buffer.ahead(self._tick, self._settings.deadline_ticks)
            committed = ahead if len(ahead) else None
        self._requested_stamp = newest.stamp_ns
        self._next_request = self._tick + self._settings.replan_ticks
        request = Request(self._counters.requests, self._tick, newest, self._degrader.level, committed, now_ns)
        self._flight.submit(request, self._grid.at_ns(self._tick + self._settings.deadline_ticks))

    def _stale(self, now_ns: int) -> bool:
        limit = self._settings.observation_age_ms
        return limit is not None and (self._newest is None or _older(self._newest, now_ns, limit))

    def _command(self, now_ns: int) -> Command:
        if self._stopped is not None:
            return self._stop_command()
        if self._newest is not None:
            self._observation_age.add((now_ns - self._newest.stamp_ns) / NS_PER_MS)
        due = self._buffer.take(self._tick)
        stale = self._stale(now_ns)
        self._counters.stale += stale
        if due is not None and not stale:
            return self._execute(due, now_ns)
        if self._flight.lost is not None:
            self._stop(self._flight.lost, due)
            return self._stop_command()
        reason = "the newest observation is stale" if stale else self._lacking()
        if self._executed is not None and self._settings.fallback is Fallback.STOP:
            self._stop(f"control loop at tick {self._tick}: {reason}, and the fallback is stop.", due)
            return self._stop_command()
        if stale:
            self._end_plan(due)
        if self._executed is None:
            self._counters.waited += 1
            return Command(CommandKind.WAIT, self._tick, reason=reason)
        self._counters.held += 1
        return Command(CommandKind.HOLD, self._tick, self._hold(self._executed), reason=reason)

    def _lacking(self) -> str:
        """Return why no action is due at this tick."""
        if self._flight.request is not None:
            return f"no answer since tick {self._flight.request.tick}"
        return "no new observation" if self._starved() else "no action is due"

    def _execute(self, due: DueAction, now_ns: int) -> Command:
        self._counters.executed += 1
        self._counters.tail += self._flight.overdue(self._tick)
        self._action_age.add((now_ns - due.observed_ns) / NS_PER_MS)
        self._executed, self._executed_tick = due.action, self._tick
        return Command(CommandKind.EXECUTE, self._tick, due.action, due.chunk)

    def _end_plan(self, due: DueAction | None) -> None:
        """Forget what was planned before the sensors were silent: nobody saw where the robot has been since."""
        self._counters.late_actions += self._buffer.clear() + (due is not None)
        self._stale_tick, self._resuming = self._tick, True

    def _stop(self, reason: str, due: DueAction | None = None) -> None:
        self._stopped = self._stopped or reason
        self._counters.dropped_at_stop += self._buffer.clear() + (due is not None)

    def _stop_command(self) -> Command:
        self._counters.stops += 1
        return Command(CommandKind.STOP, self._tick, reason=self._stopped or "")


def _older(observation: Observation, now_ns: int, age_ms: float) -> bool:
    return now_ns - observation.stamp_ns > age_ms * NS_PER_MS
