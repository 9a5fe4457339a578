"""Push-T as the gymnasium environment that the published checkpoints and scores were made with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.errors import EnvError

# pygame opens a window without it, and machines that evaluate have no screen.
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

try:
    import gymnasium
    from gym_pusht.envs.pusht import PushTEnv as _GymPushT
    from gymnasium.spaces import Box, Dict
except ModuleNotFoundError as error:
    raise EnvError(
        f"task push_t: expected the packages gymnasium, gym-pusht and pymunk, got no {error.name}; "
        "install them with pip install -e '.[sim]'."
    ) from error

BLOCK_KEYPOINTS = np.array(
    # In the block's frame, pixels. The original samples them from a picture of the block each time it starts, so the
    # ones its checkpoints know exist only in its demonstrations. Least squares over the 18,961 frames with a resting
    # block leaves 4.8e-5 pixels (float32 rounding of positions up to 512). In the other 26 % of frames the recorded
    # keypoints are as rigid (2.4e-5), but up to 2.2 pixels away from the recorded pose: there the agent pushes.
    [
        [9.269787, 90.040974],
        [-60.983472, -1.186730],
        [60.912756, -1.393364],
        [-0.270503, 25.543625],
        [-14.064927, 122.815854],
        [39.002738, 32.857404],
        [-39.966415, 32.729655],
        [-16.824344, 62.863179],
        [23.541461, -1.700288],
    ]
)
"""float64[9, 2]: the keypoints of the block in its own frame, pixels."""

_CENTRE_OF_MASS = np.array([0.0, 45.0])
"""Of gym-pusht's block, in its frame, pixels."""

IMAGE_SIZE = 96
"""Height and width of the image observation, pixels."""

_SUCCESS_COVERAGE = 0.95

_LARGEST_SEED = 2**32 - 1
"""The largest that ``numpy.random.RandomState`` takes."""

_Observation = dict[str, Any]


def block_keypoints(poses: np.ndarray) -> np.ndarray:
    """Return float64[..., 9, 2], world pixels, for block poses float[..., 3] (x, y in pixels, angle in radians)."""
    cos, sin = np.cos(poses[..., 2]), np.sin(poses[..., 2])
    rotated = BLOCK_KEYPOINTS @ np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
    return np.asarray(rotated + poses[..., None, :2])


def original_start(seed: int) -> np.ndarray:
    """Return the start that diffusion_policy draws for ``seed``: float64[5], agent xy, block xy, block angle.

    It is what the original hands to its simulator, which places the block before it turns it about its centre of
    mass; the pose that results is another one. Published scores are means over the seeds from 100000 on.
    """
    draw = np.random.RandomState(seed)
    agent = [draw.randint(50, 450), draw.randint(50, 450)]
    block = [draw.randint(100, 400), draw.randint(100, 400)]
    return np.array([*agent, *block, draw.randn() * 2 * np.pi - np.pi])


