import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs.demos.push_t import PushTDemonstrations, read_push_t
from envs.errors import EnvError
from envs.push_t import BLOCK_KEYPOINTS, PushTEnv, block_keypoints, original_start

GOAL = np.array([256.0, 256.0, np.pi / 4])
# Positions up to 512 pixels and angles up to 2 pi (at 130 pixels from the origin) are rounded to float32.
ROUNDING_PX = 1e-4


@pytest.fixture(scope="module")
def demos() -> PushTDemonstrations:
    return read_push_t()


@pytest.fixture(scope="module")
def env() -> PushTEnv:
    return PushTEnv(render_size=96)


def starts(demos: PushTDemonstrations) -> np.ndarray:
    return np.concatenate([[0], demos.episode_ends[:-1]])


def local_keypoints(demos: PushTDemonstrations) -> np.ndarray:
    """Return float64[N, 9, 2]: each frame's keypoints in the frame of the recorded block pose."""
    x, y, angle = demos.states[:, 2:].astype(np.float64).T
    offset = demos.observations["keypoints"].reshape(-1, 9, 2) - np.stack([x, y], -1)[:, None]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.stack([cos * offset[..., 0] + sin * offset[..., 1], cos * offset[..., 1] - sin * offset[..., 0]], -1)


def resting(demos: PushTDemonstrations) -> np.ndarray:
    """Return bool[N]: the frames whose keypoints agree with most others, so with the recorded pose."""
    local = local_keypoints(demos)
    return np.asarray(np.abs(local - np.median(local, axis=0)).max((1, 2)) < 5e-5)


def play(env: PushTEnv, seed: int, steps: int = 40) -> list[Any]:
    """Chase the block's first keypoint, so that there is contact."""
    observation, info = env.reset(seed=seed)
    trace = [*observation.values(), info["state"], env.render()]
    for _ in range(steps):
        observation, reward, _, _, info = env.step(observation["keypoints"][:2])
        trace += [*observation.values(), info["state"], reward, env.render()]
    return trace


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized")  # the action space is the original's
def test_environment_passes_gymnasium_checks() -> None:
    check_env(gymnasium.make("bac/PushT-v0", max_steps=5).unwrapped)


def test_import_is_silent_and_needs_no_screen() -> None:
    code = "import envs.push_t, os; assert os.environ['SDL_VIDEODRIVER'] == 'dummy'"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_same_seed_plays_the_same_episode_bit_for_bit(env: PushTEnv) -> None:
    first = play(env, 3)
    play(env, 4)
    assert all(np.array_equal(a, b) for a, b in zip(first, play(env, 3), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first, play(PushTEnv(render_size=96), 3), strict=True))


def test_other_seed_plays_another_episode(env: PushTEnv) -> None:
    assert not np.array_equal(play(env, 3, steps=0)[0], play(env, 4, steps=0)[0])


def test_without_a_seed_the_episodes_follow_from_the_last_seed(env: PushTEnv) -> None:
    env.reset(seed=5)
    episodes = [env.reset()[1]["state"] for _ in range(2)]
    env.reset(seed=5)
    again = [env.reset()[1]["state"] for _ in range(2)]
    np.testing.assert_array_equal(episodes, again)
    assert not np.array_equal(*episodes)


def test_published_seeds_start_as_the_original_draws(env: PushTEnv) -> None:
    # What RandomState(100000) gives for the original's five calls, in its order.
    np.testing.assert_allclose(original_start(100000), [235, 124, 335, 128, -0.90492743], atol=1e-8)
    _, info = env.reset(seed=100000)
    # The original places the block, then turns it about its centre of mass (0, 45).
    turned = [335 - 45 * np.sin(0.90492743), 128 + 45 - 45 * np.cos(0.90492743), 2 * np.pi - 0.90492743]
    np.testing.assert_allclose(info["state"], [235, 124, *turned], atol=1e-6)


def test_demonstrations_start_at_seeds_0_to_205(env: PushTEnv, demos: PushTDemonstrations) -> None:
    # diffusion_policy recorded them "in seed order, starting with 0": 206 starts that its own code drew.
    states = [env.reset(seed=seed)[1]["state"] for seed in range(206)]
    np.testing.assert_allclose(states, demos.states[starts(demos)], atol=ROUNDING_PX)


def test_keypoints_are_those_of_the_demonstrations(demos: PushTDemonstrations) -> None:
    rest = resting(demos)
    assert rest.sum() == 18_961
    # The rotations are orthogonal, so the least-squares solution is the mean in the block's frame.
    np.testing.assert_allclose(BLOCK_KEYPOINTS, local_keypoints(demos)[rest].mean(axis=0), atol=1e-6)
    recorded = demos.observations["keypoints"].reshape(-1, 9, 2)
    error = np.abs(block_keypoints(demos.states[:, 2:].astype(np.float64)) - recorded).max(axis=(1, 2))
    assert error[rest].max() < ROUNDING_PX
    # While the agent pushes, they were recorded up to 2.2 pixels from the pose, yet the block keeps its shape.
    assert error.max() < 2.2
    distances = np.linalg.norm(recorded[:, :, None] - recorded[:, None], axis=-1)
    shape = np.linalg.norm(BLOCK_KEYPOINTS[:, None] - BLOCK_KEYPOINTS, axis=-1)
    assert np.abs(distances - shape).max() < ROUNDING_PX


