"""``python -m ros2_bridge.sim --task push_t``: an environment as a robot, over the node's topics, in real time.

::

    tick k      publish what is sensed now      the node ticks phase_ms later, and sends the action of its tick
                step as soon as it comes        the world is one control step further at tick k + 1
    no action   before the first: the world rests; after it: the last action goes on, and the tick counts as missed
    too slow    a world that cannot keep up goes on from now, never twice as fast, and the tick counts as overrun
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bac.control.clock import NS_PER_MS, NS_PER_S, TickGrid
from bac.errors import BacError, InvalidInput, sentence
from bac.files import write_whole
from envs.errors import EnvError
from envs.robomimic_tasks import TASKS
from envs.stage import Env
from ros2_bridge.__main__ import CONFIG
from ros2_bridge.distributions import absolute_name
from ros2_bridge.node_clock import SystemClock
from ros2_bridge.open_transport import open_dds
from ros2_bridge.parameters import parameter_file
from ros2_bridge.robot_messages import robot_messages
from ros2_bridge.settings import NodeSettings
from ros2_bridge.transport import COMMAND, EVENT, SENSOR, STATUS, Transport

if TYPE_CHECKING:
    from envs.push_t import PushTEnv
    from envs.robomimic import RobomimicEnv

_LATEST_STEP = 0.8
"""Share of a tick after which the robot no longer waits for the tick's action: the step itself takes time."""

_NODE_STARTS_S = 300.0


@dataclass(frozen=True)
class SimulatedEpisode:
    """What an episode came to.

    Attributes:
        seed: of the environment.
        score: highest reward.
        success: the environment said so.
        steps: control steps.
        rested: ticks before the first action.
        missed: ticks after it without an action.
        surplus: actions beyond one per tick.
        overruns: ticks that began more than a tick late, for the world itself was too slow.
    """

    seed: int
    score: float
    success: bool
    steps: int
    rested: int
    missed: int
    surplus: int
    overruns: int


class Robot:
    """An environment behind topics.

    Args:
        env: the world.
        settings: parameters of the node, for the topics.
        transport: carries the messages.
        node: absolute name of the policy's node.
        delay_ms: sensors' messages leave so late.
        loss: share of the sensors' messages that never leave, in [0, 1).
    """

    def __init__(
        self,
        env: Env,
        settings: NodeSettings,
        transport: Transport,
        node: str = "/policy_node",
        *,
        delay_ms: float = 0.0,
        loss: float = 0.0,
    ) -> None:
        if not delay_ms >= 0 or not 0 <= loss < 1:
            raise InvalidInput(
                sentence("sensors", expected="delay_ms >= 0, loss in [0, 1)", got=(delay_ms, loss), mend="correct them")
            )
        self._env, self._settings, self._transport = env, settings, transport
        self._clock = SystemClock()
        self._loss, self._luck = loss, np.random.default_rng(0)
        self._line = _DelayLine(delay_ms)
        self._told = threading.Condition()
        self._status: dict[str, Any] = {}
        self._plan: list[np.ndarray] = []
        self._commands = self._played = 0
        self._publishers = {
            source.topic: transport.publisher(source.topic, source.type_name, SENSOR) for source in settings.sources
        }
        self._reset = transport.publisher(f"{node}/reset", "std_msgs/msg/Empty", EVENT)
        transport.subscribe(f"{node}/status", "std_msgs/msg/String", STATUS, self._on_status, _ignore)
        trajectory = settings.values["output"] == "trajectory"
        action_type = "trajectory_msgs/msg/JointTrajectory" if trajectory else "std_msgs/msg/Float64MultiArray"
        take = self._on_trajectory if trajectory else self._on_action
        transport.subscribe(settings.values["action_topic"], action_type, COMMAND, take, _ignore)

    def play(self, seed: int, max_steps: int) -> SimulatedEpisode:
        """Play an episode with the node, which is reset before unless it still waits for its first observation."""
        self._begin_at_node()
        observation, _ = self._env.reset(seed=seed)
        rewards: list[float] = []
        success = over = False
        rested = missed = surplus = overruns = 0
        action: np.ndarray | None = None
        with self._told:
            self._plan, self._commands = [], 0
        rate_hz = self._settings.values["rate_hz"]
        grid, tick = TickGrid(self._clock.now_ns(), rate_hz), 0
        for _ in range(max_steps):
            now_ns = self._clock.now_ns()
            if now_ns > grid.at_ns(tick + 1):
                overruns += 1
                grid, tick = TickGrid(now_ns, rate_hz), 0
            self._clock.sleep_until_ns(grid.at_ns(tick))
            self._publish(observation)
            arrived, planned = self._await_command(grid, tick)
            tick += 1
            surplus += max(arrived - 1, 0)
            if planned is None and action is None:
                rested += 1
                continue
            missed += planned is None
            action = action if planned is None else planned
            assert action is not None  # one of the two is
            observation, reward, terminated, truncated, info = self._env.step(action)
            rewards.append(float(reward))
            success |= bool(info.get("is_success", terminated))
            over = terminated or truncated
            if over:
                break
        score = max(rewards, default=0.0)
        return SimulatedEpisode(seed, score, success, len(rewards), rested, missed, surplus, overruns)

    def close(self) -> None:
        """Let nothing more leave."""
        self._line.close()

    def _begin_at_node(self) -> None:
        with self._told:
            self._wait_until(lambda: self._status.get("state") == "active", "an active node")
            fresh = self._status["motion"] == "waiting" and not self._played
            self._played += 1
            wanted = self._status["episode"] + (not fresh)
        if not fresh:
            self._reset.publish(self._transport.make("std_msgs/msg/Empty"))
            with self._told:
                self._wait_until(lambda: self._status.get("episode", -1) >= wanted, f"episode {wanted} at the node")

    def _publish(self, observation: Mapping[str, np.ndarray]) -> None:
        now_ns = self._clock.ros_ns()
        for topic, message in robot_messages(self._transport.make, self._settings.sources, observation, now_ns).items():
            if self._luck.random() >= self._loss:
                publish = self._publishers[topic].publish
                self._line.put(partial(publish, message))

    def _await_command(self, grid: TickGrid, tick: int) -> tuple[int, np.ndarray | None]:
        """Return how many messages came in this tick, and the action to execute in it."""
        latest_ns = grid.at_ns(tick) + round(float(grid.period_ns) * _LATEST_STEP)
        with self._told:
            self._told.wait_for(lambda: self._commands, (latest_ns - self._clock.now_ns()) / NS_PER_S)
            arrived, self._commands = self._commands, 0
            return arrived, self._plan.pop(0) if self._plan else None

    def _wait_until(self, so: Callable[[], bool], what: str) -> None:
        if not self._told.wait_for(so, _NODE_STARTS_S):
            raise InvalidInput(
                sentence("simulator", expected=what, got=f"status {self._status}", mend="start the node")
            )

    def _on_status(self, message: Any, source: str) -> None:
        with self._told:
            self._status = json.loads(message.data)
            self._told.notify_all()

    def _on_action(self, message: Any, source: str) -> None:
        self._take([np.array(message.data)])

    def _on_trajectory(self, message: Any, source: str) -> None:
        self._take([np.array(point.positions) for point in message.points])

    def _take(self, actions: list[np.ndarray]) -> None:
        with self._told:
            self._plan = actions
            self._commands += 1
            self._told.notify_all()


