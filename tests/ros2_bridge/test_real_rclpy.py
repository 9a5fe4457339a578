"""The managed node over the real rclpy, where a distribution is installed and sourced (``pytest -m ros``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ros2_bridge.conversion import header
from ros2_bridge.node_clock import SystemClock
from tests.ros2_bridge.toys import PARAMETERS, PATIENCE_S, loading


@pytest.fixture
def context(ros_domain: int) -> Iterator[Any]:
    rclpy = pytest.importorskip("rclpy")
    made = rclpy.Context()
    rclpy.init(context=made)
    assert made.get_domain_id() == ros_domain
    yield made
    rclpy.shutdown(context=made)


@pytest.mark.ros
def test_all_transitions_and_a_message_that_becomes_an_action(context: Any) -> None:
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.lifecycle import TransitionCallbackReturn
    from rclpy.parameter import Parameter as RosParameter

    from ros2_bridge.rclpy_node import PolicyNode
    from ros2_bridge.rclpy_transport import RclpyTransport
    from ros2_bridge.transport import COMMAND, SENSOR

    overrides = [RosParameter(name, value=value) for name, value in PARAMETERS.items()]
    node = PolicyNode(load=loading(), parameter_overrides=overrides, context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    transport, actions = RclpyTransport(node), []
    transport.subscribe("action", "std_msgs/msg/Float64MultiArray", COMMAND, lambda m, _: actions.append(m), print)
    publishers = {
        "joint_states": transport.publisher("joint_states", "sensor_msgs/msg/JointState", SENSOR),
        "place": transport.publisher("place", "geometry_msgs/msg/PoseStamped", SENSOR),
    }
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    make, clock = transport.make, SystemClock()
    until_ns = clock.now_ns() + round(PATIENCE_S * 1e9)
    while not actions and clock.now_ns() < until_ns:
        stamped = header(make, clock.ros_ns())
        joints = {"name": ["shoulder", "elbow"], "position": np.array([0.5, -1.25])}
        publishers["joint_states"].publish(make("sensor_msgs/msg/JointState", header=stamped, **joints))
        pose = make("geometry_msgs/msg/Pose", position=make("geometry_msgs/msg/Point", x=7.0, y=2.0))
        publishers["place"].publish(make("geometry_msgs/msg/PoseStamped", header=stamped, pose=pose))
        executor.spin_once(timeout_sec=0.02)
    assert actions
    assert list(actions[0].data)[1] == 0.0
    assert node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
    assert node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
    assert node.trigger_shutdown() == TransitionCallbackReturn.SUCCESS
    executor.shutdown()
    node.destroy_node()
