"""A robot's hand and eye on the stand-in's bus: what it publishes, and what it reads of the node."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ros2_bridge.conversion import header
from ros2_bridge.messages import MessageTypes
from ros2_bridge.node_clock import SystemClock
from tests.ros2_bridge.fake_messages import to_rclpy
from tests.ros2_bridge.fake_rclpy import BUS, SENT
from tests.ros2_bridge.toys import PATIENCE_S

TYPES = MessageTypes("jazzy")
_AGAIN_S = 0.01


def deliver(topic: str, message: Any) -> None:
    """Hand a message over as the middleware does."""
    for subscription in list(BUS[topic]):
        subscription.callback(to_rclpy(message))


def sense(place: str = "place") -> None:
    """Deliver what the toys' robot senses now."""
    make, now_ns = TYPES.make, SystemClock().ros_ns()
    pose = make("geometry_msgs/msg/Pose", position=make("geometry_msgs/msg/Point", x=7.0, y=2.0))
    joints = {"name": ["elbow", "shoulder"], "position": np.array([-1.25, 0.5])}
    deliver("joint_states", make("sensor_msgs/msg/JointState", header=header(make, now_ns), **joints))
    deliver(place, make("geometry_msgs/msg/PoseStamped", header=header(make, now_ns), pose=pose))


def until_action(sensing: Callable[[], None] = sense) -> Any:
    """Sense until the node moves the robot; return its first command."""
    pause = threading.Event()
    for _ in range(round(PATIENCE_S / _AGAIN_S)):
        if SENT["action"]:
            return SENT["action"][0]
        sensing()
        pause.wait(_AGAIN_S)
    raise AssertionError("no action")


def status() -> dict[str, Any]:
    """Return what the node latched last."""
    return dict(json.loads(SENT["~/status"][-1].data))
