"""The managed node over rclpy's stand-in: transitions, parameters, services, quality of service."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("rosbags")

from bac.errors import MissingArtefact
from ros2_bridge.driver import DriverState
from ros2_bridge.parameters import PARAMETERS as DECLARED
from ros2_bridge.policy import ReadyPolicy
from tests.ros2_bridge.fake_messages import MESSAGES
from tests.ros2_bridge.fake_rclpy import (
    BUS,
    CONTEXT,
    PUBLISHERS,
    SENT,
    Parameter,
    RCLError,
    TransitionCallbackReturn,
)
from tests.ros2_bridge.rclpy_toys import TYPES, deliver, sense, status, until_action
from tests.ros2_bridge.toys import policy

SUCCESS, FAILURE, ERROR = TransitionCallbackReturn


def test_every_parameter_is_declared_typed_described_and_ranged(make_node: Callable[..., Any]) -> None:
    node = make_node()
    for each in DECLARED:
        descriptor = node.descriptors[each.name]
        assert descriptor.description == each.description
        ranges = [*descriptor.integer_range, *descriptor.floating_point_range]
        assert [(found.from_value, found.to_value) for found in ranges] == (
            [(each.low, each.high)] if each.high < float("inf") else []
        )
    assert {"observation.joints.topic", "observation.place.names"} <= node.descriptors.keys()
    assert node.get_parameter("rate_hz").value == 10.0


def test_transitions_and_what_they_open_and_close(make_node: Callable[..., Any]) -> None:
    node = make_node()
    assert node.trigger_configure() is SUCCESS
    assert (node.label, status()["state"]) == ("inactive", "inactive")
    assert len(BUS["joint_states"]) == len(BUS["place"]) == len(PUBLISHERS["action"]) == 1
    assert node.trigger_activate() is SUCCESS
    assert node.label == "active"
    assert node.trigger_deactivate() is SUCCESS
    assert node.trigger_cleanup() is SUCCESS
    assert (node.label, status()["state"]) == ("unconfigured", "unconfigured")
    assert BUS["joint_states"] == BUS["place"] == PUBLISHERS["action"] == []


def test_a_refused_transition_fails_with_its_sentence_and_is_retried(make_node: Callable[..., Any]) -> None:
    there: list[bool] = []

    def load(settings: object) -> ReadyPolicy:
        if not there:
            raise MissingArtefact("checkpoint: expected a file, got none; check the name.")
        return policy()

    node = make_node(load)
    assert node.trigger_configure() is FAILURE
    assert node.label == "unconfigured"
    assert node.errors == ["checkpoint: expected a file, got none; check the name."]
    there.append(True)
    assert node.trigger_configure() is SUCCESS
    assert node.label == "inactive"


def test_an_error_leads_to_unconfigured_and_the_node_can_be_used_again(make_node: Callable[..., Any]) -> None:
    broken = [True]

    def load(settings: object) -> ReadyPolicy:
        if broken[0]:
            raise RuntimeError("CUDA error")
        return policy()

    node = make_node(load)
    assert node.trigger_configure() is ERROR
    assert (node.label, node.core.state) == ("unconfigured", "unconfigured")
    assert node.errors == ["RuntimeError: CUDA error"]
    broken[0] = False
    assert node.trigger_configure() is SUCCESS


@pytest.mark.parametrize(("state", "transition"), [("active", "deactivate"), ("inactive", "cleanup")])
def test_an_error_lets_the_robot_rest_and_gives_everything_back(
    make_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, state: str, transition: str
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error")

    node = make_node(hold="zero", phase_ms=0.0, rate_hz=100.0)
    _go(node, state)
    if state == "active":
        assert list(until_action().data) == [7.0, 0.0]
    with monkeypatch.context() as patched:
        patched.setattr(node.core, transition, fail)
        assert getattr(node, f"trigger_{transition}")() is ERROR
    assert node.errors == ["RuntimeError: CUDA error"]
    assert node.label == node.core.state == status()["state"] == "unconfigured"
    assert BUS["joint_states"] == BUS["place"] == PUBLISHERS["action"] == []
    assert (node.core.driver, node.core.policy) == (None, None)
    if state == "active":
        assert list(SENT["action"][-1].data) == [0.0, 0.0]
    assert node.trigger_configure() is SUCCESS
    assert node.trigger_activate() is SUCCESS


@pytest.mark.parametrize("state", ["unconfigured", "inactive", "active"])
def test_the_node_shuts_down_from_every_state(make_node: Callable[..., Any], state: str) -> None:
    node = make_node(hold="zero", phase_ms=0.0, rate_hz=100.0)
    _go(node, state)
    if state == "active":
        until_action()
    assert node.trigger_shutdown() is SUCCESS
    assert node.label == node.core.state == status()["state"] == "finalized"
    assert node.entities == []
    assert [list(message.data) for message in SENT["action"][-1:]] == ([[0.0, 0.0]] if state == "active" else [])


def _go(node: Any, state: str) -> None:
    for transition in {"unconfigured": [], "inactive": ["configure"], "active": ["configure", "activate"]}[state]:
        assert getattr(node, f"trigger_{transition}")() is SUCCESS
    assert node.label == node.core.state == state


@pytest.mark.parametrize("remapped", [None, ["--ros-args", "-r", "place:=arm/place"]])
def test_two_publishers_are_refused(make_node: Callable[..., Any], remapped: list[str] | None) -> None:
    node = make_node(cli_args=remapped)
    node.trigger_configure()
    for _ in range(2):
        node.create_publisher(MESSAGES["geometry_msgs/msg/PoseStamped"], "place", None)
    sense("arm/place" if remapped else "place")
    figures = node.core.figures()
    assert figures["refused_second_publisher"] == 1
    assert node.core._intake.missing == ["place"]


def test_quality_of_service_is_rclpy_s(make_node: Callable[..., Any]) -> None:
    node = make_node()
    node.trigger_configure()
    (sensor,), (action,) = BUS["joint_states"], PUBLISHERS["action"]
    assert (sensor.qos.reliability.name, sensor.qos.durability.name, sensor.qos.depth) == ("BEST_EFFORT", "VOLATILE", 5)
    assert not hasattr(sensor.qos, "deadline")
    assert (action.qos.reliability.name, action.qos.depth, action.qos.deadline.seconds) == ("RELIABLE", 1, 0.2)
    assert (action.qos.liveliness.name, action.qos.liveliness_lease_duration.seconds) == ("AUTOMATIC", 1.0)
    assert PUBLISHERS["~/status"][0].qos.durability.name == "TRANSIENT_LOCAL"


def test_the_schedule_is_switched_by_its_parameter(make_node: Callable[..., Any]) -> None:
    node = make_node()
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
    make_node: Callable[..., Any], other: tuple[str, Any]
) -> None:
    node = make_node()
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
def test_parameters_that_do_not_fit_are_not_set(make_node: Callable[..., Any], name: str, value: Any) -> None:
    node = make_node()
    before = node.get_parameter(name).value
    (result,) = node.set_parameters([Parameter(name, value=value)])
    assert not result.successful
    assert name in result.reason
    assert node.get_parameter(name).value == before


@pytest.mark.parametrize("simulated", [False, True])
def test_time_cannot_be_changed_while_the_node_runs(make_node: Callable[..., Any], simulated: bool) -> None:
    node = make_node(use_sim_time=simulated)
    other = not simulated
    (refused,) = node.set_parameters([Parameter("use_sim_time", value=other)])
    assert not refused.successful
    assert refused.reason == (f"use_sim_time: expected {simulated} as at start, got {other}; start the node with it.")
    result = node.set_parameters_atomically([Parameter("seam", value="blend"), Parameter("use_sim_time", value=other)])
    assert not result.successful
    assert (node.get_parameter("use_sim_time").value, node.get_parameter("seam").value) == (simulated, "replace")
    (same,) = node.set_parameters([Parameter("use_sim_time", value=simulated)])
    assert same.successful


def test_the_observation_s_keys_are_those_of_the_start(make_node: Callable[..., Any]) -> None:
    node = make_node()
    (refused,) = node.set_parameters([Parameter("observation_keys", value=["camera"])])
    assert not refused.successful
    assert refused.reason == "Trying to set a read-only parameter: observation_keys."
    assert node.get_parameter("observation_keys").value == ["joints", "place"]
    assert [name for name, each in node.descriptors.items() if each and each.read_only] == ["observation_keys"]


def test_parameters_say_when_a_change_takes_effect(make_node: Callable[..., Any]) -> None:
    node = make_node()
    told = {name: each.additional_constraints for name, each in node.descriptors.items() if each is not None}
    assert told["rate_hz"] == "takes effect at the next configure"
    assert told["seam"] == "one of replace, blend, inpaint; takes effect at the next configure"
    assert told["observation.joints.topic"] == "takes effect at the next configure"
    at_once = [name for name in told if "takes effect at the next configure" not in told[name]]
    assert sorted(at_once) == ["cache", "observation_keys"]
    node.trigger_configure()
    node.set_parameters([Parameter("rate_hz", value=20.0)])
    assert node.core._settings.values["rate_hz"] == 10.0
    node.trigger_cleanup()
    node.trigger_configure()
    assert node.core._settings.values["rate_hz"] == 20.0


def test_reset_is_a_trigger(make_node: Callable[..., Any]) -> None:
    node = make_node()
    refused = node.services["~/reset"]()
    assert not refused.success
    assert "transition" in refused.message
    node.trigger_configure()
    node.trigger_activate()
    assert node.services["~/reset"]().success
    done = threading.Event()
    while not done.wait(0.01) and status()["episode"] != 1:
        pass
    assert status()["episode"] == 1


def test_diagnostics_come_once_a_second_under_the_node_s_full_name(make_node: Callable[..., Any]) -> None:
    node = make_node(namespace="/robot")
    node.trigger_configure()
    (timer,) = node.timers
    assert timer.period_s == 1.0
    timer.callback()
    (told,) = SENT["/diagnostics"][-1].status
    assert (told.name, told.hardware_id, told.level) == ("/robot/policy_node", "toy device", b"\0")


def test_simulated_time_is_taken_from_the_clock_topic(make_node: Callable[..., Any]) -> None:
    node = make_node(use_sim_time=True)
    node.trigger_configure()
    node.trigger_activate()
    now = TYPES.make("builtin_interfaces/msg/Time", sec=5, nanosec=7)
    deliver("/clock", TYPES.make("rosgraph_msgs/msg/Clock", clock=now))
    for timer in node.timers:
        timer.callback()
    stamp = SENT["/diagnostics"][-1].header.stamp
    assert (stamp.sec, stamp.nanosec) == (5, 7)


def test_only_a_context_that_is_down_excuses_a_message_that_was_not_sent(make_node: Callable[..., Any]) -> None:
    node = make_node()
    (status,) = PUBLISHERS["~/status"]

    def refuse(message: Any) -> None:
        raise RCLError("out of memory")

    status.publish = refuse
    with pytest.raises(RCLError, match="out of memory"):
        node.core.publish_status(DriverState())
    CONTEXT.try_shutdown()
    node.core.publish_status(DriverState())