class PushTEnv(gymnasium.Env[_Observation, np.ndarray]):
    """Push the T-shaped block onto its goal pose with a round agent, at 10 Hz.

    Observation, the first two of which are the default and in this order the original's vector of 20 numbers:
        ``keypoints``: float32[18], x and y of nine points of the block, world pixels.
        ``agent_position``: float32[2], x and y, world pixels.
        ``image``: float32[3, 96, 96] in [0, 1], the world from above.
    Action: float32[2], where the agent shall go, pixels in [0, 512]. As in the original, a finite target outside is
    obeyed, not clipped.
    Reward: ``min(coverage / 0.95, 1)``, the share of the goal that the block covers. The episode is terminated once
    coverage exceeds 0.95, and truncated after ``max_steps``.
    Info: ``is_success`` (bool), ``coverage`` in [0, 1], ``state`` float64[5] (agent xy, block xy, block angle in
    [0, 2 pi)), which ``reset`` takes.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - the base class declares it so

    def __init__(
        self,
        max_steps: int = 300,
        render_size: int = 256,
        render_mode: str = "rgb_array",
        observation: Sequence[str] = ("keypoints", "agent_position"),
    ) -> None:
        """Build the world.

        Args:
            max_steps: control steps until the episode is truncated, at least 1.
            render_size: height and width of the frames of ``render``, pixels, at least 96.
            render_mode: only ``"rgb_array"``.
            observation: keys of the observation, in order.

        Raises:
            EnvError: an argument is out of its range.
        """
        # gym-pusht fails to draw the action's cross, 1 / 96 of the frame thick, in less.
        if max_steps < 1 or render_size < 96 or render_mode != "rgb_array":
            raise EnvError(
                "Push-T: expected max_steps >= 1, render_size >= 96 and render_mode 'rgb_array', got "
                f"{max_steps}, {render_size} and {render_mode!r}; change the task's settings."
            )
        self.max_steps = max_steps
        self.render_mode = render_mode
        # Targets in the action space keep the agent, and so whatever it can push, within 20 pixels of [0, 512]; the
        # block then reaches less than 300 pixels further, for the agent goes through the walls and takes it along.
        known = {
            "keypoints": Box(-512, 1024, (18,), np.float32),
            "agent_position": Box(-512, 1024, (2,), np.float32),
            "image": Box(0, 1, (3, IMAGE_SIZE, IMAGE_SIZE), np.float32),
        }
        if not observation or not set(observation) <= set(known):
            raise EnvError(
                f"Push-T: expected observations among {sorted(known)}, got {list(observation)}; "
                "change task.observation."
            )
        self.observation_space = Dict({key: known[key] for key in observation})
        self.action_space = Box(0, 512, (2,), np.float32)
        self._world = _GymPushT(
            "state",
            observation_width=IMAGE_SIZE,
            observation_height=IMAGE_SIZE,
            visualization_width=render_size,
            visualization_height=render_size,
        )
        self._keys = tuple(observation)
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: the original's seed in [0, 2**32); None draws one from ``np_random``.
            options: ``{"state": float[5]}`` starts from that ``state`` (see Info) in place of the seed's.

        Raises:
            EnvError: the seed is out of range, or the options are not as above.
        """
        if seed is not None and not 0 <= seed <= _LARGEST_SEED:
            raise EnvError(f"Push-T seed: expected 0 to {_LARGEST_SEED}, got {seed}; choose one in that range.")
        given = _given_state(options)
        super().reset(seed=seed)
        if given is not None:
            start = _start_of(given)
        else:
            start = original_start(int(self.np_random.integers(_LARGEST_SEED)) if seed is None else seed)
        # gym-pusht forgets to forget it, and would draw it into the first frame.
        self._world._last_action = None
        state, _ = self._world.reset(options={"reset_to_state": start})
        self._steps = 0
        return self._observe(state), _info(state, self._world._get_coverage())

    def step(self, action: np.ndarray) -> tuple[_Observation, float, bool, bool, dict[str, Any]]:
        """Let the agent go towards ``action`` float[2], pixels, for 0.1 s.

        Raises:
            EnvError: the action is not two finite numbers; the world is left as it was.
        """
        target = np.asarray(action, dtype=np.float64)
        if target.shape != (2,) or not np.isfinite(target).all():
            raise EnvError(
                f"Push-T action: expected 2 finite pixel positions, got {target.tolist()}; "
                "check the policy's output before it is executed."
            )
        state, _, _, _, given = self._world.step(target)
        self._steps += 1
        info = _info(state, given["coverage"])
        reward = min(info["coverage"] / _SUCCESS_COVERAGE, 1.0)
        return self._observe(state), reward, info["is_success"], self._steps >= self.max_steps, info

    def render(self) -> np.ndarray:
        """Return uint8[render_size, render_size, 3]: the world from above, the last action as a red cross."""
        return np.asarray(self._world.render())

    def close(self) -> None:
        """Free the world."""
        self._world.close()

    def _observe(self, state: np.ndarray) -> _Observation:
        seen: _Observation = {
            "keypoints": block_keypoints(state[2:]).reshape(-1).astype(np.float32),
            "agent_position": state[:2].astype(np.float32),
        }
        if "image" in self._keys:
            seen["image"] = self._world._render().transpose(2, 0, 1).astype(np.float32) / 255
        return {key: seen[key] for key in self._keys}


def _given_state(options: dict[str, Any] | None) -> np.ndarray | None:
    if not options:
        return None
    state = np.asarray(options.get("state"), dtype=np.float64)
    if set(options) != {"state"} or state.shape != (5,) or not np.isfinite(state).all():
        raise EnvError(
            f"Push-T reset options: expected {{'state': 5 finite numbers}}, got {options}; "
            "give agent x, y, block x, y in pixels and the block's angle in radians."
        )
    return state


def _start_of(state: np.ndarray) -> np.ndarray:
    """Return what the simulator must be handed so that ``state`` results (see ``original_start``)."""
    cos, sin = np.cos(state[4]), np.sin(state[4])
    turned = np.array([[cos, -sin], [sin, cos]]) @ _CENTRE_OF_MASS
    return np.concatenate([state[:2], state[2:4] + turned - _CENTRE_OF_MASS, state[4:]])


def _info(state: np.ndarray, coverage: float) -> dict[str, Any]:
    # The polygon overlay of shapely gives one state areas that differ in the last bit from run to run.
    coverage = round(float(coverage), 12)
    return {"is_success": coverage > _SUCCESS_COVERAGE, "coverage": coverage, "state": state}


gymnasium.register("bac/PushT-v0", entry_point="envs.push_t:PushTEnv")
