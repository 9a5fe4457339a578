"""The managed node over rclpy: over a stand-in everywhere, over the real one where it is installed (``ros``)."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rosbags")

from bac.errors import MissingArtefact, Unavailable
from ros2_bridge.conversion import header
from ros2_bridge.driver import DriverState
from ros2_bridge.messages import MessageTypes
from ros2_bridge.node_clock import SystemClock
from ros2_bridge.parameters import PARAMETERS as DECLARED
from ros2_bridge.policy import ReadyPolicy
from tests.ros2_bridge import fake_rclpy
from tests.ros2_bridge.fake_rclpy import (
    BUS,
    CONTEXT,
    PUBLISHERS,
    SENT,
    WORK,
    Parameter,
    RCLError,
    SignalHandlerOptions,
    TransitionCallbackReturn,
    to_rclpy,
)
from tests.ros2_bridge.toys import PARAMETERS, PATIENCE_S, loading, policy

TYPES = MessageTypes("jazzy")
SUCCESS, FAILURE, ERROR = TransitionCallbackReturn


@pytest.fixture
def rclpy_node(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fake_rclpy.install(monkeypatch)
    import ros2_bridge.rclpy_node

    return ros2_bridge.rclpy_node


@pytest.fixture
def make(rclpy_node: ModuleType) -> Iterator[Callable[..., Any]]:
    made = []
    CONTEXT.init(signal_handler_options=SignalHandlerOptions.NO)

    def begin(load: Any = None, cli_args: Any = None, **changed: Any) -> Any:
        overrides = [Parameter(name, value=value) for name, value in (PARAMETERS | changed).items()]
        made.append(rclpy_node.PolicyNode(load=load or loading(), parameter_overrides=overrides, cli_args=cli_args))
        return made[-1]

    yield begin
    for each in made:
        each.core.shutdown()
        each.destroy_node()
    CONTEXT.try_shutdown()


def _status() -> dict[str, Any]:
    return dict(json.loads(SENT["~/status"][-1].data))


def _sense(place: str = "place") -> None:
    """What a robot publishes, as the middleware hands it over."""
    make, now_ns = TYPES.make, SystemClock().ros_ns()
    pose = make("geometry_msgs/msg/Pose", position=make("geometry_msgs/msg/Point", x=7.0, y=2.0))
    position = np.array([-1.25, 0.5])
    messages = {
        "joint_states": make(
            "sensor_msgs/msg/JointState", header=header(make, now_ns), name=["elbow", "shoulder"], position=position
        ),
        place: make("geometry_msgs/msg/PoseStamped", header=header(make, now_ns), pose=pose),
    }
    for topic, message in messages.items():
        for subscription in list(BUS[topic]):
            subscription.callback(to_rclpy(message))


def test_every_parameter_is_declared_typed_described_and_ranged(make: Callable[..., Any]) -> None:
    node = make()
    for each in DECLARED:
        descriptor = node.descriptors[each.name]
        assert descriptor.description == each.description
        ranges = [*descriptor.integer_range, *descriptor.floating_point_range]
        assert [(found.from_value, found.to_value) for found in ranges] == (
            [(each.low, each.high)] if each.high < float("inf") else []
        )
    assert {"observation.joints.topic", "observation.place.names"} <= node.descriptors.keys()
    assert node.get_parameter("rate_hz").value == 10.0


def test_transitions_and_what_they_open_and_close(make: Callable[..., Any]) -> None:
    node = make()
    assert node.trigger_configure() is SUCCESS
    assert (node.label, _status()["state"]) == ("inactive", "inactive")
    assert len(BUS["joint_states"]) == len(BUS["place"]) == len(PUBLISHERS["action"]) == 1
    assert node.trigger_activate() is SUCCESS
    assert node.label == "active"
    assert node.trigger_deactivate() is SUCCESS
    assert node.trigger_cleanup() is SUCCESS
    assert (node.label, _status()["state"]) == ("unconfigured", "unconfigured")
    assert BUS["joint_states"] == BUS["place"] == PUBLISHERS["action"] == []
    assert node.trigger_configure() is SUCCESS
    assert node.trigger_shutdown() is SUCCESS
    assert (node.label, _status()["state"]) == ("finalized", "finalized")
    assert node.timers == []


def test_a_refused_transition_fails_with_its_sentence_and_is_retried(make: Callable[..., Any]) -> None:
    there: list[bool] = []

    def load(settings: object) -> ReadyPolicy:
        if not there:
            raise MissingArtefact("checkpoint: expected a file, got none; check the name.")
        return policy()

    node = make(load)
    assert node.trigger_configure() is FAILURE
    assert node.label == "unconfigured"
    assert node.errors == ["checkpoint: expected a file, got none; check the name."]
    there.append(True)
    assert node.trigger_configure() is SUCCESS
    assert node.label == "inactive"


def test_an_error_leads_to_unconfigured_and_the_node_can_be_used_again(make: Callable[..., Any]) -> None:
    broken = [True]

    def load(settings: object) -> ReadyPolicy:
        if broken[0]:
            raise RuntimeError("CUDA error")
        return policy()

    node = make(load)
    assert node.trigger_configure() is ERROR
    assert (node.label, node.core.state) == ("unconfigured", "unconfigured")
    assert node.errors == ["RuntimeError: CUDA error"]
    broken[0] = False
    assert node.trigger_configure() is SUCCESS


def test_messages_become_actions(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    node = make(phase_ms=0.0, rate_hz=100.0, deadline_ticks=100)
    sent = threading.Event()
    node.trigger_configure()
    (publisher,) = PUBLISHERS["action"]
    publish = publisher.publish
    publisher.publish = lambda message: (publish(message), sent.set())
    node.trigger_activate()
    while not sent.wait(0.01):
        _sense()
    message = SENT["action"][0]
    assert message.type_name == "std_msgs/msg/Float64MultiArray"
    assert list(message.data) == [7.0, 0.0]
    for timer in node.timers:
        timer.callback()
    (status,) = SENT["/diagnostics"][-1].status
    assert (status.level, status.hardware_id) == (b"\0", "toy device")
    node.trigger_deactivate()
    count = len(SENT["action"])
    _sense()
    assert len(SENT["action"]) == count


@pytest.mark.parametrize("remapped", [None, ["--ros-args", "-r", "place:=arm/place"]])
def test_two_publishers_are_refused(make: Callable[..., Any], remapped: list[str] | None) -> None:
    node = make(cli_args=remapped)
    node.trigger_configure()
    for _ in range(2):
        node.create_publisher(fake_rclpy.MESSAGES["geometry_msgs/msg/PoseStamped"], "place", None)
    _sense("arm/place" if remapped else "place")
    figures = node.core.figures()
    assert figures["refused_second_publisher"] == 1
    assert node.core._intake.missing == ["place"]


def test_quality_of_service_is_rclpy_s(make: Callable[..., Any]) -> None:
    node = make()
    node.trigger_configure()
    (sensor,), (action,) = BUS["joint_states"], PUBLISHERS["action"]
    assert (sensor.qos.reliability.name, sensor.qos.durability.name, sensor.qos.depth) == ("BEST_EFFORT", "VOLATILE", 5)
    assert not hasattr(sensor.qos, "deadline")
    assert (action.qos.reliability.name, action.qos.depth, action.qos.deadline.seconds) == ("RELIABLE", 1, 0.2)
    assert (action.qos.liveliness.name, action.qos.liveliness_lease_duration.seconds) == ("AUTOMATIC", 1.0)
    assert PUBLISHERS["~/status"][0].qos.durability.name == "TRANSIENT_LOCAL"


def test_the_schedule_is_switched_by_its_parameter(make: Callable[..., Any]) -> None:
    node = make()
    node.trigger_configure()
    node.trigger_activate()
    (result,) = node.set_parameters([Parameter("cache", value="late")])
    assert result.successful
    assert node.core.driver.cache == "late-s10"
    (result,) = node.set_parameters([Parameter("cache", value="nonsense")])
    assert not result.successful
    assert "expected one of ['bac-s10', 'bac-s5', 'late-s10'], got nonsense" in result.reason
    assert node.get_parameter("cache").value == "late"


@pytest.mark.parametrize("other", [("seam", "glue"), ("threads", -1)])
def test_parameters_that_are_set_together_take_effect_together_or_not_at_all(
    make: Callable[..., Any], other: tuple[str, Any]
) -> None:
    node = make()
    node.trigger_configure()
    node.trigger_activate()
    before = (node.core.driver.cache, node.get_parameter("cache").value)
    name, value = other
    result = node.set_parameters_atomically([Parameter("cache", value="late"), Parameter(name, value=value)])
    assert not result.successful
    assert name in result.reason
    assert (node.core.driver.cache, node.get_parameter("cache").value) == before
    result = node.set_parameters_atomically([Parameter("cache", value="late"), Parameter("seam", value="blend")])
    assert result.successful
    assert node.core.driver.cache == "late-s10"
    assert node.get_parameter("seam").value == "blend"


@pytest.mark.parametrize(("name", "value"), [("seam", "glue"), ("rate_hz", 5000.0), ("rate_hz", 5), ("threads", -1)])
def test_parameters_that_do_not_fit_are_not_set(make: Callable[..., Any], name: str, value: Any) -> None:
    node = make()
    before = node.get_parameter(name).value
    (result,) = node.set_parameters([Parameter(name, value=value)])
    assert not result.successful
    assert name in result.reason
    assert node.get_parameter(name).value == before


def test_reset_is_a_trigger(make: Callable[..., Any]) -> None:
    node = make()
    refused = node.services["~/reset"]()
    assert not refused.success
    assert "transition" in refused.message
    node.trigger_configure()
    node.trigger_activate()
    assert node.services["~/reset"]().success
    done = threading.Event()
    while not done.wait(0.01) and _status()["episode"] != 1:
        pass
    assert _status()["episode"] == 1


def test_simulated_time_is_taken_from_the_clock_topic(make: Callable[..., Any]) -> None:
    node = make(use_sim_time=True)
    node.trigger_configure()
    node.trigger_activate()
    (clock,) = BUS["/clock"]
    now = TYPES.make("builtin_interfaces/msg/Time", sec=5, nanosec=7)
    clock.callback(to_rclpy(TYPES.make("rosgraph_msgs/msg/Clock", clock=now)))
    for timer in node.timers:
        timer.callback()
    stamp = SENT["/diagnostics"][-1].header.stamp
    assert (stamp.sec, stamp.nanosec) == (5, 7)


@pytest.fixture
def nodes(rclpy_node: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The nodes that ``main`` makes, over the toys' policy."""
    made: list[Any] = []

    class Node(rclpy_node.PolicyNode):  # type: ignore[name-defined, misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{"load": loading()} | options)
            made.append(self)

    monkeypatch.setattr(rclpy_node, "PolicyNode", Node)
    before = signal.getsignal(signal.SIGINT)
    yield made
    assert signal.getsignal(signal.SIGINT) is before
    assert not CONTEXT.ok()


