"""The node itself, whatever carries its messages: states, transitions, control verbs, diagnostics."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

from bac.choices import Choice
from bac.control import ThreadInference
from bac.errors import InvalidInput, Mismatch, sentence
from ros2_bridge import diagnostics
from ros2_bridge.diagnostics import Level
from ros2_bridge.driver import Driver, DriverState, MakeInference, Motion, require_action_names
from ros2_bridge.intake import Intake
from ros2_bridge.mapping import require_sources
from ros2_bridge.node_clock import NodeClock, SimulatedTime
from ros2_bridge.output import Output, open_output
from ros2_bridge.policy import Load, ReadyPolicy, load
from ros2_bridge.settings import NodeSettings
from ros2_bridge.transport import EVENT, SENSOR, STATUS, Handle, Transport

DIAGNOSTICS_PERIOD_S = 1.0


class NodeState(Choice):
    """The primary states of a managed node."""

    UNCONFIGURED = "unconfigured"
    INACTIVE = "inactive"
    ACTIVE = "active"
    FINALIZED = "finalized"


class PolicyCore:
    """A managed node: ``configure`` loads and warms everything, ``activate`` only moves data.

    A transition that is refused raises and leaves the node where it was, so that it can be tried again.

    Args:
        transport: carries the messages.
        clock: the node's; ``SimulatedTime`` follows ``/clock``.
        load: makes the policy.
        make_inference: see ``Driver``.
    """

    def __init__(
        self,
        transport: Transport,
        clock: NodeClock,
        load: Load = load,
        make_inference: MakeInference = ThreadInference,
    ) -> None:
        self._transport, self._clock, self._load, self._make_inference = transport, clock, load, make_inference
        self._lock = threading.RLock()
        self._state = NodeState.UNCONFIGURED
        self._policy: ReadyPolicy | None = None
        self._settings: NodeSettings | None = None
        self._intake: Intake | None = None
        self._output: Output | None = None
        self._driver: Driver | None = None
        self._cache: str | None = None
        self._handles: list[Handle] = []
        self._told_counts: Mapping[str, int] = {}
        self._refused_requests, self._last_request = 0, ""
        self._status = transport.publisher("~/status", "std_msgs/msg/String", STATUS)
        self._diagnostics = transport.publisher("/diagnostics", "diagnostic_msgs/msg/DiagnosticArray", EVENT)
        self._timer = transport.every(DIAGNOSTICS_PERIOD_S, self.publish_diagnostics)
        self._clock_topic: Handle | None = None
        if isinstance(clock, SimulatedTime):
            self._clock_topic = transport.subscribe(
                "/clock", "rosgraph_msgs/msg/Clock", SENSOR, partial(_set_time, clock), lambda told: None
            )
        self.publish_status(DriverState())

    @property
    def state(self) -> NodeState:
        """The state it is in."""
        return self._state

    @property
    def policy(self) -> ReadyPolicy | None:
        """What it computes chunks with, from ``configure`` to ``cleanup``."""
        return self._policy

    @property
    def driver(self) -> Driver | None:
        """What drives the robot, while the node is active."""
        return self._driver

    def configure(self, parameters: Mapping[str, Any]) -> None:
        """Check parameters, load, build and warm the policy, open the topics.

        Args:
            parameters: name -> value; those not given have their defaults.

        Raises:
            BacError: something is missing or does not fit; the node stays unconfigured.
        """
        with self._lock:
            self._require(NodeState.UNCONFIGURED)
            settings = NodeSettings.read(parameters)
            policy = self._load(settings)
            require_sources(settings.sources, policy.observation)
            require_action_names(settings, policy.action_dim)
            intake = Intake(
                settings.sources,
                policy.observation,
                self._clock,
                silence_ms=settings.values["observation_age_ms"],
                ahead_ms=settings.values["ahead_ms"],
            )
            loop = settings.loop(policy.action_steps, policy.slowest_ms, len(policy.caches))
            try:
                self._open(settings, intake, loop.replan_ticks + loop.deadline_ticks)
            except BaseException:  # whatever it was, Ctrl-C too: what is open is given back and the reason goes on
                self._give_back()
                raise
            self._settings, self._policy, self._intake = settings, policy, intake
            self._cache = policy.caches[0]
            self._enter(NodeState.INACTIVE)

    def activate(self) -> None:
        """Begin to drive."""
        with self._lock:
            self._require(NodeState.INACTIVE)
            policy, settings, intake, output = self._policy, self._settings, self._intake, self._output
            assert policy is not None  # set by configure
            assert settings is not None
            assert intake is not None
            assert output is not None
            driver = Driver(policy, settings, intake, self._clock, output, self.publish_status, self._make_inference)
            driver.set_cache(self._cache or policy.caches[0])
            self._driver = driver
            self._state = NodeState.ACTIVE
            driver.start()

    def deactivate(self) -> None:
        """Stop driving: what goes on by itself is ended, and nothing is sent to the robot any more."""
        with self._lock:
            self._require(NodeState.ACTIVE)
            self._end_driver()
            self._enter(NodeState.INACTIVE)

    def cleanup(self) -> None:
        """Give policy and topics back."""
        with self._lock:
            self._require(NodeState.INACTIVE)
            self._give_back()
            self._enter(NodeState.UNCONFIGURED)

    def recover(self) -> None:
        """Become unconfigured from whatever an error left."""
        with self._lock:
            self._end_driver()
            self._give_back()
            self._enter(NodeState.UNCONFIGURED)

    def shutdown(self) -> None:
        """End in any state; a second call does nothing."""
        with self._lock:
            if self._state is NodeState.FINALIZED:
                return
            self._end_driver()
            self._give_back()
            self._enter(NodeState.FINALIZED)
            own = [self._timer, self._status, self._diagnostics, self._clock_topic]
        for each in own:
            if each is not None:
                each.close()

    def reset(self) -> None:
        """Begin a new episode.

        Raises:
            Mismatch: the node is not active, or what drives has died.
        """
        with self._lock:
            self._require(NodeState.ACTIVE)
            assert self._driver is not None  # while it is active
            self._driver.reset()

    def set_cache(self, cache: str) -> str:
        """Use another schedule from the next chunk on; return its full name.

        Raises:
            InvalidInput: the node is not configured.
            Mismatch: the schedule was not built by ``configure``.
        """
        with self._lock:
            policy = self._policy
            if policy is None:
                raise InvalidInput(sentence("set_cache", expected="a configured node", got=self._state, mend="wait"))
            self._cache = policy.caches[policy.index(cache)]
            if self._driver is not None:
                self._driver.set_cache(self._cache)
            else:
                self.publish_status(DriverState(cache=self._cache))
            return self._cache

    def refuse_request(self, told: str) -> None:
        """Count a request that was refused, and tell it in diagnostics."""
        self._refused_requests += 1
        self._last_request = told

    def publish_status(self, driving: DriverState) -> None:
        """Latch what is going on, as JSON in a ``std_msgs/String``."""
        told = {
            "state": str(self._state),
            "motion": str(driving.motion),
            "reason": driving.reason,
            "cache": driving.cache,
            "episode": driving.episode,
        }
        self._status.publish(diagnostics.status_message(self._transport.make, told))

    def publish_diagnostics(self) -> None:
        """Publish counters and latencies; called once a second."""
        values = self.figures()
        level, told = self._judged()
        device = "" if self._policy is None else self._policy.device
        make, name = self._transport.make, self._transport.node_name
        message = diagnostics.diagnostics_message(make, self._clock.ros_ns(), name, device, level, told, values)
        self._diagnostics.publish(message)

    def figures(self) -> dict[str, object]:
        """Return every figure that diagnostics have."""
        figures: dict[str, object] = {"state": str(self._state), "transport": self._transport.name}
        figures |= {"refused_requests": self._refused_requests, "last_refused_request": self._last_request}
        figures |= getattr(self._transport, "figures", {})
        policy, intake, output, driver = self._policy, self._intake, self._output, self._driver
        if policy is not None:
            figures |= {
                "task": policy.task,
                "cache": self._cache if driver is None else driver.cache,
                "executor": policy.executor,
            }
        if driver is not None:
            report = driver.report()
            figures |= {"motion": str(driver.state.motion), "reason": driver.state.reason}
            figures |= {f"latency_{name}_ms": value for name, value in driver.latency_ms().items() if name != "count"}
            figures |= {f"ticks_{name}" if name in _TICKS else name: n for name, n in driver.counters().items()}
            if report is not None:
                figures |= _spread("observation_age", report.observation_age_ms)
                figures |= _spread("action_age", report.action_age_ms) | _spread("jitter", report.jitter_ms)
                figures["last_refused_chunk"] = report.counters.last_refusal or ""
        if output is not None and intake is not None:
            figures |= {"sent": output.sent, "received": intake.received}
            figures |= {f"refused_{kind}": count for kind, count in intake.refused.items()}
            figures["last_refused_message"] = intake.last_refusal
        return figures

    def _judged(self) -> tuple[Level, str]:
        """Return the level and its reason: what is wrong now, or went wrong since the last time."""
        driver, intake = self._driver, self._intake
        if driver is None or intake is None:
            return Level.OK, str(self._state)
        counters = driver.counters()
        now = {"refused": sum(intake.refused.values()), "misses": counters["deadline_misses"]}
        now["stale"] = counters["stale"]
        grown = {name for name, count in now.items() if count > self._told_counts.get(name, 0)}
        self._told_counts = now
        motion, reason = driver.state.motion, driver.state.reason
        if motion is Motion.STOPPED:
            return Level.ERROR, reason
        if "stale" in grown or (motion is Motion.WAITING and intake.missing):
            return Level.STALE, reason or "the newest observation was stale"
        if "refused" in grown:
            return Level.WARN, intake.last_refusal
        return (Level.WARN, "chunks miss their deadline") if "misses" in grown else (Level.OK, str(motion))

    def _open(self, settings: NodeSettings, intake: Intake, chunk_ticks: int) -> None:
        self._output = open_output(settings, self._transport, self._clock, chunk_ticks)
        for topic, type_name in intake.topics.items():
            receive, malformed = partial(intake.receive, topic), partial(intake.malformed, topic)
            self._handles.append(self._transport.subscribe(topic, type_name, SENSOR, receive, malformed))

    def _enter(self, state: NodeState) -> None:
        self._state = state
        self.publish_status(DriverState(cache=self._cache or ""))

    def _end_driver(self) -> None:
        if self._driver is not None:
            self._driver.stop()
            self._driver = None

    def _give_back(self) -> None:
        for handle in self._handles:
            handle.close()
        if self._output is not None:
            self._output.close()
        self._handles, self._output, self._intake = [], None, None
        self._policy = self._settings = self._cache = None
        self._told_counts = {}

    def _require(self, state: NodeState) -> None:
        if self._state is not state:
            raise Mismatch(
                sentence("transition", expected=f"a node that is {state}", got=self._state, mend="go there first")
            )


_TICKS = {"executed", "held", "waited", "skipped", "stale"}


def _spread(name: str, statistics: Mapping[str, float]) -> dict[str, object]:
    return {f"{name}_{each}_ms": statistics[each] for each in ("p50", "p99") if each in statistics}


def _set_time(clock: SimulatedTime, message: Any, source: str) -> None:
    clock.set_ns(message.clock.sec * 1_000_000_000 + message.clock.nanosec)
