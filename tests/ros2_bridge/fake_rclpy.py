"""The few rclpy calls that the bridge makes, as strict as rclpy: a stand-in where no ROS is installed.

Behaviour is that of rclpy's sources (Humble to Jazzy): the state machine of managed nodes with its error processing,
static parameter types, ranges and overrides, empty lists that are taken for bytes, messages that refuse what their
fields are not, names that are remapped where entities are made and nowhere else, a context without which nothing is
sent and that rclpy's own signal handlers shut down. Everything on one bus within the process; timers fire when a test
says so.
"""

from __future__ import annotations

import array
import enum
import signal
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rosbags.interfaces import Nodetype

from ros2_bridge.messages import MessageTypes

_TYPES = MessageTypes("jazzy")
BUS: dict[str, list[Any]] = defaultdict(list)
"""Topic -> subscriptions."""
PUBLISHERS: dict[str, list[Any]] = defaultdict(list)
SENT: dict[str, list[Any]] = defaultdict(list)


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

    def ok(self) -> bool:
        return self._up

    def init(self, *, signal_handler_options: SignalHandlerOptions = SignalHandlerOptions.ALL) -> None:
        assert not self._up, "Context.init() must only be called once"
        self._up = True
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


class Type(enum.Enum):
    NOT_SET, BOOL, INTEGER, DOUBLE, STRING, BYTE_ARRAY, BOOL_ARRAY, INTEGER_ARRAY, DOUBLE_ARRAY, STRING_ARRAY = range(
        10
    )

    @classmethod
    def from_parameter_value(cls, value: Any) -> Type:
        plain = {type(None): cls.NOT_SET, bool: cls.BOOL, int: cls.INTEGER, float: cls.DOUBLE, str: cls.STRING}
        if type(value) in plain:
            return plain[type(value)]
        if isinstance(value, list | tuple | array.array):
            # rclpy asks for bytes first, and all of nothing are bytes.
            for kind, made in ((bytes, 5), (bool, 6), (int, 7), (float, 8), (str, 9)):
                if all(type(each) is kind for each in value):
                    return cls(made)
        raise TypeError(f"{value!r} is no parameter value")


class Parameter:
    Type = Type

    def __init__(self, name: str, type_: Type | None = None, value: Any = None) -> None:
        self.name, self.value = name, value
        self.type_ = Type.from_parameter_value(value) if type_ is None else type_


class ParameterRefused(Exception):
    """rclpy's InvalidParameterType- and ValueException."""


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


class LifecycleNode:
    def __init__(
        self,
        node_name: str,
        *,
        namespace: str = "/",
        parameter_overrides: list[Parameter] | None = None,
        cli_args: list[str] | None = None,
    ) -> None:
        assert CONTEXT.ok(), "rclpy.init() has not been called"
        self.context = CONTEXT
        self._remapped = dict(each.split(":=") for each in cli_args or [] if ":=" in each)
        self.label = "unconfigured"
        self._name, self._namespace = node_name, namespace
        self._overrides = {each.name: each for each in parameter_overrides or []}
        self._parameters: dict[str, Parameter] = {}
        self.descriptors: dict[str, Any] = {}
        self._on_set: list[Callable[[list[Parameter]], Any]] = []
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

    def declare_parameter(self, name: str, value: Any, descriptor: Any) -> Parameter:
        assert name not in self._parameters, f"{name} was declared"
        declared = value if isinstance(value, Type) else Type.from_parameter_value(value)
        assert descriptor is None or descriptor.type == declared.value, (name, descriptor.type, declared)
        self.descriptors[name] = descriptor
        plain = Parameter(name, Type.NOT_SET) if isinstance(value, Type) else Parameter(name, declared, value)
        self._parameters[name] = plain
        chosen = self._overrides.get(name)
        if chosen is not None:
            self._check(chosen, declared)
            self._parameters[name] = chosen
        return self._parameters[name]

    def _check(self, parameter: Parameter, declared: Type) -> None:
        if parameter.type_ is not declared:
            raise ParameterRefused(f"{parameter.name}: {declared} was declared, not {parameter.type_}")
        descriptor = self.descriptors[parameter.name]
        for allowed in [] if descriptor is None else [*descriptor.integer_range, *descriptor.floating_point_range]:
            if not allowed.from_value <= parameter.value <= allowed.to_value:
                raise ParameterRefused(f"{parameter.name}: {parameter.value} is outside its range")

    def get_parameter(self, name: str) -> Parameter:
        found = self._parameters[name]
        if found.type_ is Type.NOT_SET:
            raise ParameterRefused(f"{name} is not initialised")
        return found

    def get_parameter_or(self, name: str, alternative: Parameter) -> Parameter:
        found = self._parameters.get(name)
        return alternative if found is None or found.type_ is Type.NOT_SET else found

    def add_on_set_parameters_callback(self, callback: Callable[[list[Parameter]], Any]) -> None:
        self._on_set.append(callback)

    def set_parameters(self, parameters: list[Parameter]) -> list[Any]:
        """What the service ``set_parameters`` does: one by one, each checked before it is set."""
        results = []
        for each in parameters:
            descriptor = self.descriptors[each.name]
            try:
                self._check(each, Type.BOOL if descriptor is None else Type(descriptor.type))
            except ParameterRefused as refusal:
                results.append(SetParametersResult(successful=False, reason=str(refusal)))
                continue
            result = SetParametersResult(successful=True)
            for callback in self._on_set:
                result = callback([each])
                if not result.successful:
                    break
            if result.successful:
                self._parameters[each.name] = each
            results.append(result)
        return results

    def set_parameters_atomically(self, parameters: list[Parameter]) -> Any:
        """What the service of that name does: all of them, or none; descriptors are left to ``set_parameters``."""
        for callback in self._on_set:
            if not (result := callback(parameters)).successful:
                return result
        self._parameters |= {each.name: each for each in parameters}
        return SetParametersResult(successful=True)

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

    def get_logger(self) -> Any:
        return SimpleNamespace(error=self.errors.append)

    def destroy_node(self) -> None:
        for entity in list(self.entities):
            self._destroy(entity)


