"""A robot as a process, ``python -m tests.ros2_bridge.toy_robot``: the toys' observation at 50 Hz, until it ends."""

import itertools
import threading

import numpy as np

from ros2_bridge.dds import DdsTransport
from ros2_bridge.mapping import KeySource, SourceKind
from ros2_bridge.node_clock import SystemClock
from ros2_bridge.robot_messages import robot_messages
from ros2_bridge.transport import SENSOR, Transport

SOURCES = [
    KeySource("joints", "joint_states", SourceKind.JOINT_STATE, ("shoulder", "elbow")),
    KeySource("place", "place", SourceKind.POSE, ("x", "y")),
]


class ToyRobot:
    """Sends joints and place, x counting up."""

    def __init__(self, transport: Transport) -> None:
        self._transport, self._clock = transport, SystemClock()
        self._publishers = {each.topic: transport.publisher(each.topic, each.type_name, SENSOR) for each in SOURCES}
        self._count = itertools.count()

    def sense(self) -> None:
        place = np.array([next(self._count) % 50, 2.0], np.float32)
        values = {"joints": np.array([0.5, -1.25], np.float32), "place": place}
        for topic, message in robot_messages(self._transport.make, SOURCES, values, self._clock.ros_ns()).items():
            self._publishers[topic].publish(message)


if __name__ == "__main__":
    transport = DdsTransport("robot")
    robot = ToyRobot(transport)
    transport.every(0.02, robot.sense)
    print("ready", flush=True)
    threading.Event().wait()
