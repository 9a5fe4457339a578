"""The simulated robot with a node in the test's hand: what it publishes, executes and counts."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest

pytest.importorskip("rosbags")
pytest.importorskip("gymnasium")

from bac.control.clock import NS_PER_MS
from bac.errors import InvalidInput
from ros2_bridge import sim
from ros2_bridge.__main__ import CONFIG
from ros2_bridge.conversion import action_message, stamp_ns, trajectory_message
from ros2_bridge.intake import Intake
from ros2_bridge.mapping import require_sources
from ros2_bridge.node_clock import SystemClock
from ros2_bridge.parameters import parameter_file
from ros2_bridge.settings import NodeSettings
from ros2_bridge.sim import Robot, main, make_env
from tests.ros2_bridge.toys import PARAMETERS, PATIENCE_S, LocalTransport


class Track(gymnasium.Env[dict[str, Any], np.ndarray]):
    """A world whose place is the sum of the actions, and whose reward is how many there were."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.taken: list[float] = []
        self.seed = seed
        return self._seen(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.taken.append(float(action[0]))
        return self._seen(), float(len(self.taken)), len(self.taken) == 6, False, {"is_success": len(self.taken) == 6}

    def _seen(self) -> dict[str, Any]:
        place = np.array([sum(self.taken), 0.0], np.float32)
        return {"joints": np.zeros(2, np.float32), "place": place}


class Node:
    """Answers every place that is published with what ``answer`` makes of its number."""

    def __init__(self, transport: LocalTransport, answer: Callable[[int], Any], motion: str = "waiting") -> None:
        self.transport, self.episode, self.seen = transport, 0, []
        self._answer, self._motion = answer, motion
        transport.on_publish = self._hear
        self.say()

    def say(self) -> None:
        status = {"state": "active", "motion": self._motion, "episode": self.episode}
        message = self.transport.make("std_msgs/msg/String", data=json.dumps(status))
        self.transport.deliver("/policy_node/status", message)

    def _hear(self, topic: str, message: Any) -> None:
        if topic == "/policy_node/reset":
            self.episode, self._motion = self.episode + 1, "waiting"
            self.say()
        elif topic == "place":
            self.seen.append(message.pose.position.x)
            answer = self._answer(len(self.seen) - 1)
            for each in answer if isinstance(answer, list) else [answer]:
                if each is not None:
                    self.transport.deliver("action", each)


def _robot(transport: LocalTransport, env: gymnasium.Env[Any, Any], **changed: Any) -> Robot:
    settings = NodeSettings.read(PARAMETERS | {"rate_hz": 200.0} | changed)
    return Robot(env, settings, transport)


@pytest.fixture
def transport() -> LocalTransport:
    return LocalTransport()


def _act(transport: LocalTransport, value: float) -> Any:
    return action_message(transport.make, np.array([value, 0.0]))


def test_an_action_is_executed_in_its_tick_and_the_world_rests_before_the_first(transport: LocalTransport) -> None:
    env = Track()
    robot = _robot(transport, env)
    node = Node(transport, lambda number: None if number < 2 else _act(transport, number))
    played = robot.play(7, 20)
    robot.close()
    assert (env.seed, env.taken) == (7, [2, 3, 4, 5, 6, 7])
    assert node.seen == [0, 0, 0, 2, 5, 9, 14, 20]
    assert (played.seed, played.score, played.success) == (7, 6.0, True)
    assert (played.steps, played.rested, played.missed, played.surplus) == (6, 2, 0, 0)


def test_ticks_without_an_action_repeat_the_last_and_count(transport: LocalTransport) -> None:
    env = Track()
    robot = _robot(transport, env)
    answers = {0: 1.0, 3: 5.0, 4: [6.0, 7.0]}

    def answer(number: int) -> Any:
        given = answers.get(number)
        values = given if isinstance(given, list) else [] if given is None else [given]
        return [_act(transport, value) for value in values]

    Node(transport, answer)
    played = robot.play(0, 5)
    robot.close()
    assert env.taken == [1, 1, 1, 5, 7]
    assert (played.steps, played.rested, played.missed, played.surplus) == (5, 0, 2, 1)


def test_a_trajectory_is_followed_point_by_point(transport: LocalTransport) -> None:
    env = Track()
    robot = _robot(transport, env, output="trajectory", action_names=["x", "y"])
    chunks = {0: [1.0, 2.0, 3.0], 2: [7.0, 8.0]}

    def answer(number: int) -> Any:
        if number not in chunks:
            return None
        actions = np.array([[value, 0.0] for value in chunks[number]])
        return trajectory_message(transport.make, ["x", "y"], actions, 5e6, 1)

    Node(transport, answer)
    played = robot.play(0, 5)
    robot.close()
    assert env.taken == [1, 2, 7, 8, 8]
    assert (played.missed, played.surplus) == (1, 0)


def test_a_busy_node_is_reset_first_and_a_waiting_one_is_not(transport: LocalTransport) -> None:
    robot = _robot(transport, Track())
    node = Node(transport, lambda number: _act(transport, 1.0), motion="executing")
    robot.play(0, 2)
    assert node.episode == 1
    robot.play(1, 2)
    assert node.episode == 2
    robot.close()
    fresh = LocalTransport()
    robot = _robot(fresh, Track())
    node = Node(fresh, lambda number: _act(fresh, 1.0))
    robot.play(0, 2)
    robot.close()
    assert node.episode == 0


def test_lost_messages_never_leave(transport: LocalTransport) -> None:
    robot = Robot(Track(), NodeSettings.read(PARAMETERS | {"rate_hz": 200.0}), transport, loss=0.1)
    Node(transport, lambda number: None)
    assert robot.play(0, 100).rested == 100
    robot.close()
    # One draw per message, joints before place: of numpy's under seed 0, ten and eleven of a hundred are below 0.1.
    assert (len(transport.sent["joint_states"]), len(transport.sent["place"])) == (90, 89)


def test_delayed_messages_leave_later_and_all_of_them(
    transport: LocalTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stamps on the clock that the delay is measured on: the system's date may be set meanwhile.
    monkeypatch.setattr(SystemClock, "ros_ns", SystemClock.now_ns)
    # A codec compiles at its first message: all of them would leave later than a line without delay lets them.
    for kind in ("sensor_msgs/msg/JointState", "geometry_msgs/msg/PoseStamped"):
        transport.types.warm_up(kind)
    robot = Robot(Track(), NodeSettings.read(PARAMETERS | {"rate_hz": 200.0}), transport, delay_ms=30.0)
    departures: list[tuple[int, int]] = []
    threads, left = set(), threading.Semaphore(0)
    Node(transport, lambda number: None)

    def hear(topic: str, message: Any) -> None:
        if topic == "place":
            departures.append((stamp_ns(message) or 0, time.monotonic_ns()))
            threads.add(threading.get_ident())
            left.release()

    transport.on_publish = hear
    played = robot.play(0, 6)
    for _ in range(6):
        assert left.acquire(timeout=PATIENCE_S)
    robot.close()
    assert played.rested == 6
    assert len(transport.sent["place"]) == len(transport.sent["joint_states"]) == 6
    assert threading.get_ident() not in threads
    assert all(left_ns - stamped_ns >= 30 * NS_PER_MS for stamped_ns, left_ns in departures)
    assert departures == sorted(departures)


class Remembering(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Keeps every observation that is given."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.given: list[dict[str, np.ndarray]] = []

    def reset(self, **options: Any) -> Any:
        observation, info = self.env.reset(**options)
        self.given.append(observation)
        return observation, info

    def step(self, action: Any) -> Any:
        observation, *rest = self.env.step(action)
        self.given.append(observation)
        return observation, *rest


@pytest.mark.sim
def test_lift_as_a_robot_gives_the_node_the_environment_s_observation(transport: LocalTransport) -> None:
    """The world, the parameter file that ships and the node's intake, with CDR between them."""
    pytest.importorskip("robosuite", reason="pip install -e '.[robomimic]'")
    env = Remembering(make_env("lift", 5))
    settings = NodeSettings.read(parameter_file(CONFIG / "lift.yaml"))
    shapes = {key: space.shape for key, space in env.observation_space.spaces.items()}
    require_sources(settings.sources, shapes)
    intake = Intake(settings.sources, shapes, SystemClock(), silence_ms=1e9, ahead_ms=1e9)
    robot = Robot(env, settings, transport)
    frames: list[Mapping[str, np.ndarray]] = []

    def forward(topic: str, message: Any) -> None:
        if topic not in intake.topics:
            return
        kind = intake.topics[topic]
        read = transport.types.deserialize(kind, transport.serialize(kind, message))
        intake.receive(topic, read, "robot")
        if topic == list(intake.topics)[-1]:
            frame = intake.frame()
            assert frame is not None
            frames.append(frame.values)
            # The hand stays above the table, pointing downwards, and opens.
            stay = [*frame.values["robot0_eef_pos"], 1, 0, 0, 0, -1, 0, -1]
            transport.deliver("action", action_message(transport.make, np.array(stay, np.float64)))

    Node(transport, lambda number: None)
    transport.on_publish = forward
    played = robot.play(100000, 5)
    robot.close()
    env.close()
    assert (played.steps, played.rested, played.missed, played.surplus) == (5, 0, 0, 0)
    assert len(frames) == 5
    # The last step's is of an episode that is over.
    for frame, given in zip(frames, env.given[:-1], strict=True):
        assert frame.keys() == given.keys()
        for key, value in given.items():
            np.testing.assert_array_equal(frame[key], value, key, strict=True)
    assert intake.received == 15
    assert not intake.refused
    assert not np.array_equal(frames[0]["robot0_eef_quat"], frames[-1]["robot0_eef_quat"])


@pytest.mark.parametrize("given", [{"loss": 1.0}, {"loss": -0.1}, {"delay_ms": -1.0}])
def test_sensors_that_make_no_sense_are_refused(transport: LocalTransport, given: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="sensors"):
        Robot(Track(), NodeSettings.read(PARAMETERS), transport, **given)


@pytest.mark.parametrize(
    ("namespace", "node"), [("/", "/policy_node"), ("robot", "/robot/policy_node"), ("/robot/", "/robot/policy_node")]
)
def test_the_node_is_looked_for_in_its_namespace(
    transport: LocalTransport, monkeypatch: pytest.MonkeyPatch, namespace: str, node: str
) -> None:
    monkeypatch.setattr(sim, "make_env", lambda task, max_steps: SimpleNamespace(max_steps=1, close=lambda: None))
    monkeypatch.setattr(sim, "open_dds", lambda options: transport)
    monkeypatch.setattr(Robot, "play", lambda robot, seed, max_steps: None)
    main(["--namespace", namespace])
    assert {f"{node}/status", f"{node}/reset"} <= transport.profiles.keys()


def test_tasks_without_an_environment_are_refused() -> None:
    with pytest.raises(InvalidInput, match="push_t"):
        make_env("kitchen")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--episodes", "error: --episodes: expected 1 or more, got 0; correct it."),
        ("--max-steps", "error: Push-T: expected max_steps >= 1"),
    ],
)
def test_nothing_to_play_is_refused_before_a_node_is_waited_for(option: str, told: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([option, "0"])
    assert str(ended.value).startswith(told)
