"""How the node is run over rclpy: the command line, bringing it up, and ending in order; over the stand-in."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("rosbags")

from bac.errors import Unavailable
from tests.ros2_bridge.fake_rclpy import CONTEXT, SENT, WORK
from tests.ros2_bridge.rclpy_toys import status, until_action
from tests.ros2_bridge.toys import PARAMETERS, loading


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
    assert status()["state"] == "finalized"


def test_an_interrupted_node_lets_the_robot_rest_before_ros_is_shut_down(
    rclpy_node: ModuleType, nodes: list[Any]
) -> None:
    WORK.append(until_action)
    rclpy_node.main(PARAMETERS | {"hold": "zero", "phase_ms": 0.0, "rate_hz": 100.0})
    assert list(SENT["action"][0].data) == [7.0, 0.0]
    assert list(SENT["action"][-1].data) == [0.0, 0.0]
    assert nodes[0].entities == []


def test_a_node_ends_in_order_when_others_have_shut_ros_down(rclpy_node: ModuleType, nodes: list[Any]) -> None:
    WORK.append(CONTEXT.try_shutdown)
    rclpy_node.main(PARAMETERS)
    assert (nodes[0].core.state, nodes[0].entities) == ("finalized", [])