def test_main_configures_itself_when_it_is_given_parameters(rclpy_node: ModuleType, nodes: list[Any]) -> None:
    rclpy_node.main(PARAMETERS | {"rate_hz": 20, "caches": []})
    (node,) = nodes
    assert node.get_parameter("rate_hz").value == 20.0
    assert [json.loads(message.data)["state"] for message in SENT["~/status"]][-1] == "finalized"
    assert node.label == "active"
    assert node.entities == []


def test_main_ends_where_the_node_cannot_configure_itself(rclpy_node: ModuleType, nodes: list[Any]) -> None:
    with pytest.raises(Unavailable, match=r"^configure: expected success, got failure; see what the node logged\.$"):
        rclpy_node.main(PARAMETERS | {"hold": "zero", "output": "trajectory", "action_names": ["x", "y"]})
    (node,) = nodes
    (told,) = node.errors
    assert told.startswith("hold: expected repeat or silent with output: trajectory, got zero")
    assert (node.label, node.entities) == ("unconfigured", [])


def test_a_transition_that_the_state_does_not_have_is_logged_and_the_node_goes_on(
    rclpy_node: ModuleType, nodes: list[Any]
) -> None:
    seen: list[str] = []
    WORK.extend([lambda: nodes[0].trigger_activate(), lambda: seen.append(str(nodes[0].core.state))])
    rclpy_node.main(PARAMETERS)
    assert nodes[0].errors == ["Transition activate is not registered for state active"]
    assert seen == ["active"]
    assert _status()["state"] == "finalized"


