"""The node on a clock that the test moves: transitions, driving, and everything that must stop it."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bac.control import Request
from bac.errors import InvalidInput, Mismatch, MissingArtefact
from ros2_bridge.conversion import header
from ros2_bridge.core import NodeState
from ros2_bridge.diagnostics import read_diagnostics
from ros2_bridge.policy import ReadyPolicy
from ros2_bridge.standalone import StandaloneNode
from tests.ros2_bridge.toys import CACHES, PARAMETERS, Bench, chunk, loading, policy

MakeBench = Callable[..., Bench]


def _driving(bench: Bench, **changed: Any) -> Bench:
    """Drive until the first action is executed."""
    bench.drive(**changed)
    bench.begin()
    bench.until(lambda: bench.status()["motion"] == "executing")
    return bench


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
    node = _driving(bench())
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


def test_actions_come_one_per_tick_in_the_chunk_s_order(bench: MakeBench) -> None:
    node = _driving(bench(), replan_ticks=100)
    for _ in range(3):
        node.tick()
    # The robot rested until the first chunk came: it begins with its first action.
    assert node.actions()[:4] == [[7, 0], [107, 0], [207, 0], [307, 0]]


def test_the_history_is_of_ticks(bench: MakeBench) -> None:
    asked: list[np.ndarray] = []

    def compute(request: Request, schedule: int, seed: int | None) -> np.ndarray:
        asked.append(request.observation.values["place"][:, 0])
        return chunk(request, schedule, seed)

    node = bench(loading(compute))
    node.drive(replan_ticks=1)
    node.begin(1.0)
    values = iter(range(2, 1000))
    while len(asked) < 4:
        node.tick(float(next(values)))
    assert asked[0].tolist() == [1, 1]
    assert all(newest - older == 1 for older, newest in asked[1:])


def test_stale_input_stops_motion_says_so_and_motion_goes_on(bench: MakeBench) -> None:
    node = _driving(bench(), replan_ticks=8)
    last = node.actions()[-1]
    while node.status()["motion"] == "executing":
        last = node.actions()[-1]
        node.tick(None)
    assert node.status()["motion"] == "holding"
    assert node.status()["reason"] == "the newest observation is stale"
    # observation_age_ms is 250: two ticks of 100 ms after the last observation, not three.
    assert node.actions()[-1] == last
    node.core.publish_diagnostics()
    told = read_diagnostics(node.transport.sent["/diagnostics"][-1])
    assert (told["level"], told["message"]) == ("STALE", "the newest observation is stale")
    assert int(told["ticks_stale"]) >= 1
    node.until(lambda: node.status()["motion"] == "executing")


@pytest.mark.parametrize(("hold", "sent"), [("repeat", "last"), ("zero", [0.0, 0.0]), ("silent", None)])
def test_what_is_sent_at_a_tick_without_an_action(bench: MakeBench, hold: str, sent: Any) -> None:
    node = _driving(bench(), hold=hold, replan_ticks=100)
    while node.status()["motion"] == "executing":
        count, last = len(node.actions()), node.actions()[-1]
        node.tick(None)
    after = node.actions()[count:]
    assert after == ([] if sent is None else [last if sent == "last" else sent])


def test_no_action_comes_from_refused_input(bench: MakeBench) -> None:
    node = bench()
    node.drive()
    node.transport.deliver("joint_states", node.joints())
    for bad in (node.place(np.nan), node.place(age_ms=-1000)):
        node.transport.deliver("place", bad)
    node.transport.listeners["place"][1]("no message")
    for _ in range(5):
        node.clock.advance_ms(100)
    assert node.actions() == []
    assert node.status()["motion"] == "waiting"
    node.core.publish_diagnostics()
    told = read_diagnostics(node.transport.sent["/diagnostics"][-1])
    assert [told[f"refused_{kind}"] for kind in ("not_finite", "future", "malformed")] == ["1", "1", "1"]
    assert (told["received"], told["sent"]) == ("4", "0")


def test_a_chunk_with_nan_or_beyond_the_limits_never_moves_the_robot(bench: MakeBench) -> None:
    bad = [np.full((8, 2), np.nan, np.float32), np.full((8, 2), 1e6, np.float32)]

    def compute(request: Request, schedule: int, seed: int | None) -> np.ndarray:
        return bad[request.number] if request.number < len(bad) else chunk(request, schedule, seed)

    node = bench(loading(compute))
    _driving(node, action_low=[-1000.0, -1.0], action_high=[1000.0, 1.0])
    assert node.actions()[0] == [7, 0]
    driver = node.core.driver
    assert driver is not None
    assert driver.counters()["refused"] == 2
    assert driver.counters()["requests"] >= 3


def test_reset_begins_a_new_episode_with_another_seed(bench: MakeBench) -> None:
    seeds: list[int | None] = []

    def compute(request: Request, schedule: int, seed: int | None) -> np.ndarray:
        seeds.append(seed)
        return chunk(request, schedule, seed)

    node = _driving(bench(loading(compute)), noise_seed=100)
    count = len(node.actions())
    node.core.reset()
    assert node.await_status(episode=1)["motion"] == "waiting"
    node.begin(50.0)
    node.until(lambda: len(node.actions()) > count, 50.0)
    assert node.actions()[count] == [50, 0]
    assert set(seeds) == {100, 101}
    assert seeds == sorted(seeds, key=str)


def test_counters_survive_a_reset(bench: MakeBench) -> None:
    node = _driving(bench())
    driver = node.core.driver
    assert driver is not None
    before = driver.counters()["executed"]
    assert before == len(node.actions()) > 0
    node.core.reset()
    node.await_status(episode=1)
    assert driver.counters()["executed"] == before


def test_the_schedule_is_switched_without_a_restart(bench: MakeBench) -> None:
    node = _driving(bench(), replan_ticks=1)
    assert {action[1] for action in node.actions()} == {0}
    assert node.core.set_cache("late") == "late-s10"
    node.until(lambda: node.actions()[-1][1] == 2)
    assert node.status()["cache"] == "late-s10"
    with pytest.raises(Mismatch, match="bac-s10"):
        node.core.set_cache("uniform")
    assert node.status()["cache"] == "late-s10"
    node.core.deactivate()
    node.core.set_cache(CACHES[1])
    node.core.activate()
    assert node.await_status(motion="waiting")["cache"] == "bac-s5"


def test_misses_lead_to_a_cheaper_schedule_and_back(bench: MakeBench) -> None:
    node = bench(latency=lambda request: 50.0 if request.level else 250.0)
    node.drive(replan_ticks=2, degrade_misses=2, degrade_window=10, degrade_recover=12)
    node.begin()
    driver = node.core.driver
    assert driver is not None
    node.until(lambda: node.status()["cache"] == "bac-s5")
    assert (driver.counters()["deadline_misses"], driver.counters()["degradations"]) == (2, 1)
    node.until(lambda: node.actions()[-1][1] == 1)
    node.core.publish_diagnostics()
    assert read_diagnostics(node.transport.sent["/diagnostics"][-1])["cache"] == "bac-s5"
    node.until(lambda: node.status()["cache"] == "bac-s10")
    assert driver.counters()["recoveries"] == 1
    # From the last schedule there is nowhere to degrade to.
    node.core.set_cache("late-s10")
    node.until(lambda: driver.counters()["degradations"] == 2)
    node.until(lambda: node.actions()[-1][1] == 2)
    assert node.status()["cache"] == "late-s10"


def test_time_that_jumps_back_begins_anew(bench: MakeBench) -> None:
    node = _driving(bench())
    count = len(node.actions())
    node.clock.set_ns(node.clock.now_ns() - 500_000_000_000)
    node.await_status(motion="waiting")
    assert len(node.actions()) == count
    node.begin(9.0)
    node.until(lambda: len(node.actions()) > count, 9.0)
    assert node.actions()[count] == [9, 0]


def test_inference_that_dies_stops_the_robot_and_says_why(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda told: None)
    alive = [True]

    def compute(request: Request, schedule: int, seed: int | None) -> np.ndarray:
        if not alive[0]:
            raise RuntimeError("CUDA error: out of memory")
        return chunk(request, schedule, seed)

    node = _driving(bench(loading(compute), threaded=True))
    alive[0] = False
    node.until(lambda: node.status()["motion"] == "stopped")
    assert "out of memory" in node.status()["reason"]
    count = len(node.actions())
    node.core.publish_diagnostics()
    assert read_diagnostics(node.transport.sent["/diagnostics"][-1])["level"] == "ERROR"
    alive[0] = True
    node.core.reset()
    node.await_status(motion="waiting", episode=1)
    node.begin()
    node.until(lambda: len(node.actions()) > count)


def test_late_chunks_are_counted_and_the_old_tail_goes_on(bench: MakeBench) -> None:
    node = _driving(bench(loading(), lambda request: 450.0 if request.number == 1 else 50.0), replan_ticks=2)
    driver = node.core.driver
    assert driver is not None
    for _ in range(4):
        node.tick()
    counted = driver.counters()
    # Chunk 1 is asked for two ticks after chunk 0, and should be there a tick later.
    assert (counted["requests"], counted["deadline_misses"], counted["held"]) == (2, 1, 0)
    assert counted["tail"] >= 1
    node.core.publish_diagnostics()
    assert read_diagnostics(node.transport.sent["/diagnostics"][-1])["level"] == "WARN"


def test_chunks_go_out_as_trajectories(bench: MakeBench) -> None:
    node = bench()
    node.drive(output="trajectory", action_names=["x", "y"], replan_ticks=100, observation_age_ms=1e6)
    node.begin()
    # Nothing new is seen, so that nothing new is asked for.
    node.until(lambda: bool(node.transport.sent["action"]), None)
    (first,) = node.transport.sent["action"]
    assert [point.positions[0] for point in first.points] == [7 + 100 * i for i in range(8)]
    assert [point.time_from_start.nanosec for point in first.points[:2]] == [100_000_000, 200_000_000]
    node.until(lambda: len(node.transport.sent["action"]) == 2, None)
    # Where no action is due any more, a trajectory of one point ends the motion.
    assert [list(point.positions) for point in node.transport.sent["action"][1].points] == [[707, 0]]
    for _ in range(3):
        node.tick(None)
    assert len(node.transport.sent["action"]) == 2


def test_quality_of_service(bench: MakeBench) -> None:
    node = bench()
    node.core.configure(PARAMETERS)
    profiles = node.transport.profiles
    sensor, action, status = profiles["joint_states"], profiles["action"], profiles["~/status"]
    assert (sensor.reliable, sensor.depth, sensor.deadline_s, sensor.liveliness_s) == (False, 5, None, None)
    assert (action.reliable, action.depth, action.deadline_s, action.liveliness_s) == (True, 1, 0.2, 1.0)
    assert (status.reliable, status.depth, status.latched) == (True, 1, True)


def test_diagnostics_have_what_an_engineer_asks_for(bench: MakeBench) -> None:
    node = _driving(bench(), deadline_ticks=5)
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
    assert node.transport.sent["/diagnostics"][-1].status[0].hardware_id == "toy device"
    assert told["sent"] == str(len(node.actions()))


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