def test_observation_in_a_demonstrated_state_is_the_demonstrated_one(env: PushTEnv, demos: PushTDemonstrations) -> None:
    # Setting a state runs one physics step; it moves nothing, for the speeds that contact gives act in the next one.
    frames = np.random.default_rng(0).choice(np.flatnonzero(resting(demos)), 100)
    for frame in frames:
        observation, info = env.reset(options={"state": demos.states[frame]})
        np.testing.assert_allclose(info["state"], demos.states[frame], atol=ROUNDING_PX)
        assert list(observation) == list(demos.observations) == ["keypoints", "agent_position"]
        for key, values in demos.observations.items():
            np.testing.assert_allclose(observation[key], values[frame], atol=ROUNDING_PX)


@pytest.mark.parametrize("episode", [0, 51, 102])
def test_replayed_demonstration_reaches_a_high_score(env: PushTEnv, demos: PushTDemonstrations, episode: int) -> None:
    start, end = starts(demos)[episode], demos.episode_ends[episode]
    env.reset(options={"state": demos.states[start]})
    assert max(env.step(action)[1] for action in demos.actions[start:end]) > 0.9


@pytest.mark.parametrize("offset_px", [0.0, 0.5, 8.0, 60.0])
def test_reward_is_coverage_up_to_95_percent(env: PushTEnv, offset_px: float) -> None:
    corner = np.array([30.0, 30.0])
    _, at_reset = env.reset(options={"state": [*corner, GOAL[0] + offset_px, *GOAL[1:]]})
    _, reward, terminated, truncated, info = env.step(corner)
    assert at_reset["coverage"] == pytest.approx(info["coverage"])
    assert reward == pytest.approx(min(info["coverage"] / 0.95, 1))
    assert (terminated, truncated) == (info["coverage"] > 0.95, False)
    assert info["is_success"] is terminated is (offset_px < 1)


def test_image_shows_what_the_state_says(demos: PushTDemonstrations) -> None:
    env = PushTEnv(observation=("image", "agent_position"))
    for frame in (0, 1000):
        seen, _ = env.reset(options={"state": demos.states[frame].astype(np.float64)})
        assert list(seen) == ["image", "agent_position"]
        assert env.observation_space.contains(seen)
        # The agent is a blue disc of 15 pixels in a world of 512.
        column, row = (seen["agent_position"] * 96 / 512).astype(int)
        red, _, blue = seen["image"][:, row, column]
        assert blue > red + 0.3
    with pytest.raises(EnvError, match=r"expected observations among .* got \['pixels'\]"):
        PushTEnv(observation=["pixels"])


def test_episode_is_truncated_after_max_steps() -> None:
    env = PushTEnv(max_steps=3)
    for _ in range(2):
        observation, _ = env.reset(seed=0)
        assert [env.step(observation["agent_position"])[3] for _ in range(3)] == [False, False, True]


def test_target_outside_the_action_space_is_obeyed(env: PushTEnv) -> None:
    env.reset(options={"state": [500, 256, *GOAL]})
    for _ in range(10):
        observation, *_ = env.step(np.array([540, 256]))
    assert observation["agent_position"][0] == pytest.approx(540, abs=1)


def test_frames_show_the_world_at_the_asked_size(env: PushTEnv) -> None:
    env.reset(seed=0)
    before = env.render()
    assert (before.shape, before.dtype) == ((96, 96, 3), np.uint8)
    env.step(np.array([400.0, 400.0]))
    assert not np.array_equal(before, env.render())


@pytest.mark.parametrize(
    "action", [np.zeros(3), np.zeros((1, 2)), np.array([np.nan, 1]), np.array([1, np.inf])], ids=str
)
def test_unusable_action_refuses_and_moves_nothing(env: PushTEnv, action: np.ndarray) -> None:
    _, info = env.reset(seed=1)
    with pytest.raises(EnvError, match=r"^Push-T action: expected 2 finite pixel positions, got .*; check .*\.$"):
        env.step(action)
    np.testing.assert_array_equal(env._world.get_obs(), info["state"])


@pytest.mark.parametrize("options", [{"state": [1, 2]}, {"state": [np.nan] * 5}, {"stat": [1] * 5}])
def test_unusable_reset_options_refuse(env: PushTEnv, options: dict[str, Any]) -> None:
    with pytest.raises(EnvError, match=r"^Push-T reset options: expected"):
        env.reset(options=options)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range_refuses(env: PushTEnv, seed: int) -> None:
    with pytest.raises(EnvError, match=r"^Push-T seed: expected 0 to 4294967295, got"):
        env.reset(seed=seed)


@pytest.mark.parametrize("settings", [{"max_steps": 0}, {"render_size": 95}, {"render_mode": "human"}])
def test_unusable_settings_refuse(settings: dict[str, Any]) -> None:
    with pytest.raises(EnvError, match=r"^Push-T: expected max_steps >= 1"):
        PushTEnv(**settings)