def test_an_interrupted_node_lets_the_robot_rest_before_ros_is_shut_down(
    rclpy_node: ModuleType, nodes: list[Any]
) -> None:
    def drive() -> None:
        patience = threading.Event()
        while not SENT["action"]:
            _sense()
            patience.wait(0.01)

    WORK.append(drive)
    rclpy_node.main(PARAMETERS | {"hold": "zero", "phase_ms": 0.0, "rate_hz": 100.0})
    assert list(SENT["action"][0].data) == [7.0, 0.0]
    assert list(SENT["action"][-1].data) == [0.0, 0.0]
    assert nodes[0].entities == []


def test_a_node_ends_in_order_when_others_have_shut_ros_down(rclpy_node: ModuleType, nodes: list[Any]) -> None:
    WORK.append(CONTEXT.try_shutdown)
    rclpy_node.main(PARAMETERS)
    assert (nodes[0].core.state, nodes[0].entities) == ("finalized", [])


def test_only_a_context_that_is_down_excuses_a_message_that_was_not_sent(make: Callable[..., Any]) -> None:
    node = make()
    (status,) = PUBLISHERS["~/status"]

    def refuse(message: Any) -> None:
        raise RCLError("out of memory")

    status.publish = refuse
    with pytest.raises(RCLError, match="out of memory"):
        node.core.publish_status(DriverState())
    CONTEXT.try_shutdown()
    node.core.publish_status(DriverState())