class SetParametersResult:
    def __init__(self, successful: bool = False, reason: str = "") -> None:
        self.successful, self.reason = successful, reason


def _record(*names: str) -> Any:
    """Return a class that keeps exactly these keyword arguments."""

    def __init__(self: Any, **given: Any) -> None:  # noqa: N807 - of the class below
        assert given.keys() <= set(names), given
        self.__dict__ |= {"integer_range": [], "floating_point_range": []} | given

    return type("Record", (), {"__init__": __init__})


_CODES = {"float64": "d", "float32": "f", "uint8": "B", "int8": "b", "int32": "i", "uint32": "I"}
_NAMES = {"float64": "double", "float32": "float", "byte": "octet", "bool": "boolean"}


def _message_type(type_name: str) -> Any:
    """Return a message class as strict as rclpy's generated ones."""
    fields = _TYPES.fields[type_name][1]

    def __init__(self: Any, **given: Any) -> None:  # noqa: N807 - of the class below
        assert given.keys() <= {name for name, _ in fields}, f"{type_name} has no {given.keys()}"
        for name, kind in fields:
            value = given.get(name, _default(kind))
            assert _fits(kind, value), f"{type_name}.{name} takes no {value!r}"
            setattr(self, name, value)

    def names(cls: Any) -> dict[str, str]:
        return {name: _written(kind) for name, kind in fields}

    body = {"__init__": __init__, "get_fields_and_field_types": classmethod(names), "type_name": type_name}
    return type(type_name.rsplit("/", 1)[-1], (), body)


def _default(kind: Any) -> Any:
    match kind:
        case (Nodetype.NAME, name):
            return MESSAGES[name]()
        case (Nodetype.BASE, ("string", _)):
            return ""
        case (Nodetype.BASE, ("byte", _)):
            return b"\0"
        case (Nodetype.BASE, (base, _)):
            return {"bool": False}.get(base, 0.0 if base.startswith("float") else 0)
        case (_, ((Nodetype.BASE, (base, _)), _)) if base in _CODES:
            return array.array(_CODES[base])
        case _:
            return []


def _fits(kind: Any, value: Any) -> bool:
    match kind:
        case (Nodetype.NAME, name):
            return isinstance(value, MESSAGES[name])
        case (Nodetype.BASE, ("string", _)):
            return isinstance(value, str)
        case (Nodetype.BASE, ("byte", _)):
            return isinstance(value, bytes) and len(value) == 1
        case (Nodetype.BASE, (base, _)):
            wanted = {"bool": bool}.get(base, float if base.startswith("float") else int)
            return isinstance(value, wanted) and (base != "uint32" or 0 <= value < 2**32)
        case (_, ((Nodetype.BASE, (base, _)), _)) if base in _CODES:
            # The fast way in: anything else is looked at value by value, 50 ms for an image.
            return isinstance(value, array.array) and value.typecode == _CODES[base]
        case (_, (inner, _)):
            return isinstance(value, list) and all(_fits(inner, each) for each in value)
        case _:
            return False


def _written(kind: Any) -> str:
    match kind:
        case (Nodetype.BASE, (base, _)):
            return _NAMES.get(base, base)
        case (Nodetype.NAME, name):
            return name.replace("/msg/", "/")
        case (_, (inner, _)):
            return f"sequence<{_written(inner)}>"
        case _:
            raise AssertionError(kind)


_PACKAGES = (
    "builtin_interfaces",
    "std_msgs",
    "geometry_msgs",
    "sensor_msgs",
    "trajectory_msgs",
    "diagnostic_msgs",
    "rosgraph_msgs",
)
MESSAGES = {name: _message_type(name) for name in _TYPES.fields if name.split("/")[0] in _PACKAGES}


def to_rclpy(message: Any) -> Any:
    """Return a message of rosbags as the middleware would hand it to rclpy."""
    made = {}
    for name, kind in _TYPES.fields[message.__msgtype__][1]:
        value = getattr(message, name)
        if hasattr(value, "__msgtype__"):
            value = to_rclpy(value)
        elif isinstance(value, np.ndarray):
            value = array.array(_CODES[value.dtype.name], value.tobytes())
        elif isinstance(value, list):
            value = [to_rclpy(each) if hasattr(each, "__msgtype__") else each for each in value]
        elif _written(kind) == "octet":
            value = bytes([value])
        made[name] = value
    return MESSAGES[message.__msgtype__](**made)


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
            "ParameterDescriptor": _record(
                "name", "type", "description", "additional_constraints", "integer_range", "floating_point_range"
            ),
            "IntegerRange": _record("from_value", "to_value", "step"),
            "FloatingPointRange": _record("from_value", "to_value", "step"),
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
        module: ModuleType = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ros2_bridge.rclpy_node", raising=False)


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
