"""The thread that drives the robot: ticks of the control loop, from frames to commands. Inference has its own."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from bac.choices import Choice
from bac.control import (
    Clock,
    Command,
    CommandKind,
    ControlLoop,
    Inference,
    LoopCounters,
    LoopReport,
    Observation,
    ObservationHistory,
    Predict,
    Request,
    ThreadInference,
)
from bac.control.clock import NS_PER_MS
from bac.control.statistics import RecentStatistics
from bac.errors import InvalidInput, Mismatch, sentence
from ros2_bridge.intake import Frame, Intake
from ros2_bridge.node_clock import NodeClock
from ros2_bridge.output import Output
from ros2_bridge.policy import ReadyPolicy
from ros2_bridge.settings import NodeSettings

_KEPT_LATENCIES = 4096
_WAKE_S = 0.05
_COUNTED = tuple(each.name for each in fields(LoopCounters) if each.name != "last_refusal")


MakeInference = Callable[[Predict, Clock], Inference]


class Motion(Choice):
    """What the robot is told to do."""

    RESTING = "resting"
    WAITING = "waiting"
    EXECUTING = "executing"
    HOLDING = "holding"
    STOPPED = "stopped"


_MOTIONS = {
    CommandKind.EXECUTE: Motion.EXECUTING,
    CommandKind.HOLD: Motion.HOLDING,
    CommandKind.WAIT: Motion.WAITING,
    CommandKind.STOP: Motion.STOPPED,
}


@dataclass(frozen=True)
class DriverState:
    """What is going on.

    Attributes:
        motion: what the robot is told to do.
        reason: why it does not execute.
        episode: resets since the node was activated.
        cache: schedule in use.
    """

    motion: Motion = Motion.RESTING
    reason: str = ""
    episode: int = 0
    cache: str = ""


class Driver:
    """Drives from ``start`` to ``stop``.

    Args:
        policy: computes the chunks.
        settings: parameters.
        intake: gives the frames.
        clock: the loop's.
        output: takes the commands.
        on_state: called from the driving thread with every change of state.
        make_inference: from what computes a chunk, and the loop's clock, to what computes it beside the loop.
    """

    def __init__(
        self,
        policy: ReadyPolicy,
        settings: NodeSettings,
        intake: Intake,
        clock: NodeClock,
        output: Output,
        on_state: Callable[[DriverState], None],
        make_inference: MakeInference = ThreadInference,
    ) -> None:
        self._policy, self._settings, self._intake = policy, settings, intake
        self._clock, self._output, self._on_state = clock, output, on_state
        self._loop_settings = settings.loop(policy.action_steps, policy.slowest_ms, len(policy.caches))
        self._schedule = policy.index(policy.caches[0])
        self._lock = threading.Lock()
        self._computing = threading.Lock()
        self._interrupted = threading.Event()
        self._halted = False
        self._died: str | None = None
        self._episode = 0
        self._loop: ControlLoop | None = None
        self._finished: Counter[str] = Counter()
        self._latency = RecentStatistics()
        self.latencies_ms: deque[float] = deque(maxlen=_KEPT_LATENCIES)
        self.state = DriverState(cache=policy.caches[0])
        self._inference = make_inference(self._predict, clock)
        self._thread = threading.Thread(target=self._run, name="ros2-bridge-loop", daemon=True)

    @property
    def cache(self) -> str:
        """The schedule in use: the one that was set, or a cheaper one while the loop is degraded."""
        loop = self._loop
        return self._policy.caches[self._index(0 if loop is None else loop.level)]

    def start(self) -> None:
        """Begin to drive."""
        self._thread.start()

    def stop(self) -> None:
        """Let the robot rest and send nothing more; return when the thread has ended. A second call does nothing."""
        self._halted = True
        # Again and again, for a thread that just goes to sleep misses being woken, and simulated time may stand still.
        while self._thread.is_alive():
            self._interrupt()
            self._thread.join(_WAKE_S)
        self._inference.close()

    def reset(self) -> None:
        """Begin a new episode: forget chunk, history and what came in; ``state.episode`` says when that is done.

        Raises:
            Mismatch: the thread that drives has died.
        """
        if self._died is not None:
            raise Mismatch(
                sentence("reset", expected="a loop that runs", got=self._died, mend="deactivate and activate")
            )
        with self._lock:
            self._episode += 1
        self._interrupt()

    def set_cache(self, cache: str) -> str:
        """Use another of the schedules from the next chunk on; return its name.

        Raises:
            Mismatch: it was not built.
        """
        self._schedule = self._policy.index(cache)
        return self._policy.caches[self._schedule]

    def counters(self) -> dict[str, int]:
        """Return the counters of all loops so far, by the names of ``LoopCounters``."""
        with self._lock:
            now = {} if self._loop is None else _counted(self._loop.report())
            return {name: self._finished[name] + now.get(name, 0) for name in _COUNTED}

    def report(self) -> LoopReport | None:
        """Return the report of the loop that runs, if one does."""
        loop = self._loop
        return None if loop is None else loop.report()

    def latency_ms(self) -> dict[str, float]:
        """Return count, p50, p99 and so on of what chunks took, in milliseconds."""
        return self._latency.to_json()

    def _interrupt(self) -> None:
        self._interrupted.set()
        self._intake.wake()
        self._clock.wake()

    def _predict(self, request: Request) -> np.ndarray:
        # What a worker that was left behind still computes shares its buffers with this one.
        with self._computing:
            # Not on the node's clock, which a simulation may hold.
            began = time.monotonic_ns()
            seed = self._settings.values["noise_seed"]
            actions = self._policy.chunk(
                request, self._index(request.level), None if seed < 0 else seed + self._episode
            )
            self.latencies_ms.append((time.monotonic_ns() - began) / NS_PER_MS)
            self._latency.add(self.latencies_ms[-1])
        return actions

    def _index(self, level: int) -> int:
        return min(self._schedule + level, len(self._policy.caches) - 1)

    def _run(self) -> None:
        try:
            while not self._halted:
                self._begin_episode()
                if not self._halted and self._intake.wait_complete(self._interrupted):
                    self._play()
        # Whatever it is, nobody moves the robot any more, and the node must say so; the thread still ends by it.
        except BaseException as error:
            self._died = f"{type(error).__name__}: {error}"
            self._tell(Motion.STOPPED, self._died)
            raise

    def _begin_episode(self) -> None:
        self._interrupted.clear()
        self._intake.clear()
        self._inference.restart()
        self._tell(Motion.WAITING, f"nothing came on {', '.join(self._intake.missing)} yet")

    def _play(self) -> None:
        """Tick until interrupted; after a stop that nothing but a person can mend, wait to be."""
        begins_ns = self._clock.now_ns() + round(self._settings.values["phase_ms"] * NS_PER_MS)
        self._clock.sleep_until_ns(begins_ns)
        # Time that jumped back leaves observations of a time to come, beside which none is taken.
        if self._interrupted.is_set() or self._clock.now_ns() < begins_ns:
            return
        loop = ControlLoop(
            self._loop_settings,
            self._inference,
            self._clock,
            limits=self._settings.limits,
            hold=self._settings.hold,
        )
        loop.start()
        self._loop = loop
        history = ObservationHistory(self._policy.observation_steps)
        try:
            while not self._interrupted.is_set() and loop.stopped is None:
                loop.wait()
                # Else the command of a tick that was woken for a reset would still be sent.
                if self._interrupted.is_set():
                    break
                loop.sense(_observed(self._intake.frame(), history))
                self._execute(loop.act(), loop)
        finally:
            self._output.rest()
        with self._lock:
            self._finished.update(_counted(loop.report()))
            self._loop = None
        if loop.inference_lost is not None:
            self._interrupted.wait()

    def _execute(self, command: Command, loop: ControlLoop) -> None:
        self._output.send(command, loop)
        self._tell(_MOTIONS[command.kind], command.reason)

    def _tell(self, motion: Motion, reason: str) -> None:
        state = DriverState(motion, reason, self._episode, self.cache)
        if state != self.state:
            self.state = state
            self._on_state(state)


def _observed(frame: Frame | None, history: ObservationHistory) -> Observation | None:
    if frame is None:
        return None
    history.append(frame.values)
    return Observation(history.stacked(), frame.stamp_ns)


def _counted(report: LoopReport) -> dict[str, int]:
    return {name: getattr(report.counters, name) for name in _COUNTED}


def require_action_names(settings: NodeSettings, action_dim: int) -> None:
    """Refuse a trajectory, or limits, of another number of channels than the policy's actions have.

    Raises:
        InvalidInput: they do not fit.
    """
    given = {
        "action_names": len(settings.values["action_names"]) if settings.values["output"] == "trajectory" else None,
        "action_low": None if settings.limits is None else len(settings.limits.low),
    }
    wrong = {name: count for name, count in given.items() if count not in {None, action_dim}}
    if wrong:
        raise InvalidInput(
            sentence(next(iter(wrong)), expected=f"{action_dim} channels as the policy", got=wrong, mend="correct it")
        )
