"""How the node is run over rclpy: the command line, bringing it up, and ending in order; over the stand-in."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

pytest.importorskip("rosbags")

import ros2_bridge.__main__ as command_line
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


@pytest.fixture
def toy_file(tmp_path: Path) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({"/**": {"ros__parameters": PARAMETERS}}))
    return str(path)


@pytest.mark.parametrize(("options", "label"), [([], "active"), (["--no-activate"], "inactive")])
def test_the_command_line_activates_the_node_unless_it_is_told_not_to(
    nodes: list[Any], toy_file: str, options: list[str], label: str
) -> None:
    seen: list[tuple[str, str]] = []
    WORK.append(lambda: seen.append((nodes[0].label, str(nodes[0].core.state))))
    command_line.main(["--params", toy_file, "--transport", "rclpy", *options])
    assert seen == [(label, label)]
    assert status()["state"] == "finalized"


def test_the_command_line_names_node_namespace_and_domain(nodes: list[Any], toy_file: str) -> None:
    command_line.main(["--params", toy_file, "--domain", "42", "--namespace", "robot/", "--node", "arm"])
    assert CONTEXT.domain_id == 42
    assert nodes[0].get_fully_qualified_name() == "/robot/arm"


def test_without_a_domain_ros_takes_its_own(nodes: list[Any], toy_file: str) -> None:
    command_line.main(["--params", toy_file])
    assert CONTEXT.domain_id is None
    assert nodes[0].get_fully_qualified_name() == "/policy_node"


REFUSED = {
    "--record": "bag",
    "--figures": "figures.json",
    "--ros-distro": "humble",
}


@pytest.mark.parametrize("option", sorted(REFUSED))
def test_what_only_the_other_transport_does_is_refused(nodes: list[Any], toy_file: str, option: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: {option}: expected transport dds, got rclpy; "):
        command_line.main(["--params", toy_file, option, REFUSED[option]])
    assert nodes == []


@pytest.mark.parametrize("live", ["--transport=dds", "--transport=rclpy", "--domain=0"])
def test_what_is_said_of_a_live_transport_is_refused_beside_a_bag(
    nodes: list[Any], toy_file: str, monkeypatch: pytest.MonkeyPatch, live: str
) -> None:
    monkeypatch.setattr(command_line, "_run", lambda *_: pytest.fail("ran"))
    told = rf"^error: {live.partition('=')[0]}: expected live messages, got --replay bag; leave one"
    with pytest.raises(SystemExit, match=told):
        command_line.main(["--params", toy_file, "--replay", "bag", live])
    assert nodes == []


@pytest.mark.parametrize("domain", ["-1", "233"])
def test_a_domain_that_is_none_is_refused(nodes: list[Any], toy_file: str, domain: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: DDS domain: expected 0 to 232, got {domain}; "):
        command_line.main(["--params", toy_file, f"--domain={domain}"])
    assert nodes == []


@pytest.mark.parametrize("there", [True, False])
def test_transport_auto_takes_rclpy_where_it_is(
    nodes: list[Any], toy_file: str, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    over_dds: list[str] = []
    monkeypatch.setattr(command_line, "_run", lambda options, given: over_dds.append(given["task"]))
    if not there:
        monkeypatch.setitem(sys.modules, "rclpy", None)
    command_line.main(["--params", toy_file, "--transport", "auto"])
    assert (len(nodes), over_dds) == ((1, []) if there else (0, ["toy"]))


def test_a_transport_that_is_not_there_is_refused(
    nodes: list[Any], toy_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(SystemExit, match=r"^error: transport rclpy: expected rclpy, got none; "):
        command_line.main(["--params", toy_file, "--transport", "rclpy"])
    assert nodes == []


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
