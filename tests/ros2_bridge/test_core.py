"""The node on a clock that the test moves: transitions, topics, what it tells, and what it refuses."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bac.control import Request
from bac.errors import InvalidInput, Mismatch, MissingArtefact
from ros2_bridge import driver
from ros2_bridge.conversion import header
from ros2_bridge.core import NodeState
from ros2_bridge.diagnostics import read_diagnostics
from ros2_bridge.policy import ReadyPolicy
from ros2_bridge.standalone import StandaloneNode
from tests.ros2_bridge.toys import PARAMETERS, Bench, driving, loading, policy

MakeBench = Callable[..., Bench]


def test_the_way_through_the_states(bench: MakeBench) -> None:
    node = bench()
    assert node.status()["state"] == "unconfigured"
    node.core.configure(PARAMETERS)
    assert node.status() == {"state": "inactive", "motion": "resting", "reason": "", "cache": "bac-s10", "episode": 0}
    node.core.activate()
    assert node.await_status(motion="waiting")["reason"] == "nothing came on joint_states, place yet"
    node.core.deactivate()
    assert node.status()["state"] == "inactive"
    node.core.cleanup()
    assert node.status()["state"] == "unconfigured"
    assert node.transport.listeners.keys() == {"/clock"}
    node.core.shutdown()
    assert node.status()["state"] == "finalized"
    assert node.transport.timers == []


WRONG = {
    NodeState.UNCONFIGURED: ("activate", "deactivate", "cleanup", "reset"),
    NodeState.INACTIVE: ("configure", "deactivate", "reset"),
    NodeState.ACTIVE: ("configure", "activate", "cleanup"),
    NodeState.FINALIZED: ("configure", "activate", "deactivate", "cleanup", "reset"),
}


@pytest.mark.parametrize("state", list(WRONG))
def test_transitions_from_elsewhere_are_refused_and_change_nothing(bench: MakeBench, state: NodeState) -> None:
    core = bench().core
    for at, go in ((NodeState.INACTIVE, lambda: core.configure(PARAMETERS)), (NodeState.ACTIVE, core.activate)):
        if state in {at, NodeState.ACTIVE}:
            go()
    if state is NodeState.FINALIZED:
        core.shutdown()
    for name in WRONG[state]:
        with pytest.raises(Mismatch, match="transition"):
            getattr(core, name)(*([PARAMETERS] if name == "configure" else []))
        assert core.state is state


def test_a_missing_file_fails_the_transition_and_can_be_retried(bench: MakeBench) -> None:
    there: list[bool] = []

    def load(settings: object) -> ReadyPolicy:
        if not there:
            raise MissingArtefact("checkpoint: expected a file, got none; check the name.")
        return policy()

    core = bench(load).core
    with pytest.raises(MissingArtefact, match="checkpoint"):
        core.configure(PARAMETERS)
    assert core.state is NodeState.UNCONFIGURED
    there.append(True)
    core.configure(PARAMETERS)
    assert core.state is NodeState.INACTIVE


def test_topics_that_cannot_be_opened_leave_none_open(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    node = bench()
    subscribe = node.transport.subscribe

    def refusing(topic: str, *arguments: Any) -> Any:
        if topic == "place":
            raise InvalidInput("topic: expected words, got ''; rename it.")
        return subscribe(topic, *arguments)

    monkeypatch.setattr(node.transport, "subscribe", refusing)
    with pytest.raises(InvalidInput, match="topic"):
        node.core.configure(PARAMETERS)
    assert (node.core.state, node.core.policy) == (NodeState.UNCONFIGURED, None)
    assert node.transport.listeners.keys() == {"/clock"}
    assert node.transport.closed == ["action"]
    monkeypatch.undo()
    node.core.configure(PARAMETERS)


def test_a_node_stops_while_simulated_time_stands_still(bench: MakeBench) -> None:
    node = driving(bench())
    node.core.deactivate()
    assert node.core.state is NodeState.INACTIVE


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"observation_keys": ["joints"]}, "observation_keys"),
        ({"observation.joints.names": ["shoulder"]}, "expected 2 names"),
        ({"output": "trajectory"}, "action_names"),
        ({"output": "trajectory", "action_names": ["x", "y", "z"]}, "expected 2 channels"),
        ({"action_low": [0.0], "action_high": [1.0]}, "expected 2 channels"),
        ({"rate_hz": 0.0}, "rate_hz"),
        ({"degrade_misses": 9, "degrade_window": 3}, "degradation"),
        ({"rate": 10.0}, "rate"),
    ],
)
def test_parameters_that_do_not_fit_fail_configure(bench: MakeBench, changed: dict[str, Any], words: str) -> None:
    core = bench().core
    given = {name: value for name, value in (PARAMETERS | changed).items() if not _of_dropped_key(name, changed)}
    with pytest.raises((InvalidInput, Mismatch), match=words):
        core.configure(given)
    assert core.state is NodeState.UNCONFIGURED
    core.configure(PARAMETERS)


def _of_dropped_key(name: str, changed: dict[str, Any]) -> bool:
    return "observation_keys" in changed and name.startswith("observation.place")


def test_quality_of_service(bench: MakeBench) -> None:
    node = bench()
    node.core.configure(PARAMETERS)
    profiles = node.transport.profiles
    sensor, action, status = profiles["joint_states"], profiles["action"], profiles["~/status"]
    assert (sensor.reliable, sensor.depth, sensor.deadline_s, sensor.liveliness_s) == (False, 5, None, None)
    assert (action.reliable, action.depth, action.deadline_s, action.liveliness_s) == (True, 1, 0.2, 1.0)
    assert (status.reliable, status.depth, status.latched) == (True, 1, True)


def test_diagnostics_have_what_an_engineer_asks_for(bench: MakeBench) -> None:
    node = driving(bench(), deadline_ticks=5)
    for _ in range(3):
        node.tick()
    for call in node.transport.timers:
        call()
    told = read_diagnostics(node.transport.sent["/diagnostics"][-1])
    assert told["level"] == "OK"
    assert told.keys() >= {
        "state",
        "task",
        "cache",
        "executor",
        "latency_p50_ms",
        "latency_p99_ms",
        "observation_age_p99_ms",
        "deadline_misses",
        "ticks_executed",
        "ticks_skipped",
        "jitter_p99_ms",
        "received",
        "sent",
    }
    (status,) = node.transport.sent["/diagnostics"][-1].status
    assert (status.name, status.hardware_id) == ("/robot/policy_node", "toy device")
    assert told["sent"] == str(len(node.actions()))


def test_diagnostics_come_once_a_second_with_latency_and_age_as_they_were(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk n takes n times 10 ms by the driver's watch; each observation is 10 ms older, and waits 50 for its tick."""
    watch = itertools.accumulate(n // 2 * 10_000_000 for n in itertools.count(1))
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic_ns=lambda: next(watch)))
    node = bench(latency=lambda request: 40.0)
    assert node.transport.periods_s == [1.0]
    node.drive(phase_ms=50.0, replan_ticks=1)
    for age_ms in (30.0, 40.0, 50.0, 60.0, 70.0):
        node.sense(age_ms=age_ms)
        node.clock.await_sleep()
        node.clock.advance_ms(50)
        node.clock.await_sleep()
        node.clock.advance_ms(50)
    # The fifth chunk is asked for and not computed yet.
    (publish,) = node.transport.timers
    publish()
    told = read_diagnostics(node.transport.sent["/diagnostics"][-1])
    spread = {name: told[name] for name in told if name.startswith(("latency_p", "observation_age_"))}
    assert spread == {
        "latency_p50_ms": "25.000",
        "latency_p99_ms": "39.700",
        "observation_age_p50_ms": "100.000",
        "observation_age_p99_ms": "119.600",
    }


