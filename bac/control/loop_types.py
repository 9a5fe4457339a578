"""What goes into a control loop and what comes out of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from bac.choices import Choice
from bac.control.chunk_buffer import Seam
from bac.control.clock import require_rate
from bac.control.degradation import Degradation
from bac.errors import InvalidInput, sentence


class Fallback(Choice):
    """What to do at a tick without an action: ``hold`` the robot where it is, or ``stop`` the loop."""

    HOLD = "hold"
    STOP = "stop"


@dataclass(frozen=True)
class LoopSettings:
    """Rate and rules of a control loop.

    Attributes:
        rate_hz: ticks per second.
        replan_ticks: ticks from asking for a chunk to asking for the next, at least 1; more if inference takes longer.
        deadline_ticks: a chunk asked for at tick t should be there at tick t + ``deadline_ticks``; at least 0.
        seam: how a new chunk takes over.
        decay: of the weights of ``Seam.BLEND``.
        fallback: what to do where the buffer has no action for a tick.
        capacity: ticks ahead that actions are kept for.
        observation_age_ms: an older newest observation stops motion (by ``fallback``), ends the plan and is not
            inferred from; None never does.
        rest_age_ms: a chunk that comes to a robot at rest begins with its first action only while the observation it
            was made from is not older than this; else it is dropped whole, and another is asked for. The robot has not
            moved meanwhile, but the world may have. Two seconds is the default: inference slower than that leaves a
            robot of 10 Hz at rest for longer than a chunk of 16 actions moves it, and within seconds people step into
            a scene. Give more at 1 Hz and below, where a few ticks use it up; infinity if only the robot moves things.
        stall_ms: an inference that takes longer, once it is loaded, is given up; None never does. How long it may load
            is for what loads to bound, as ``ProcessPredictor`` does: meanwhile there is the tail, then the fallback,
            and ``rest_age_ms`` drops a chunk that was asked for too long before.
        restarts: how often inference that died or stalled is started again; then the chunk's tail is executed, and the
            loop stops.
        jump_ms: a clock that is further behind a tick's time, or before it, has jumped: the loop stops.
        degradation: when to use a cheaper schedule.
    """

    rate_hz: float
    replan_ticks: int
    deadline_ticks: int = 1
    seam: Seam = Seam.REPLACE
    decay: float = 0.01
    fallback: Fallback = Fallback.HOLD
    capacity: int = 64
    observation_age_ms: float | None = None
    rest_age_ms: float = 2000.0
    stall_ms: float | None = None
    restarts: int = 0
    jump_ms: float = 1000.0
    degradation: Degradation = field(default_factory=Degradation)

    def __post_init__(self) -> None:
        require_rate(self.rate_hz)
        limits = [each for each in (self.observation_age_ms, self.stall_ms) if each is not None]
        fine = self.replan_ticks >= 1 and self.deadline_ticks >= 0 and self.restarts >= 0
        if not fine or not all(each > 0 for each in (*limits, self.rest_age_ms, self.jump_ms)):
            raise InvalidInput(
                sentence(
                    "control loop",
                    expected="replan_ticks >= 1, deadline_ticks and restarts >= 0, and positive milliseconds",
                    got=self,
                    mend="correct the settings",
                )
            )


class CommandKind(Choice):
    """What a tick does: ``wait`` before the first action there ever was, ``hold`` and ``stop`` where none is due."""

    EXECUTE = "execute"
    HOLD = "hold"
    WAIT = "wait"
    STOP = "stop"


@dataclass(frozen=True)
class Command:
    """What to do in a tick.

    Attributes:
        kind: what it is.
        tick: the tick it is for, and no other.
        action: float[Da], task units, to ``execute`` or ``hold``; else None.
        chunk: number of the chunk an executed action is from.
        reason: why nothing is executed: ``no answer since tick t`` to the request made there, ``no new observation`` to
            ask about, ``no action is due`` otherwise, as after a refusal; that the newest observation is stale; or why
            the loop stopped.
    """

    kind: CommandKind
    tick: int
    action: np.ndarray | None = None
    chunk: int | None = None
    reason: str = ""


@dataclass
class LoopCounters:
    """What happened. ``ticks`` is ``executed + held + waited + stops``; with ``skipped`` it is every tick there was.

    ``requests`` is ``accepted + refused + given_up``, and one more while a request is in flight.

    ``accepted_actions`` is ``executed + late_actions + replaced_actions + kept_actions + cut_actions +
    overslept_actions + dropped_at_stop`` and what is buffered.

    Attributes:
        ticks: ticks with a command.
        skipped: ticks that the loop overslept, or came to ``sense`` or ``act`` too late in; their actions were dropped.
        executed, held, waited, stops: ticks by the kind of their command.
        tail: executed ones while the next chunk was overdue.
        stale: ticks whose newest observation was too old, or missing.
        requests: chunks asked for.
        accepted: chunks that came and were sound, late, or from before a stale tick, or not.
        refused: requests or chunks refused by predictor or guards.
        given_up: requests whose inference died or stalled.
        ignored: answers to requests that had been given up.
        deadline_misses: chunks that were not there ``deadline_ticks`` after they were asked for, those given up
            included. Where that tick was skipped, those that were not finished when it began.
        accepted_actions: actions of accepted chunks.
        late_actions: actions dropped because their tick was over when they came, because a tick was stale after they
            had been asked for, or by ``rest_age_ms``.
        replaced_actions: actions that a newer chunk replaced, or blended into its own.
        kept_actions: actions of a chunk that were not needed, for what was committed stayed.
        cut_actions: actions further ahead than the capacity.
        overslept_actions: actions dropped because their tick was skipped.
        dropped_at_stop: actions forgotten when the loop stopped.
        refused_observations: older than the one before, or from the future.
        restarts: of inference.
        degradations, recoveries: changes to a cheaper schedule, and back.
        last_refusal: why the last refused chunk was.
    """

    ticks: int = 0
    skipped: int = 0
    executed: int = 0
    held: int = 0
    waited: int = 0
    stops: int = 0
    tail: int = 0
    stale: int = 0
    requests: int = 0
    accepted: int = 0
    refused: int = 0
    given_up: int = 0
    ignored: int = 0
    deadline_misses: int = 0
    accepted_actions: int = 0
    late_actions: int = 0
    replaced_actions: int = 0
    kept_actions: int = 0
    cut_actions: int = 0
    overslept_actions: int = 0
    dropped_at_stop: int = 0
    refused_observations: int = 0
    restarts: int = 0
    degradations: int = 0
    recoveries: int = 0
    last_refusal: str | None = None

    def copy(self) -> LoopCounters:
        """Return a copy that stays as it is."""
        return replace(self)


@dataclass(frozen=True)
class LoopReport:
    """Counters and statistics of a loop, milliseconds; see ``RecentStatistics.to_json`` for the keys.

    Attributes:
        counters: what happened.
        jitter_ms: how late after its tick the loop woke.
        observation_age_ms: of the newest observation, at each tick.
        action_age_ms: of the observation behind each executed action.
        latency_ms: from asking for a chunk to when it was finished, whenever it was fetched.
        level: schedule that is on, 0 the most accurate.
        in_flight: whether a request is.
        buffered: actions in the buffer.
        stopped: why the loop stopped, or None.
    """

    counters: LoopCounters
    jitter_ms: dict[str, float]
    observation_age_ms: dict[str, float]
    action_age_ms: dict[str, float]
    latency_ms: dict[str, float]
    level: int
    in_flight: bool
    buffered: int
    stopped: str | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)
