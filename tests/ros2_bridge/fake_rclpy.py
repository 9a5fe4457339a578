"""The few rclpy calls that the bridge makes, as strict as rclpy: a stand-in where no ROS is installed.

Behaviour is that of rclpy's sources (Humble to Jazzy): the state machine of managed nodes with its error processing,
static parameter types, ranges and overrides, empty lists that are taken for bytes, messages that refuse what their
fields are not, names that are remapped where entities are made and nowhere else, a context without which nothing is
sent and that rclpy's own signal handlers shut down. Everything on one bus within the process; timers fire when a test
says so.
"""

from __future__ import annotations

import enum
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.ros2_bridge.fake_messages import MESSAGES
from tests.ros2_bridge.fake_parameters import Parameter, ParameterTable, SetParametersResult, record

BUS: dict[str, list[Any]] = defaultdict(list)
"""Topic -> subscriptions."""
PUBLISHERS: dict[str, list[Any]] = defaultdict(list)
SENT: dict[str, list[Any]] = defaultdict(list)


BOUND = ("ros2_bridge.rclpy_transport", "ros2_bridge.rclpy_node")
"""Modules that keep what they imported from rclpy."""
WORK: list[Callable[[], None]] = []
"""What a spinning executor does, one by one; then somebody presses Ctrl-C."""


class RCLError(RuntimeError):
    """What rcl refuses."""


class ExternalShutdownException(Exception):
    """The context is down."""


SignalHandlerOptions = enum.Enum("SignalHandlerOptions", "NO SIGINT SIGTERM ALL")


class Context:
    def __init__(self) -> None:
        self._up = False
        self._handler: Any = None
        self.domain_id: int | None = None

    def ok(self) -> bool:
        return self._up

    def init(
        self,
        *,
        domain_id: int | None = None,
        signal_handler_options: SignalHandlerOptions = SignalHandlerOptions.ALL,
    ) -> None:
        if domain_id is not None and domain_id < 0:
            raise RuntimeError(f"Domain id ({domain_id}) should not be lower than zero.")
        assert not self._up, "Context.init() must only be called once"
        self._up, self.domain_id = True, domain_id
        if signal_handler_options is not SignalHandlerOptions.NO:
            self._handler = signal.signal(signal.SIGINT, self._interrupted)

    def try_shutdown(self) -> None:
        self._up = False
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _interrupted(self, number: int, frame: object) -> None:
        self.try_shutdown()
        raise KeyboardInterrupt


CONTEXT = Context()


class TransitionCallbackReturn(enum.Enum):
    SUCCESS = "transition_success"
    FAILURE = "transition_failure"
    ERROR = "transition_error"


class _State:
    def __init__(self, label: str) -> None:
        self.label = label


# label -> transition -> (state on the way, where success and failure lead).
_MACHINE = {
    ("unconfigured", "configure"): ("on_configure", "inactive", "unconfigured"),
    ("inactive", "activate"): ("on_activate", "active", "inactive"),
    ("active", "deactivate"): ("on_deactivate", "inactive", "active"),
    ("inactive", "cleanup"): ("on_cleanup", "unconfigured", "inactive"),
    ("unconfigured", "shutdown"): ("on_shutdown", "finalized", "finalized"),
    ("inactive", "shutdown"): ("on_shutdown", "finalized", "finalized"),
    ("active", "shutdown"): ("on_shutdown", "finalized", "finalized"),
}


