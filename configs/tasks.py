"""From a task's name to its environment and demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from bac.errors import InvalidInput, sentence
from configs.schema import TaskConfig
from envs.demos.push_t import PUSH_T_DEMOS, read_push_t
from envs.demos.windows import window_index
from envs.push_t import PushTEnv
from envs.robomimic_tasks import TASKS, is_absolute
from envs.rollout import Env

HELD_OUT_SEED = 1_000_003
"""Draws the observations that errors are judged on; calibration takes others (``calibrate.seed``)."""

_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class TaskDemonstrations:
    """Demonstrations of any task.

    Attributes:
        observations: key -> float32[N, channels], task units; images uint8[N, height, width, 3].
        actions: float32[N, Da], task units.
        episode_ends: int64[E].
    """

    observations: Mapping[str, np.ndarray]
    actions: np.ndarray
    episode_ends: np.ndarray

    def joined(self, keys: Mapping[str, int]) -> np.ndarray:
        """Return float32[N, channels]: the observation's low-dim ``keys`` side by side, in that order."""
        return np.concatenate(
            [np.empty((len(self.actions), 0), np.float32), *(self.observations[key] for key in keys)], axis=1
        )

    def spread_observations(
        self, count: int, observation_steps: int, seed: int, earlier: int = 0
    ) -> dict[str, np.ndarray]:
        """Pick observations from all over the demonstrations: one at random from each of ``count`` equal stretches.

        With ``earlier``, give instead what was observed that many control steps before, no further back than the
        beginning of the episode.

        Returns:
            key -> float32[count, To, channels], images uint8[count, To, height, width, 3].

        Raises:
            InvalidInput: ``count`` is not in [1, frames].
        """
        frames = len(self.actions)
        if not 1 <= count <= frames:
            raise InvalidInput(
                sentence("observations", expected=f"1 to {frames}", got=count, mend="choose a number in that range")
            )
        histories = window_index(
            self.episode_ends, horizon=observation_steps, pad_before=observation_steps - 1, pad_after=0
        )
        stretches = (np.arange(count) + np.random.default_rng(seed).random(count)) * frames / count
        chosen = stretches.astype(np.int64)
        begins = np.concatenate(([0], self.episode_ends))[np.searchsorted(self.episode_ends, chosen, side="right")]
        chosen = histories[np.maximum(chosen - earlier, begins)]
        return {key: values[chosen] for key, values in self.observations.items()}


def environment(task: TaskConfig) -> Callable[[], Env]:
    """Return what makes one environment of the task.

    Raises:
        InvalidInput: no such environment.
    """
    return partial(_known(task, _ENVIRONMENTS), task)


def demonstrations(task: TaskConfig, path: str | None = None) -> TaskDemonstrations:
    """Read the task's demonstrations: unless ``path`` is given the committed ones, else what ``make_demos`` wrote.

    Raises:
        InvalidInput: no such task, or images of another size than the task's.
        DemonstrationError: they cannot be read.
    """
    read = _known(task, _DEMONSTRATIONS)(task, path)
    for key, size in task.images.items():
        shape = read.observations[key].shape[1:]
        if shape != (*size, 3):
            raise InvalidInput(
                sentence(
                    f"demonstrated images '{key}'",
                    expected=f"{size} pixels as task.images",
                    got=list(shape[:2]),
                    mend="correct task.images and task.crop or record them at that size",
                )
            )
    return read


def world(task: TaskConfig) -> str:
    """Return the name of the world a task is played in: a low-dim task and its image variant share it."""
    return task.name.removesuffix("_image")


def _push_t(task: TaskConfig) -> Env:
    return PushTEnv(max_steps=task.max_steps, observation=tuple(task.observation))


def _push_t_demonstrations(task: TaskConfig, path: str | None) -> TaskDemonstrations:
    shipped = PUSH_T_DEMOS if not task.images else _PUSH_T_IMAGES
    read = read_push_t(shipped if path is None else path, images=bool(task.images))
    observations = {key: values for key, values in read.observations.items() if key in task.observation}
    return TaskDemonstrations(observations, read.actions, read.episode_ends)


def _robomimic(task: TaskConfig) -> Env:
    # Here, for Push-T must run without robomimic's packages.
    from envs.robomimic import RobomimicEnv

    name = world(task)
    return RobomimicEnv(
        name,
        absolute=is_absolute(name, task.action_dim),
        observation=tuple(task.observation),
        max_steps=task.max_steps,
        image_size=_square_size(task),
    )


def _square_size(task: TaskConfig) -> int | None:
    """Return height and width of robomimic's images, which are one number for all its cameras."""
    sizes = {length for size in task.images.values() for length in size}
    if len(sizes) > 1:
        raise InvalidInput(
            sentence("task.images", expected="square images of one size", got=task.images, mend="give them one size")
        )
    return next(iter(sizes), None)


def _robomimic_demonstrations(task: TaskConfig, path: str | None) -> TaskDemonstrations:
    name = world(task)
    absolute = is_absolute(name, task.action_dim)
    from envs.demos.robomimic import read_robomimic

    kind = "image" if task.images else "low_dim"
    file = f"outputs/demos/{task.name}/{kind}.hdf5" if path is None else path
    read = read_robomimic(file, name, absolute=absolute, keys=tuple(task.observation))
    return TaskDemonstrations(read.observations, read.actions, read.episode_ends)


_PUSH_T_IMAGES = "outputs/demos/push_t_image/pusht_cchi_v7_replay.zarr.zip"
"""Where the store published with diffusion_policy is looked for; ours is its low-dim part."""

_ENVIRONMENTS = {"push_t": _push_t, **dict.fromkeys(TASKS, _robomimic)}
_DEMONSTRATIONS = {"push_t": _push_t_demonstrations, **dict.fromkeys(TASKS, _robomimic_demonstrations)}


def _known(task: TaskConfig, table: Mapping[str, _Entry]) -> _Entry:
    name = world(task)
    if name not in table:
        raise InvalidInput(
            sentence("task.name", expected=f"one of {sorted(table)}", got=task.name, mend="choose one of these")
        )
    return table[name]
