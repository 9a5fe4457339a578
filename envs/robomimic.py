"""robomimic's tasks as gymnasium environments, which published policies and scores were made with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from envs.actions import controller_from_policy
from envs.errors import EnvError
from envs.graphics import require_graphics
from envs.robomimic_package import ROBOSUITE_VERSION, EnvRobosuite, EnvType, SimulationFault, draw_offscreen
from envs.robomimic_tasks import IMAGE, RATE_HZ, robomimic_task

_LARGEST_SEED = 2**32 - 1
"""The largest that ``numpy.random.seed`` takes."""

_Observation = dict[str, Any]


class RobomimicEnv(gymnasium.Env[_Observation, np.ndarray]):
    """A robomimic task on robosuite's Panda arms, at 20 Hz.

    Observation: the keys asked for, in that order; by default the low-dim ones of ``RobomimicTask.low_dim``, each
    float32[size] in metres, quaternions (x, y, z, w) and finger positions. Images are float32[3, size, size] in [0, 1].
    Action: float32[arms * 10], absolute poses, or float32[arms * 7], deltas in [-1, 1]; see ``envs.actions``.
    Reward: 1 at success, else 0, as robomimic's sparse reward. The episode is terminated at success and truncated after
    ``max_steps``; it may be stepped on after either.
    Info: ``is_success`` (bool), ``state`` float64[S] (time, positions, velocities of the simulation).

    The same seed gives the same episode in any process, and the seeds are those of diffusion_policy's runners.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": int(RATE_HZ)}  # noqa: RUF012 - the base class declares it so

    def __init__(
        self,
        task: str,
        *,
        absolute: bool = True,
        observation: Sequence[str] | None = None,
        max_steps: int | None = None,
        image_size: int | None = None,
        render_size: int = 256,
        render_camera: str = "agentview",
        render_mode: str = "rgb_array",
    ) -> None:
        """Build the simulation.

        Args:
            task: a name in ``envs.robomimic_tasks.TASKS``.
            absolute: actions are poses; false for deltas.
            observation: keys, of ``low_dim`` or ``images`` of the task; null for all of ``low_dim``.
            max_steps: control steps until the episode is truncated, at least 1; null for the published number.
            image_size: height and width of image observations, pixels, at least 1; null for the published size.
            render_size: height and width of the frames of ``render``, pixels, at least 1.
            render_camera: the camera of ``render``.
            render_mode: only ``"rgb_array"``.

        Raises:
            EnvError: an argument is out of its range, or images are wanted and nothing can draw.
        """
        self.task = robomimic_task(task)
        self.max_steps = self.task.max_steps if max_steps is None else max_steps
        size = self.task.image_size if image_size is None else image_size
        if min(self.max_steps, size, render_size) < 1 or render_mode != "rgb_array":
            raise EnvError(
                f"{task}: expected max_steps, image_size and render_size >= 1 and render_mode 'rgb_array', got "
                f"{self.max_steps}, {size}, {render_size} and {render_mode!r}; change the task's settings."
            )
        self.absolute = absolute
        self.keys = tuple(self.task.low_dim if observation is None else observation)
        self.render_mode, self._frame = render_mode, (render_size, render_camera)
        known = {**self.task.low_dim, **dict.fromkeys(self.task.images, 0)}
        if not self.keys or not set(self.keys) <= set(known):
            raise EnvError(
                f"{task}: expected observations among {sorted(known)}, got {list(self.keys)}; change task.observation."
            )
        images = tuple(key for key in self.keys if key.endswith(IMAGE))
        if images:
            require_graphics()
        self.observation_space = Dict(
            {
                key: Box(0, 1, (3, size, size), np.float32)
                if key in images
                else Box(-np.inf, np.inf, (known[key],), np.float32)
                for key in self.keys
            }
        )
        bound, width = (np.inf, self.task.policy_size) if absolute else (1, self.task.delta_size)
        self.action_space = Box(-bound, bound, (width,), np.float32)
        settings = self.task.settings(absolute=absolute, images=images, image_size=size)
        # Building draws a first episode, from numpy's generator like every other.
        with _numpy_seeded(0):
            self._world = EnvRobosuite(
                self.task.simulation, render_offscreen=bool(images), use_image_obs=bool(images), **settings
            )
        self._steps = 0

    @property
    def simulation(self) -> Any:
        """The robosuite environment below this one, for scripted experts, which see more than observations."""
        return self._world.env

    def model(self) -> str:
        """Return the scene as MuJoCo XML; with ``state`` of the info it is all that ``reset`` needs to come back."""
        return str(self._world.env.sim.model.get_xml())

    def hand_poses(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the hands are in stored states, as the controller sees them at the next action.

        The simulation is left in the last of them: reset it before the next step.

        Args:
            states: float[T, S].

        Returns:
            Positions float64[T, arms, 3], m, and rotations float64[T, arms, 3, 3].

        Raises:
            EnvError: the states are not of this task.
        """
        expected = self._info()["state"].size
        if states.ndim != 2 or states.shape[1] != expected:
            raise EnvError(
                f"{self.task.name} states: expected shape [T, {expected}], got {states.shape}; "
                "give the demonstrations of this task."
            )
        simulation, positions, rotations = self._world.env.sim, [], []
        sites = [robot.eef_site_id for robot in self._world.env.robots]
        for state in states:
            simulation.set_state_from_flattened(state)
            simulation.forward()
            positions.append(simulation.data.site_xpos[sites])
            rotations.append(simulation.data.site_xmat[sites])
        return np.array(positions), np.array(rotations).reshape(len(states), len(sites), 3, 3)

    def goals(self) -> tuple[np.ndarray, np.ndarray]:
        """Return where the controllers take the hands: positions float64[arms, 3], m, rotations float64[arms, 3, 3]."""
        controllers = [robot.controller for robot in self._world.env.robots]
        return np.array([each.goal_pos for each in controllers]), np.array([each.goal_ori for each in controllers])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Observation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: in [0, 2**32); None draws one from ``np_random``.
            options: ``{"state": float[S], "model": str}`` starts from a demonstration's stored state and
                ``model_file`` in place of the seed's. The model is needed: without it the controller's goal and the
                gripper's would stay those of the episode before. As in robomimic, a first delta counts from where the
                hand is after a plain reset, not from the state's hand; a first absolute action means what it says.

        Raises:
            EnvError: the seed is out of range, or the options are not as above.
        """
        if seed is not None and not 0 <= seed <= _LARGEST_SEED:
            raise EnvError(
                f"{self.task.name} seed: expected 0 to {_LARGEST_SEED}, got {seed}; choose one in that range."
            )
        given = self._given_start(options)
        super().reset(seed=seed)
        self._steps = 0
        self._draw_here()
        with _numpy_seeded(int(self.np_random.integers(_LARGEST_SEED)) if seed is None else seed):
            observation = self._world.reset() if given is None else self._world.reset_to(given)
        return self._observe(observation), self._info()

    def step(self, action: np.ndarray) -> tuple[_Observation, float, bool, bool, dict[str, Any]]:
        """Let the arms go on for 0.05 s under ``action``.

        Raises:
            EnvError: the action is misshapen, not finite, or no rotation; the world is left as it was. Or the
                simulation broke down.
        """
        given = np.asarray(action, dtype=np.float64)
        if given.shape != self.action_space.shape or not np.isfinite(given).all():
            raise EnvError(
                f"{self.task.name} action: expected {self.action_space.shape} finite numbers, got shape {given.shape} "
                f"and {given.tolist()}; check the policy's output before it is executed."
            )
        # Six numbers of two parallel or empty rows are no rotation, and come out as NaN.
        with np.errstate(invalid="ignore", divide="ignore"):
            executed = controller_from_policy(given) if self.absolute else given
        if not np.isfinite(executed).all():
            raise EnvError(
                f"{self.task.name} action: expected two independent rows of a rotation, got {given.tolist()}; "
                "check the policy's output before it is executed."
            )
        self._draw_here()
        try:
            observation, reward, _, _ = self._world.step(executed)
        except SimulationFault as error:
            raise EnvError(
                f"{self.task.name}: expected a stable simulation, got {error}; smaller actions avoid it."
            ) from error
        self._steps += 1
        info = self._info()
        return self._observe(observation), float(reward), info["is_success"], self._steps >= self.max_steps, info

    def step_undrawn(self, action: np.ndarray) -> tuple[_Observation, float, bool, bool, dict[str, Any]]:
        """Do what ``step`` does without drawing, most of the work where no GPU draws; the observation has no images."""
        simulation = self._world.env.sim
        simulation.render = _blank  # before the class's own, which robosuite's cameras call
        try:
            observation, reward, terminated, truncated, info = self.step(action)
        finally:
            del simulation.render
        seen = {key: value for key, value in observation.items() if not key.endswith(IMAGE)}
        return seen, reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """Return uint8[render_size, render_size, 3], as the render camera sees the scene.

        Raises:
            EnvError: nothing can draw on this machine.
        """
        require_graphics()
        size, camera = self._frame
        world = self._world.env
        # Made when first wanted: every reset builds a new scene, and a context costs memory and a third of a second.
        if world.sim._render_context_offscreen is None:
            context = draw_offscreen(world.sim, device_id=world.render_gpu_device_id)
            context.vopt.geomgroup[0], context.vopt.geomgroup[1] = world.render_collision_mesh, world.render_visual_mesh
        self._draw_here()
        return np.ascontiguousarray(self._world.render("rgb_array", size, size, camera))

    def close(self) -> None:
        """Free the simulation."""
        self._world.env.close()

    def _draw_here(self) -> None:
        # robosuite draws into whichever context was made last, which may be another environment's.
        context = self._world.env.sim._render_context_offscreen
        if context is not None:
            context.gl_ctx.make_current()

    def _given_start(self, options: dict[str, Any] | None) -> dict[str, Any] | None:
        if not options:
            return None
        state, model = np.asarray(options.get("state"), dtype=np.float64), options.get("model")
        size = self._info()["state"].shape
        if set(options) != {"state", "model"} or state.shape != size or not isinstance(model, str):
            raise EnvError(
                f"{self.task.name} reset options: expected {{'state': {size} numbers, 'model': MuJoCo XML}}, got keys "
                f"{sorted(options)} and a state of shape {state.shape}; give both from one demonstration of this task."
            )
        return {"states": state, "model": model}

    def _observe(self, observation: dict[str, np.ndarray]) -> _Observation:
        return {key: observation[key].astype(np.float32) for key in self.keys}

    def _info(self) -> dict[str, Any]:
        success = bool(self._world.is_success()["task"])
        return {"is_success": success, "state": np.array(self._world.env.sim.get_state().flatten())}


def _blank(*, width: int, height: int, **_: Any) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def env_args(task: str, *, absolute: bool, images: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what robomimic's data sets store as ``env_args``: all it takes to build the simulation again.

    Args:
        task: a name in ``envs.robomimic_tasks.TASKS``.
        absolute: actions are poses; false for deltas.
        images: keys of image observations, of the published size.
    """
    known = robomimic_task(task)
    settings = known.settings(absolute=absolute, images=images)
    version, kind = ROBOSUITE_VERSION, int(EnvType.ROBOSUITE_TYPE)
    return {"env_name": known.simulation, "env_version": version, "type": kind, "env_kwargs": settings}


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which robosuite draws from, and give it back as it was."""
    before = np.random.get_state()  # noqa: NPY002 - the legacy generator is robosuite's
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


gymnasium.register("bac/Robomimic-v0", entry_point="envs.robomimic:RobomimicEnv")