@pytest.mark.ros
def test_the_real_rclpy() -> None:
    """Where a distribution is installed and sourced: all transitions, and a message that becomes an action."""
    rclpy = pytest.importorskip("rclpy")
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.parameter import Parameter as RosParameter

    from ros2_bridge.rclpy_node import PolicyNode
    from ros2_bridge.transport import COMMAND, SENSOR

    context = rclpy.Context()
    rclpy.init(context=context)
    overrides = [RosParameter(name, value=value) for name, value in PARAMETERS.items()]
    node = PolicyNode(load=loading(), parameter_overrides=overrides, context=context)
    from ros2_bridge.rclpy_node import RclpyTransport

    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    transport, actions = RclpyTransport(node), []
    transport.subscribe("action", "std_msgs/msg/Float64MultiArray", COMMAND, lambda m, _: actions.append(m), print)
    publishers = {
        "joint_states": transport.publisher("joint_states", "sensor_msgs/msg/JointState", SENSOR),
        "place": transport.publisher("place", "geometry_msgs/msg/PoseStamped", SENSOR),
    }
    node.trigger_configure()
    node.trigger_activate()
    make, clock = transport.make, SystemClock()
    until_ns = clock.now_ns() + round(PATIENCE_S * 1e9)
    while not actions and clock.now_ns() < until_ns:
        position = np.array([0.5, -1.25])
        stamped = header(make, clock.ros_ns())
        names = ["shoulder", "elbow"]
        publishers["joint_states"].publish(
            make("sensor_msgs/msg/JointState", header=stamped, name=names, position=position)
        )
        pose = make("geometry_msgs/msg/Pose", position=make("geometry_msgs/msg/Point", x=7.0, y=2.0))
        publishers["place"].publish(make("geometry_msgs/msg/PoseStamped", header=stamped, pose=pose))
        executor.spin_once(timeout_sec=0.02)
    assert actions
    assert list(actions[0].data)[1] == 0.0
    node.trigger_deactivate()
    node.trigger_cleanup()
    node.trigger_shutdown()
    executor.shutdown()
    node.destroy_node()
    rclpy.shutdown(context=context)
