"""robomimic's tasks behind our interface; everything here needs the packages of the extra ``robomimic``."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("robosuite", reason="pip install -e '.[robomimic]'")

import gymnasium
from gymnasium.utils.env_checker import check_env

from envs.errors import EnvError
from envs.robomimic import RobomimicEnv, env_args
from envs.robomimic_tasks import TASKS, is_absolute
from envs.rollout import rollout
from envs.rotations import six_from_matrix

pytestmark = pytest.mark.sim

SIZES = {"lift": 19, "can": 23, "square": 23, "tool_hang": 53, "transport": 59}
"""The observation sizes of the original low-dim configurations."""


def play(env: RobomimicEnv, steps: int = 12, **reset: Any) -> np.ndarray:
    """Return everything seen in an episode of random deltas, one behind the other."""
    seen, info = env.reset(**reset)
    trace = [*seen.values(), info["state"]]
    for action in np.random.default_rng(0).uniform(-1, 1, (steps, *env.action_space.shape)):
        seen, reward, _, _, info = env.step(action)
        trace += [*seen.values(), info["state"], [reward]]
    return np.concatenate(trace)


@pytest.fixture(scope="module")
def lift() -> RobomimicEnv:
    return RobomimicEnv("lift", absolute=False)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_observes_in_the_original_order_and_steps(name: str) -> None:
    env = RobomimicEnv(name)
    seen, info = env.reset(seed=100000)
    assert list(seen)[:4] == ["object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"]
    assert sum(len(values) for values in seen.values()) == SIZES[name]
    assert env.observation_space.contains(seen)
    assert env.action_space.shape == (20 if name == "transport" else 10,)
    assert env.max_steps == (700 if name in {"tool_hang", "transport"} else 400)
    assert not info["is_success"]
    # A pose 2 cm above each hand, as it is turned: it goes there.
    above = np.array([0, 0, 0.02])
    hands = [seen[f"robot{arm}_eef_pos"] for arm in range(TASKS[name].arms)]
    turned = [six_from_matrix(robot.controller.ee_ori_mat) for robot in env.simulation.robots]
    target = np.concatenate([[*hand + above, *six, -1] for hand, six in zip(hands, turned, strict=True)])
    for _ in range(15):
        seen, *_ = env.step(target)
    for arm, hand in enumerate(hands):
        assert abs(seen[f"robot{arm}_eef_pos"] - hand - above).max() < 0.01
    env.close()


@pytest.mark.filterwarnings("ignore:.*observation space.*infinity", "ignore:.*infinity")
def test_environment_passes_gymnasium_checks() -> None:
    check_env(
        gymnasium.make("bac/Robomimic-v0", task="lift", absolute=False, max_steps=5).unwrapped, skip_render_check=True
    )


EPISODES = [*((name, False) for name in sorted(TASKS)), ("can", True)]
"""Task and whether actions are absolute, of the episodes that are the same in any process."""


@pytest.fixture(scope="module")
def played_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What ``play`` returns in another process, by task and kind of actions: one for all, as importing is slow."""
    path = tmp_path_factory.mktemp("played") / "played.npz"
    code = (
        "import sys, numpy as np; from envs.robomimic import RobomimicEnv; from tests.envs.test_robomimic import *;"
        "played = {f'{name} {absolute}': play(RobomimicEnv(name, absolute=absolute), seed=5)"
        " for name, absolute in EPISODES}; np.savez(sys.argv[1], **played)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    with np.load(path) as played:
        return dict(played)


@pytest.mark.parametrize(("name", "absolute"), EPISODES)
def test_same_seed_is_the_same_episode_here_and_in_another_process(
    name: str, absolute: bool, played_elsewhere: dict[str, np.ndarray]
) -> None:
    np.random.seed(1)
    env = RobomimicEnv(name, absolute=absolute)
    first = play(env, seed=5)
    drawn = np.random.rand()
    other = play(env, seed=6)
    assert first.shape == other.shape
    assert not np.array_equal(other, first)
    np.testing.assert_array_equal(play(env, seed=5), first)
    np.testing.assert_array_equal(played_elsewhere[f"{name} {absolute}"], first)
    # What robosuite draws from numpy's generator is given back.
    np.random.seed(1)
    assert np.random.rand() == drawn
    env.close()


class _Drawn:
    """Draws a chunk of two actions from each row's key, and notes what it was shown."""

    observation_steps = 2

    def __init__(self) -> None:
        self.shown: dict[tuple[int, int], np.ndarray] = {}

    def predict(self, observation: Mapping[str, np.ndarray], noise_keys: Sequence[tuple[int, int]]) -> np.ndarray:
        for row, key in enumerate(noise_keys):
            self.shown[key] = np.concatenate([values[row].ravel() for values in observation.values()])
        return np.stack([np.random.default_rng(key).uniform(-1, 1, (2, 10)) for key in noise_keys])


def test_rollout_is_the_same_in_any_number_of_processes() -> None:
    shown = []
    for processes in (1, 2):
        policy = _Drawn()
        episodes = rollout(
            partial(RobomimicEnv, "can", max_steps=9), policy, [5, 6, 7], parallel=2, processes=processes
        )
        assert [(episode.seed, episode.steps) for episode in episodes] == [(5, 9), (6, 9), (7, 9)]
        shown.append(policy.shown)
    one, two = shown
    assert one.keys() == two.keys() == {(seed, chunk) for seed in (5, 6, 7) for chunk in range(5)}
    for key, seen in one.items():
        np.testing.assert_array_equal(two[key], seen)
    assert not np.array_equal(one[5, 4], one[6, 4])


def test_seeds_are_those_of_the_original_runners(lift: RobomimicEnv) -> None:
    # diffusion_policy seeds numpy's generator and lets robosuite draw.
    seen, _ = lift.reset(seed=100000)
    np.random.seed(100000)
    expected = lift._world.reset()
    np.testing.assert_array_equal(seen["object"], expected["object"].astype(np.float32))


def test_reset_to_a_state_forgets_the_episode_before(lift: RobomimicEnv) -> None:
    _, info = lift.reset(seed=3)
    start = {"state": info["state"], "model": lift.model()}
    first = play(lift, options=start)
    np.testing.assert_array_equal(first[19:51], info["state"])
    play(lift, seed=8)
    np.testing.assert_array_equal(play(lift, options=start), first)
    np.testing.assert_array_equal(play(RobomimicEnv("lift", absolute=False), options=start), first)


def test_episode_is_truncated_at_its_last_step() -> None:
    env = RobomimicEnv("lift", absolute=False, max_steps=2)
    for _ in range(2):
        env.reset(seed=0)
        assert [env.step(np.zeros(7))[2:4] for _ in range(2)] == [(False, False), (False, True)]


def test_success_is_robomimics(lift: RobomimicEnv) -> None:
    _, info = lift.reset(seed=0)
    state = info["state"].copy()
    # Time, 9 joints of arm and fingers, then the cube's position: lifted by 10 cm.
    state[12] += 0.1
    lift.reset(options={"state": state, "model": lift.model()})
    _, reward, terminated, _, info = lift.step(np.zeros(7))
    assert (reward, terminated, info["is_success"]) == (1, True, True)


def test_wrong_input_refuses(lift: RobomimicEnv) -> None:
    lift.reset(seed=0)
    for action in (np.zeros(10), np.full(7, np.nan)):
        with pytest.raises(EnvError, match=r"^lift action: expected \(7,\) finite numbers, got"):
            lift.step(action)
    for options in ({"state": np.zeros(32)}, {"state": np.zeros(45), "model": lift.model()}, {"states": 1}):
        with pytest.raises(EnvError, match=r"^lift reset options: expected {'state': \(32,\) numbers"):
            lift.reset(options=options)
    with pytest.raises(EnvError, match=r"^lift seed: expected 0 to 4294967295, got -1"):
        lift.reset(seed=-1)
    with pytest.raises(EnvError, match=r"^robomimic task: expected one of .*, got 'stack'"):
        RobomimicEnv("stack")
    with pytest.raises(EnvError, match=r"^lift: expected observations among .*, got \['robot1_eef_pos'\]"):
        RobomimicEnv("lift", observation=["robot1_eef_pos"])
    with pytest.raises(EnvError, match=r"^lift: expected max_steps"):
        RobomimicEnv("lift", max_steps=0)
    with pytest.raises(EnvError, match=r"^can actions: expected 10 channels \(absolute\) or 7 \(delta\), got 2"):
        is_absolute("can", 2)


@pytest.mark.parametrize("name", ["can", "transport"])
def test_env_args_build_the_same_environment_in_robomimic(name: str) -> None:
    env = RobomimicEnv(name, absolute=False)
    stored = json.loads(json.dumps(env_args(name, absolute=False)))
    assert stored == json.loads(json.dumps(env._world.serialize()))


def test_action_without_a_rotation_refuses_and_changes_nothing() -> None:
    env = RobomimicEnv("lift")
    _, before = env.reset(seed=0)
    with pytest.raises(EnvError, match=r"^lift action: expected two independent rows of a rotation, got"):
        env.step(np.zeros(10))
    np.testing.assert_array_equal(env._info()["state"], before["state"])


def test_two_environments_draw_their_own_scenes() -> None:
    keys = ("robot0_eef_pos", "agentview_image")
    pair = [RobomimicEnv(name, absolute=False, observation=keys, render_size=48) for name in ("lift", "square")]
    first = [env.reset(seed=1)[0]["agentview_image"] for env in pair]
    assert (first[0].shape, first[0].dtype) == ((3, 84, 84), np.float32)
    frames = [env.render() for env in pair]
    assert abs(frames[0].astype(float) - frames[1]).mean() > 5
    for env, before, frame in zip(pair, first, frames, strict=True):
        np.testing.assert_array_equal(env.render(), frame)
        seen = env.step(np.zeros(7))[0]["agentview_image"]
        assert abs(seen - before).mean() < 0.01
        assert 0 <= seen.min() < seen.max() <= 1


def test_undrawn_steps_change_nothing_but_what_they_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("robot0_eye_in_hand_image", "robot0_eef_pos", "agentview_image")
    env = RobomimicEnv("lift", absolute=False, observation=keys)
    env.reset(seed=3)
    drawn = []
    draw = type(env.simulation.sim).render

    def counted(*args: Any, **settings: Any) -> np.ndarray:
        drawn.append(settings["camera_name"])
        return draw(*args, **settings)

    monkeypatch.setattr(type(env.simulation.sim), "render", counted)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 7))
    whole = [env.step(action) for action in actions]
    cameras = 2 * len(actions)
    assert len(drawn) == cameras
    env.reset(seed=3)
    drawn.clear()
    partly = [env.step_undrawn(action) for action in actions[:3]]
    assert not drawn
    partly.append(env.step(actions[3]))
    assert len(drawn) == 2
    assert [list(each[0]) for each in partly] == [["robot0_eef_pos"]] * 3 + [list(keys)]
    for seen, expected in zip(partly, whole, strict=True):
        np.testing.assert_array_equal(seen[4]["state"], expected[4]["state"])
        for key, value in seen[0].items():
            np.testing.assert_array_equal(value, expected[0][key])


def test_without_graphics_all_but_rendering_works() -> None:
    code = """
from envs.robomimic import RobomimicEnv
from envs.errors import EnvError
env = RobomimicEnv("lift", absolute=False)
env.reset(seed=0)
env.step([0] * 7)
for draw in (env.render, lambda: RobomimicEnv("lift", observation=["agentview_image"])):
    try:
        draw()
    except EnvError as error:
        print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"} | {"MUJOCO_GL": "glx"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.count("rendering: expected a working EGL or OSMesa library, got neither") == 2
    assert len(done.stdout.splitlines()) == 2