class LifecycleNode(ParameterTable):
    def __init__(
        self,
        node_name: str,
        *,
        namespace: str = "/",
        parameter_overrides: list[Parameter] | None = None,
        cli_args: list[str] | None = None,
    ) -> None:
        assert CONTEXT.ok(), "rclpy.init() has not been called"
        super().__init__(parameter_overrides)
        self.context = CONTEXT
        self._remapped = dict(each.split(":=") for each in cli_args or [] if ":=" in each)
        self.label = "unconfigured"
        self._name, self._namespace = node_name, namespace
        self.services: dict[str, Callable[[Any, Any], Any]] = {}
        self.timers: list[Any] = []
        self.entities: list[Any] = []
        self.errors: list[str] = []
        self.declare_parameter("use_sim_time", False, None)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("trigger_"):
            raise AttributeError(name)
        return lambda: self._change_state(name.removeprefix("trigger_"))

    def _change_state(self, transition: str) -> TransitionCallbackReturn:
        if (self.label, transition) not in _MACHINE:
            raise RCLError(f"Transition {transition} is not registered for state {self.label}")
        callback, success, failure = _MACHINE[self.label, transition]
        before = _State(self.label)
        done = self._called(callback, before)
        if done is TransitionCallbackReturn.ERROR:
            recovered = self._called("on_error", before)
            self.label = "unconfigured" if recovered is TransitionCallbackReturn.SUCCESS else "finalized"
        else:
            self.label = success if done is TransitionCallbackReturn.SUCCESS else failure
        return done

    def _called(self, callback: str, before: _State) -> TransitionCallbackReturn:
        try:
            done: TransitionCallbackReturn = getattr(self, callback)(before)
        except Exception:  # noqa: BLE001 - as rclpy does
            return TransitionCallbackReturn.ERROR
        return done

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        return TransitionCallbackReturn.SUCCESS

    on_activate = on_deactivate = on_cleanup = on_shutdown = on_error = on_configure

    def create_publisher(self, message_type: Any, topic: str, qos: Any) -> Any:
        topic = self._remapped.get(topic, topic)

        def publish(message: Any) -> None:
            assert isinstance(message, message_type), f"{message} is no {message_type}"
            if not CONTEXT.ok():
                raise RCLError("Failed to publish: publisher's context is invalid")
            SENT[topic].append(message)
            for subscription in list(BUS[topic]):
                subscription.callback(message)

        made = SimpleNamespace(topic_name=topic, qos=qos, publish=publish, on=PUBLISHERS[topic])
        PUBLISHERS[topic].append(made)
        self.entities.append(made)
        return made

    def create_subscription(self, message_type: Any, topic: str, callback: Callable[[Any], None], qos: Any) -> Any:
        topic = self._remapped.get(topic, topic)
        made = SimpleNamespace(topic_name=topic, qos=qos, callback=callback, on=BUS[topic])
        BUS[topic].append(made)
        self.entities.append(made)
        return made

    def create_timer(self, period_s: float, callback: Callable[[], None]) -> Any:
        made = SimpleNamespace(period_s=period_s, callback=callback, on=self.timers)
        self.timers.append(made)
        self.entities.append(made)
        return made

    def _destroy(self, entity: Any) -> None:
        entity.on.remove(entity)
        self.entities.remove(entity)

    destroy_publisher = destroy_subscription = destroy_timer = _destroy

    def create_service(self, service_type: Any, name: str, callback: Callable[[Any, Any], Any]) -> Any:
        self.services[name] = lambda: callback(service_type.Request(), service_type.Response())
        return SimpleNamespace(name=name)

    def count_publishers(self, topic: str) -> int:
        return len(PUBLISHERS[topic])

    def get_fully_qualified_name(self) -> str:
        return f"{self._namespace.rstrip('/')}/{self._name}"

    def get_logger(self) -> Any:
        return SimpleNamespace(error=self.errors.append)

    def destroy_node(self) -> None:
        for entity in list(self.entities):
            self._destroy(entity)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the modules where ``import`` looks; gone when the test is over."""
    for table in (BUS, PUBLISHERS, SENT, WORK):
        table.clear()  # type: ignore[attr-defined]
    CONTEXT.try_shutdown()
    modules: dict[str, dict[str, Any]] = {
        "rclpy": {"init": CONTEXT.init, "try_shutdown": CONTEXT.try_shutdown, "ok": CONTEXT.ok},
        "rclpy.duration": {"Duration": lambda seconds: SimpleNamespace(seconds=seconds)},
        "rclpy.executors": {
            "ExternalShutdownException": ExternalShutdownException,
            "SingleThreadedExecutor": Executor,
        },
        "rclpy.impl": {},
        "rclpy.impl.implementation_singleton": {"rclpy_implementation": SimpleNamespace(RCLError=RCLError)},
        "rclpy.signals": {"SignalHandlerOptions": SignalHandlerOptions},
        "rclpy.lifecycle": {
            "LifecycleNode": LifecycleNode,
            "LifecycleState": _State,
            "TransitionCallbackReturn": TransitionCallbackReturn,
        },
        "rclpy.parameter": {"Parameter": Parameter},
        "rclpy.qos": {
            "QoSProfile": lambda **given: SimpleNamespace(**given),
            "ReliabilityPolicy": enum.Enum("ReliabilityPolicy", "RELIABLE BEST_EFFORT"),
            "DurabilityPolicy": enum.Enum("DurabilityPolicy", "TRANSIENT_LOCAL VOLATILE"),
            "HistoryPolicy": enum.Enum("HistoryPolicy", "KEEP_LAST KEEP_ALL"),
            "LivelinessPolicy": enum.Enum("LivelinessPolicy", "AUTOMATIC MANUAL_BY_TOPIC"),
        },
        "rclpy.serialization": {"serialize_message": lambda message: b""},
        "rcl_interfaces": {},
        "rcl_interfaces.msg": {
            "ParameterDescriptor": record(
                *("name", "type", "description", "additional_constraints", "read_only"),
                *("integer_range", "floating_point_range"),
            ),
            "IntegerRange": record("from_value", "to_value", "step"),
            "FloatingPointRange": record("from_value", "to_value", "step"),
            "SetParametersResult": SetParametersResult,
        },
        "std_srvs": {},
        "std_srvs.srv": {"Trigger": SimpleNamespace(Request=SimpleNamespace, Response=SimpleNamespace)},
    }
    for name, made in MESSAGES.items():
        package, _, short = name.split("/")
        modules.setdefault(package, {})
        modules.setdefault(f"{package}.msg", {})[short] = made
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members, __spec__=ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    for name in BOUND:
        # Set first: only what was set is taken away again, and what is imported next belongs to the stand-in.
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]


class Executor:
    """Does the work there is; what its callbacks raise, it raises, and it goes on at the next call."""

    def add_node(self, node: LifecycleNode) -> None:
        self.node = node

    def spin(self) -> None:
        while CONTEXT.ok():
            self.spin_once()

    def spin_once(self, timeout_sec: float | None = None) -> None:
        if WORK:
            WORK.pop(0)()
        else:
            signal.raise_signal(signal.SIGINT)
        if not CONTEXT.ok():
            raise ExternalShutdownException
