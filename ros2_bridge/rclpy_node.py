"""The node over rclpy: a managed node (lifecycle) of a robot's ROS 2 distribution.

``set_cache`` is the parameter ``cache``: an ament_python package cannot build a service type of its own, those that ROS
ships mean other things, every tool can set a parameter, it is checked before it takes effect, and a refusal carries its
sentence::

    ros2 param set /policy_node cache bac-s10
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import rclpy
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter as RosParameter
from rclpy.signals import SignalHandlerOptions
from std_srvs.srv import Trigger

from bac.errors import BacError, InvalidInput, Unavailable, sentence
from ros2_bridge.core import NodeState, PolicyCore
from ros2_bridge.distributions import absolute_namespace, require_domain
from ros2_bridge.node_clock import SimulatedTime, SystemClock
from ros2_bridge.parameters import PARAMETERS, Parameter, ParameterType, Value, key_parameters, read_values
from ros2_bridge.policy import Load, load
from ros2_bridge.rclpy_transport import RclError, RclpyTransport

_TYPES: Mapping[ParameterType, RosParameter.Type] = {
    ParameterType.BOOL: RosParameter.Type.BOOL,
    ParameterType.INTEGER: RosParameter.Type.INTEGER,
    ParameterType.DOUBLE: RosParameter.Type.DOUBLE,
    ParameterType.STRING: RosParameter.Type.STRING,
    ParameterType.STRINGS: RosParameter.Type.STRING_ARRAY,
    ParameterType.DOUBLES: RosParameter.Type.DOUBLE_ARRAY,
}
_LOOK_S = 0.1
"""How often the node looks whether it is to end."""


class PolicyNode(LifecycleNode):  # type: ignore[misc]
    """The managed node.

    Args:
        name: of the node.
        load: makes the policy.
        options: of ``rclpy.node.Node``.
    """

    def __init__(self, name: str = "policy_node", *, load: Load = load, **options: Any) -> None:
        super().__init__(name, **options)
        self._declared = {each.name: each for each in PARAMETERS}
        for each in PARAMETERS:
            self._declare(each)
        for key in self._value(self._declared["observation_keys"]):
            for each in key_parameters(key):
                self._declared[each.name] = each
                self._declare(each)
        self._simulated = self.get_parameter("use_sim_time").value
        clock = SimulatedTime() if self._simulated else SystemClock()
        self.core = PolicyCore(RclpyTransport(self), clock, load)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._reset_service = self.create_service(Trigger, "~/reset", self._on_reset)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load, check, build and warm up; a refusal leaves the node unconfigured, to be tried again."""
        given = {name: self._value(each) for name, each in self._declared.items()}
        done = self._tried(lambda: self.core.configure(given))
        return super().on_configure(state) if done is TransitionCallbackReturn.SUCCESS else done

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to drive."""
        done = self._tried(self.core.activate)
        return super().on_activate(state) if done is TransitionCallbackReturn.SUCCESS else done

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop driving."""
        done = self._tried(self.core.deactivate)
        return super().on_deactivate(state) if done is TransitionCallbackReturn.SUCCESS else done

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give policy and topics back."""
        done = self._tried(self.core.cleanup)
        return super().on_cleanup(state) if done is TransitionCallbackReturn.SUCCESS else done

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """End."""
        self.core.shutdown()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give everything back; the node is unconfigured then."""
        self.core.recover()
        return super().on_error(state)

    def _tried(self, transition: Callable[[], None]) -> TransitionCallbackReturn:
        try:
            transition()
        except BacError as refusal:
            self.get_logger().error(str(refusal))
            return TransitionCallbackReturn.FAILURE
        # rclpy makes a failed transition of it and does not say why.
        except Exception as error:
            self.get_logger().error(f"{type(error).__name__}: {error}")
            raise
        return TransitionCallbackReturn.SUCCESS

    def _declare(self, parameter: Parameter) -> None:
        kind = _TYPES[parameter.kind]
        # rclpy takes an empty list for one of bytes, so a list without values is declared by its type alone.
        default = kind if parameter.default == [] else parameter.default
        self.declare_parameter(parameter.name, default, _descriptor(parameter))

    def _value(self, parameter: Parameter) -> Any:
        default = RosParameter(parameter.name, _TYPES[parameter.kind], parameter.default)
        value = self.get_parameter_or(parameter.name, default).value
        return list(value) if isinstance(parameter.default, list) else value

    def _on_set_parameters(self, changes: Sequence[RosParameter]) -> SetParametersResult:
        try:
            for change in changes:
                self._require_time(change)
            # All are read first: what is set together takes effect together, or not at all.
            read = [self._read(change) for change in changes if change.name in self._declared]
            for parameter, value in read:
                if self.core.state in {NodeState.INACTIVE, NodeState.ACTIVE} and parameter.live:
                    self.core.set_cache(str(value))
        except BacError as refusal:
            return SetParametersResult(successful=False, reason=str(refusal))
        return SetParametersResult(successful=True)

    def _require_time(self, change: RosParameter) -> None:
        """Refuse another time than the loop was made for: it would go on by the old one, beside stamps of the new."""
        if change.name == "use_sim_time" and change.value is not self._simulated:
            mend = "start the node with it"
            told = sentence("use_sim_time", expected=f"{self._simulated} as at start", got=change.value, mend=mend)
            raise InvalidInput(told)

    def _read(self, change: RosParameter) -> tuple[Parameter, Value]:
        parameter = self._declared[change.name]
        plain = isinstance(parameter.default, list) and change.value is not None
        return parameter, parameter.read(list(change.value) if plain else change.value)

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            self.core.reset()
        except BacError as refusal:
            response.success, response.message = False, str(refusal)
        else:
            response.success, response.message = True, "a new episode begins"
        return response


