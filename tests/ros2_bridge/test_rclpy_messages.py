"""Every input and output over rclpy's message classes, which refuse what their fields are not."""

from __future__ import annotations

import array
import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rosbags")

from PIL import Image

from bac.control import Request
from ros2_bridge.conversion import header
from ros2_bridge.mapping import MESSAGE_TYPES, SourceKind
from ros2_bridge.node_clock import SystemClock
from tests.ros2_bridge.fake_messages import MESSAGES
from tests.ros2_bridge.fake_rclpy import BUS, SENT
from tests.ros2_bridge.rclpy_toys import TYPES, deliver, sense, until_action
from tests.ros2_bridge.toys import PARAMETERS, loading

ACTIONS = np.arange(16, dtype=np.float32).reshape(8, 2)
PIXELS = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
RATE_HZ = 100.0


def _png() -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    return np.frombuffer(stream.getvalue(), np.uint8)


def _pose() -> Any:
    point = TYPES.make("geometry_msgs/msg/Point", x=7.0, y=2.0, z=3.0)
    turn = TYPES.make("geometry_msgs/msg/Quaternion", w=0.5)
    return TYPES.make("geometry_msgs/msg/Pose", position=point, orientation=turn)


Given = tuple[list[str], dict[str, Any], Any]
INPUTS: dict[SourceKind, Given] = {
    SourceKind.JOINT_STATE: (
        ["shoulder", "elbow"],
        {"name": ["elbow", "shoulder"], "position": np.array([-1.25, 0.5])},
        [0.5, -1.25],
    ),
    SourceKind.IMAGE: (
        [],
        {"height": 2, "width": 3, "step": 9, "encoding": "bgr8", "data": PIXELS[..., ::-1].reshape(-1)},
        PIXELS,
    ),
    SourceKind.COMPRESSED_IMAGE: ([], {"format": "png", "data": _png()}, PIXELS),
    SourceKind.POSE: (["y", "qw"], {"pose": _pose()}, [2.0, 0.5]),
    SourceKind.ARRAY: ([], {"data": np.array([1.5, -2.5, 3.5])}, [1.5, -2.5, 3.5]),
}
"""Names in the policy's order, the message's fields, and the observation they mean."""


class Policy:
    """Gives the same chunk always; keeps what it was given, and by which threads it was asked."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []
        self.threads: set[threading.Thread] = set()

    def __call__(self, request: Request, schedule: int, seed: int | None) -> np.ndarray:
        self.seen.append(request.observation.values["key"][-1])
        self.threads.add(threading.current_thread())
        return ACTIONS


def _begun(make_node: Callable[..., Any], policy: Policy, kind: SourceKind, **changed: Any) -> tuple[Any, Any]:
    """Return a node that moves the robot by one message of this kind, and its first command."""
    names, fields, value = INPUTS[kind]
    given = {name: each for name, each in PARAMETERS.items() if not name.startswith("observation.")}
    given |= {"observation_keys": ["key"], "observation.key.topic": "input", "observation.key.type": str(kind)}
    given |= {"observation.key.names": names} if names else {}
    given |= {"phase_ms": 0.0, "rate_hz": RATE_HZ, "deadline_ticks": 100}
    shape = np.shape(value)
    node = make_node(loading(policy, observation={"key": shape}), given=given, **changed)
    node.trigger_configure()
    node.trigger_activate()
    type_name = MESSAGE_TYPES[kind]

    def sense_it() -> None:
        stamped = {} if kind is SourceKind.ARRAY else {"header": header(TYPES.make, SystemClock().ros_ns())}
        deliver("input", TYPES.make(type_name, **fields, **stamped))

    return node, until_action(sense_it)


@pytest.mark.parametrize("output", ["array", "trajectory"])
@pytest.mark.parametrize("kind", list(SourceKind))
def test_messages_become_actions(make_node: Callable[..., Any], kind: SourceKind, output: str) -> None:
    policy = Policy()
    node, command = _begun(make_node, policy, kind, output=output, action_names=["x", "y"])
    np.testing.assert_array_equal(policy.seen[0], np.asarray(INPUTS[kind][2]))
    figures = node.core.figures()
    assert not [name for name in figures if name.startswith("refused_") and figures[name] not in {0, ""}]
    {"array": _check_array, "trajectory": _check_trajectory}[output](command)


def _check_array(message: Any) -> None:
    assert isinstance(message, MESSAGES["std_msgs/msg/Float64MultiArray"])
    assert message.data == array.array("d", [0.0, 1.0])
    (dimension,) = message.layout.dim
    assert (dimension.label, dimension.size, dimension.stride) == ("action", 2, 2)


def _check_trajectory(message: Any) -> None:
    assert isinstance(message, MESSAGES["trajectory_msgs/msg/JointTrajectory"])
    assert isinstance(message.header, MESSAGES["std_msgs/msg/Header"])
    assert message.header.stamp.sec > 0
    assert message.joint_names == ["x", "y"]
    assert [point.positions for point in message.points] == [array.array("d", row) for row in ACTIONS.tolist()]
    after = [point.time_from_start for point in message.points]
    assert all(isinstance(each, MESSAGES["builtin_interfaces/msg/Duration"]) for each in after)
    assert [(each.sec, each.nanosec) for each in after] == [(0, n * 10_000_000) for n in range(1, len(ACTIONS) + 1)]


def test_inference_has_a_thread_of_its_own(make_node: Callable[..., Any]) -> None:
    """Neither the executor's, which here is the test's, nor the loop's."""
    policy = Policy()
    node, _ = _begun(make_node, policy, SourceKind.POSE)
    (thread,) = policy.threads
    assert threading.current_thread() is not thread
    assert node.core.driver._thread is not thread
    assert thread.name == "bac-inference"


def test_nothing_is_sent_after_the_node_was_deactivated(make_node: Callable[..., Any]) -> None:
    node = make_node(phase_ms=0.0, rate_hz=RATE_HZ, deadline_ticks=100)
    node.trigger_configure()
    node.trigger_activate()
    until_action()
    node.trigger_deactivate()
    count = len(SENT["action"])
    assert len(BUS["place"]) == 1
    sense()
    assert len(SENT["action"]) == count