def test_control_topics_do_what_services_would(bench: MakeBench) -> None:
    node = bench()
    standalone = StandaloneNode(node.core, node.transport)
    make = node.transport.make
    node.transport.deliver("~/reset", make("std_msgs/msg/Empty"))
    assert node.core.figures()["refused_requests"] == 1
    node.core.configure(PARAMETERS)
    for on, state in ((True, NodeState.ACTIVE), (True, NodeState.ACTIVE), (False, NodeState.INACTIVE)):
        node.transport.deliver("~/enable", make("std_msgs/msg/Bool", data=on))
        assert node.core.state is state
    node.transport.deliver("~/set_cache", make("std_msgs/msg/String", data="bac-s5"))
    assert node.status()["cache"] == "bac-s5"
    node.transport.deliver("~/set_cache", make("std_msgs/msg/String", data="nonsense"))
    assert node.status()["cache"] == "bac-s5"
    assert node.core.figures()["refused_requests"] == 2
    node.transport.deliver("~/enable", make("std_msgs/msg/Bool", data=True))
    node.transport.deliver("~/reset", make("std_msgs/msg/Empty"))
    node.await_status(episode=1)
    standalone.close()
    assert node.core.state is NodeState.FINALIZED


def test_pictures_reach_the_policy_whole_and_wrong_ones_never(bench: MakeBench) -> None:
    asked: list[np.ndarray] = []

    def compute(request: Request, schedule: int, seed: int | None) -> np.ndarray:
        asked.append(request.observation.values["camera"])
        return np.zeros((8, 2), np.float32)

    node = bench(loading(compute, observation={"camera": (2, 3, 3)}))
    given = {name: value for name, value in PARAMETERS.items() if not name.startswith("observation.")}
    camera = {"observation.camera.topic": "image_raw", "observation.camera.type": "image"}
    node.core.configure(given | camera | {"observation_keys": ["camera"]})
    node.core.activate()
    node.await_status(motion="waiting")

    def picture(encoding: str = "bgr8", width: int = 3) -> Any:
        make = node.transport.make
        pixels = np.arange(2 * width * 3, dtype=np.uint8)
        return make(
            "sensor_msgs/msg/Image",
            header=header(make, node.clock.ros_ns()),
            height=2,
            width=width,
            encoding=encoding,
            step=3 * width,
            data=pixels,
        )

    node.transport.deliver("image_raw", picture("yuv422"))
    node.transport.deliver("image_raw", picture(width=4))
    assert node.status()["motion"] == "waiting"
    node.transport.deliver("image_raw", picture())
    node.clock.await_sleep()
    node.clock.advance_ms(20)
    node.clock.await_sleep()
    for _ in range(1000):
        if node.actions():
            break
        node.clock.advance_ms(100)
        node.clock.await_sleep()
    assert node.actions()[0] == [0, 0]
    expected = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)[..., ::-1]
    np.testing.assert_array_equal(asked[0], [expected, expected])
    figures = node.core.figures()
    assert (figures["refused_encoding"], figures["refused_size"]) == (1, 1)