def main(
    given: Mapping[str, Any] | None = None,
    name: str = "policy_node",
    namespace: str = "/",
    *,
    activate: bool = True,
    domain: int | None = None,
) -> None:
    """Spin the node until it is interrupted or ROS shuts down.

    Args:
        given: parameters in place of the defaults; with them the node configures and activates itself, without, as
            under ``ros2 run`` and ``ros2 launch``, it waits for its transitions.
        name: of the node.
        namespace: of the node.
        activate: False: with parameters it only configures itself, and rests until it is activated.
        domain: DDS domain; None takes ``ROS_DOMAIN_ID``, else 0.

    Raises:
        BacError: a parameter that was given does not fit, there is no such domain, or the node could not configure or
            activate itself.
    """
    checked = read_values(given or {})
    if domain is not None:
        require_domain(domain)
    # What was given as a whole number may be a double's; an empty list has no type, and is the default anyway.
    overrides = [RosParameter(key, value=checked[key]) for key in given or {} if checked[key] != []]
    with _until_interrupted() as over:
        # rclpy's handlers would shut ROS down first, and nothing could be sent any more that lets the robot rest.
        rclpy.init(domain_id=domain, signal_handler_options=SignalHandlerOptions.NO)
        node = PolicyNode(name, namespace=absolute_namespace(namespace), parameter_overrides=overrides)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        try:
            if given is not None:
                _bring_up(node, over, ("configure", "activate") if activate else ("configure",))
            _spin(node, executor, over)
        except ExternalShutdownException:
            pass
        finally:
            node.core.shutdown()
            node.destroy_node()
            rclpy.try_shutdown()


def spin() -> None:
    """Entry point of ``ros2 run ros2_bridge policy_node``."""
    main()


@contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """Give what SIGINT and SIGTERM set; their handlers are as before at the end."""
    over = threading.Event()
    before = {each: signal.signal(each, lambda number, frame: over.set()) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield over
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _bring_up(node: PolicyNode, over: threading.Event, transitions: Sequence[str]) -> None:
    for transition in transitions:
        if over.is_set():
            return
        done = getattr(node, f"trigger_{transition}")()
        if done != TransitionCallbackReturn.SUCCESS:
            mend = "see what the node logged"
            raise Unavailable(sentence(transition, expected="success", got=done.name.lower(), mend=mend))


def _spin(node: PolicyNode, executor: SingleThreadedExecutor, over: threading.Event) -> None:
    while rclpy.ok() and not over.is_set():
        try:
            executor.spin_once(timeout_sec=_LOOK_S)
        # A transition that the state does not have is raised here (rclpy issue 1209); the robot is in motion meanwhile.
        except RclError as error:
            node.get_logger().error(str(error))
            over.wait(_LOOK_S)


def _descriptor(parameter: Parameter) -> ParameterDescriptor:
    descriptor = ParameterDescriptor(
        name=parameter.name,
        type=_TYPES[parameter.kind].value,
        description=parameter.description,
        additional_constraints=parameter.constraints,
        read_only=parameter.read_only,
    )
    if parameter.kind is ParameterType.INTEGER:
        descriptor.integer_range = [IntegerRange(from_value=int(parameter.low), to_value=int(parameter.high), step=1)]
    elif parameter.kind is ParameterType.DOUBLE:
        descriptor.floating_point_range = [
            FloatingPointRange(from_value=float(parameter.low), to_value=float(parameter.high), step=0.0)
        ]
    return descriptor
