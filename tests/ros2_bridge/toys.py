"""A policy whose chunks are arithmetic, a transport without a wire, a clock that only a test moves."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from bac.control import Clock, Inference, Predict, Request, SimulatedInference, ThreadInference
from bac.control.clock import NS_PER_MS, NS_PER_S
from ros2_bridge.conversion import header
from ros2_bridge.messages import MessageTypes
from ros2_bridge.node_clock import SimulatedTime
from ros2_bridge.policy import Load, ReadyPolicy
from ros2_bridge.transport import Transport

PATIENCE_S = 20.0
CACHES = ("bac-s10", "bac-s5", "late-s10")
PARAMETERS: dict[str, Any] = {
    "task": "toy",
    "rate_hz": 10.0,
    "phase_ms": 20.0,
    "replan_ticks": 4,
    "deadline_ticks": 1,
    "observation_age_ms": 250.0,
    "observation_keys": ["joints", "place"],
    "observation.joints.topic": "joint_states",
    "observation.joints.type": "joint_state",
    "observation.joints.names": ["shoulder", "elbow"],
    "observation.place.topic": "place",
    "observation.place.type": "pose",
    "observation.place.names": ["x", "y"],
}


def chunk(request: Request, schedule: int, seed: int | None) -> np.ndarray:
    """Return float32[8, 2]: row i is the newest place + 100 i, and which schedule computed it."""
    place = request.observation.values["place"][-1]
    return np.stack([np.array([place[0] + 100 * i, schedule], np.float32) for i in range(8)])


def policy(compute: Callable[..., np.ndarray] = chunk, **changed: Any) -> ReadyPolicy:
    values: dict[str, Any] = {
        "task": "toy",
        "observation": {"joints": (2,), "place": (2,)},
        "observation_steps": 2,
        "action_dim": 2,
        "action_steps": 4,
        "caches": CACHES,
        "methods": tuple(name.rsplit("-", 1)[0] for name in changed.get("caches", CACHES)),
        "chunk": compute,
        "slowest_ms": 1.0,
        "device": "toy device",
        "executor": "toy executor",
    }
    return ReadyPolicy(**values | changed)


def loading(compute: Callable[..., np.ndarray] = chunk, **changed: Any) -> Load:
    return lambda settings: policy(compute, **changed)


class LocalTransport:
    """Delivers within the calling thread; keeps what was published."""

    name = "local"
    node_name = "/robot/policy_node"

    def __init__(self) -> None:
        self.types = MessageTypes("jazzy")
        self.make, self.serialize = self.types.make, self.types.serialize
        self.profiles: dict[str, Any] = {}
        self.sent: dict[str, list[Any]] = defaultdict(list)
        self.listeners: dict[str, tuple[Any, Any]] = {}
        self.timers: list[Callable[[], None]] = []
        self.periods_s: list[float] = []
        self.closed: list[str] = []
        self.on_publish: Callable[[str, Any], object] = lambda topic, message: None
        self.changed = threading.Condition()

    def publisher(self, topic: str, type_name: str, profile: Any) -> Any:
        transport = self
        self.profiles[topic] = profile

        class Publisher:
            def publish(self, message: Any) -> None:
                transport.types.serialize(type_name, message)  # what is no message of the type fails here
                with transport.changed:
                    transport.sent[topic].append(message)
                    transport.changed.notify_all()
                transport.on_publish(topic, message)

            def close(self) -> None:
                transport.closed.append(topic)

        return Publisher()

    def subscribe(self, topic: str, type_name: str, profile: Any, on_message: Any, on_malformed: Any) -> Any:
        transport = self
        self.profiles[topic] = profile
        self.listeners[topic] = (on_message, on_malformed)

        class Handle:
            def close(self) -> None:
                transport.listeners.pop(topic, None)

        return Handle()

    def every(self, period_s: float, call: Callable[[], None]) -> Any:
        timers = self.timers
        timers.append(call)
        self.periods_s.append(period_s)

        class Handle:
            def close(self) -> None:
                if call in timers:
                    timers.remove(call)

        return Handle()

    def close(self) -> None:
        """Nothing is open."""

    def deliver(self, topic: str, message: Any, source: str = "robot") -> None:
        self.listeners[topic][0](message, source)

    def await_sent(self, topic: str, so: Callable[[list[Any]], bool]) -> list[Any]:
        with self.changed:
            assert self.changed.wait_for(lambda: so(self.sent[topic]), PATIENCE_S), self.sent[topic][-3:]
            return list(self.sent[topic])


class SteppedClock(SimulatedTime):
    """Stands still until the test moves it, and then waits until the loop has done what the time called for."""

    def __init__(self, changed: threading.Condition, now_ns: int = 1_000 * NS_PER_S) -> None:
        super().__init__()
        # The transport's: a test waits for the loop to sleep, or to have sent something.
        self._changed = changed
        self.set_ns(now_ns)
        self.sleeping_until: int | None = None

    def sleep_until_ns(self, when_ns: int) -> None:
        with self._changed:
            self.sleeping_until = when_ns
            self._changed.notify_all()
        super().sleep_until_ns(when_ns)
        with self._changed:
            self.sleeping_until = None
            self._changed.notify_all()

    def await_sleep(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Wait until the loop sleeps towards a time that is still to come."""
        with self._changed:
            asleep = self._changed.wait_for(
                lambda: unless() or (self.sleeping_until is not None and self.sleeping_until > self._now_ns), PATIENCE_S
            )
        assert asleep, "the loop does not sleep"

    def advance_ms(self, by_ms: float) -> None:
        self.set_ns(self.now_ns() + round(by_ms * NS_PER_MS))