class _DelayLine:
    """Calls later, in a thread; with no delay, at once and in this one."""

    def __init__(self, delay_ms: float) -> None:
        self._delay_ns = round(delay_ms * NS_PER_MS)
        self._clock = SystemClock()
        self._waiting: list[tuple[int, int, Callable[[], None]]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._count = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], None]) -> None:
        if not self._delay_ns:
            call()
            return
        with self._changed:
            self._count += 1
            heapq.heappush(self._waiting, (self._clock.now_ns() + self._delay_ns, self._count, call))
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                due_ns, _, call = self._waiting[0]
                if self._changed.wait_for(lambda: self._closed, (due_ns - self._clock.now_ns()) / NS_PER_S):
                    return
                heapq.heappop(self._waiting)
            call()


def make_env(task: str, max_steps: int | None = None) -> PushTEnv | RobomimicEnv:
    """Return the environment that is the robot.

    Args:
        task: ``push_t`` or one of robomimic's.
        max_steps: control steps of an episode; None for the published number.

    Raises:
        InvalidInput: there is none for the task.
        EnvError: its packages are not here, or fewer than one step.
    """
    if task not in {"push_t", *TASKS}:
        known = sorted({"push_t", *TASKS})
        raise InvalidInput(sentence("task", expected=f"one of {known}", got=task, mend="choose one"))
    # Here, for each needs packages of its own.
    if task == "push_t":
        from envs.push_t import PushTEnv

        return PushTEnv() if max_steps is None else PushTEnv(max_steps=max_steps)
    from envs.robomimic import RobomimicEnv

    return RobomimicEnv(task, max_steps=max_steps)


def main(arguments: Sequence[str] | None = None) -> None:
    """Play episodes, print a line for each, write them as JSON if asked to."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    try:
        if options.episodes < 1:
            raise InvalidInput(sentence("--episodes", expected="1 or more", got=options.episodes, mend="correct it"))
        settings = NodeSettings.read(parameter_file(Path(options.params or CONFIG / f"{options.task}.yaml")))
        env, transport = make_env(options.task, options.max_steps), open_dds(options)
        robot = Robot(
            env,
            settings,
            transport,
            absolute_name(options.policy_node, options.namespace),
            delay_ms=options.delay_ms,
            loss=options.loss,
        )
        try:
            episodes = []
            for seed in range(options.seed, options.seed + options.episodes):
                episodes.append(robot.play(seed, env.max_steps))
                print(episodes[-1], flush=True)
        finally:
            robot.close()
            transport.close()
            env.close()
    except (BacError, EnvError) as refusal:
        sys.exit(f"error: {refusal}")
    if options.output:
        text = json.dumps([asdict(each) for each in episodes], indent=2) + "\n"
        write_whole(Path(options.output), lambda path: path.write_text(text))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ros2_bridge.sim", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", default="push_t")
    parser.add_argument("--params", help="the node's parameter file, for the topics")
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=100000)
    parser.add_argument("--max-steps", type=int, help="control steps of an episode; by default the task's")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="sensors' messages leave so late")
    parser.add_argument("--loss", type=float, default=0.0, help="share of the sensors' messages that is lost")
    parser.add_argument("--output", help="JSON file of the episodes")
    parser.add_argument("--domain", type=int)
    parser.add_argument("--ros-distro", help="humble, jazzy (by default), kilted")
    parser.add_argument("--node", default="robot")
    parser.add_argument("--namespace", default="/")
    parser.add_argument("--policy-node", default="policy_node")
    return parser


def _ignore(told: str) -> None:
    logging.getLogger(__name__).error("%s", told)


if __name__ == "__main__":
    main()