class Bench:
    """A core on a local transport and a stepped clock, with a robot's sensors in the test's hand.

    Inference takes ``latency`` milliseconds of that clock, or with ``threaded`` its own time in its own thread.
    ``wrapped`` makes of the local transport the one that the core gets.
    """

    def __init__(
        self,
        load: Load | None = None,
        latency: Callable[[Request], float] = lambda request: 150.0,
        threaded: bool = False,
        wrapped: Callable[[LocalTransport], Transport] = lambda transport: transport,
    ) -> None:
        from ros2_bridge.core import PolicyCore

        self.transport = LocalTransport()
        self.clock = SteppedClock(self.transport.changed)

        def simulated(predict: Predict, clock: Clock) -> Inference:
            return SimulatedInference(predict, latency, clock)

        inference = ThreadInference if threaded else simulated
        self.core = PolicyCore(wrapped(self.transport), self.clock, load or loading(), inference)

    def drive(self, **changed: Any) -> None:
        self.core.configure(PARAMETERS | changed)
        self.core.activate()
        self.await_status(motion="waiting")

    def joints(self, age_ms: float = 0.0, names: tuple[str, ...] = ("shoulder", "elbow")) -> Any:
        make, when_ns = self.transport.make, self.clock.ros_ns() - round(age_ms * NS_PER_MS)
        position = np.array([0.5, -1.25][: len(names)])
        return make("sensor_msgs/msg/JointState", header=header(make, when_ns), name=list(names), position=position)

    def place(self, x: float = 7.0, age_ms: float = 0.0) -> Any:
        make, when_ns = self.transport.make, self.clock.ros_ns() - round(age_ms * NS_PER_MS)
        pose = make("geometry_msgs/msg/Pose", position=make("geometry_msgs/msg/Point", x=x, y=2.0))
        return make("geometry_msgs/msg/PoseStamped", header=header(make, when_ns), pose=pose)

    def sense(self, x: float = 7.0, age_ms: float = 0.0) -> None:
        self.transport.deliver("joint_states", self.joints(age_ms))
        self.transport.deliver("place", self.place(x, age_ms))

    def begin(self, x: float = 7.0, age_ms: float = 0.0) -> None:
        """Sense once, and let the loop come to its first tick."""
        self.sense(x, age_ms)
        self.clock.await_sleep()
        self.clock.advance_ms(PARAMETERS["phase_ms"])
        self.clock.await_sleep()

    def tick(self, x: float | None = 7.0, age_ms: float = 0.0) -> None:
        """Let a period pass; sense in its middle unless ``x`` is None."""
        self.clock.advance_ms(50)
        if x is not None:
            self.sense(x, age_ms)
        self.clock.advance_ms(50)
        self.clock.await_sleep(unless=lambda: self.status()["motion"] == "stopped")

    def until_missing(self, *topics: str) -> None:
        """Wait until nothing is known of these topics."""
        intake, moment = self.core._intake, threading.Event()
        assert intake is not None
        for _ in range(round(PATIENCE_S / 0.001)):
            if intake.missing == list(topics):
                return
            moment.wait(0.001)
        raise AssertionError(f"only {intake.missing} are missing")

    def until(self, so: Callable[[], bool], x: float | None = 7.0) -> None:
        """Tick until it is so; in a thread, inference answers in its own time."""
        for _ in range(100_000):
            if so():
                return
            self.tick(x)
        raise AssertionError("never")

    def actions(self) -> list[list[float]]:
        return [list(message.data) for message in self.transport.sent["action"]]

    def status(self) -> dict[str, Any]:
        import json

        return dict(json.loads(self.transport.sent["~/status"][-1].data))

    def await_status(self, **wanted: Any) -> dict[str, Any]:
        import json

        def so(sent: list[Any]) -> bool:
            return bool(sent) and wanted.items() <= json.loads(sent[-1].data).items()

        return dict(json.loads(self.transport.await_sent("~/status", so)[-1].data))


def driving(bench: Bench, **changed: Any) -> Bench:
    """Drive until the first action is executed."""
    bench.drive(**changed)
    bench.begin()
    bench.until(lambda: bench.status()["motion"] == "executing")
    return bench
