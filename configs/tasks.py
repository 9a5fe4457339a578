"""From a task's name to its environment and demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from bac.errors import InvalidInput, Mismatch, sentence
from configs.schema import TaskConfig
from envs.demos.push_t import PUSH_T_DEMOS, read_push_t
from envs.demos.windows import window_index
from envs.push_t import PushTEnv
from envs.robomimic_tasks import TASKS, is_absolute
from envs.rollout import Env
from policies.base import PolicySpec

HELD_OUT_SEED = 1_000_003
"""Draws the observations that errors are judged on; calibration takes others (``calibrate.seed``)."""

_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class TaskDemonstrations:
    """Demonstrations of any task.

    Attributes:
        observations: key -> float32[N, channels], task units.
        actions: float32[N, Da], task units.
        episode_ends: int64[E].
    """

    observations: Mapping[str, np.ndarray]
    actions: np.ndarray
    episode_ends: np.ndarray

    def joined(self, keys: Mapping[str, int]) -> np.ndarray:
        """Return float32[N, Do]: the observation keys side by side in the order of ``keys``."""
        return np.concatenate([self.observations[key] for key in keys], axis=1)

    def spread_observations(
        self, count: int, observation_steps: int, seed: int, earlier: int = 0
    ) -> dict[str, np.ndarray]:
        """Pick observations from all over the demonstrations: one at random from each of ``count`` equal stretches.

        With ``earlier``, give instead what was observed that many control steps before, no further back than the
        beginning of the episode.

        Returns:
            key -> float32[count, To, channels].

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
    """Read the task's demonstrations: unless ``path`` is given the committed ones, else what ``make_demos`` wrote."""
    return _known(task, _DEMONSTRATIONS)(task, path)


def require_task(task: TaskConfig, policy: PolicySpec) -> None:
    """Refuse a policy that cannot play the task.

    Raises:
        Mismatch: it is of another task, sees other observations or gives other actions.
    """
    action_dim = policy.network.action_dim
    if policy.task != task.name:
        expected, got, mend = f"task {task.name}", policy.task, f"give task={policy.task}"
    elif dict(policy.observation) != dict(task.observation):
        expected, got = f"observations {dict(task.observation)}", str(dict(policy.observation))
        mend = "change task.observation to these if the environment has them"
    elif action_dim != task.action_dim:
        expected, got = f"{task.action_dim} channels of action", str(action_dim)
        mend = f"set task.action_dim={action_dim}, which for robomimic's tasks chooses absolute or delta actions"
    else:
        return
    raise Mismatch(sentence(f"policy for task={task.name}", expected=expected, got=got, mend=mend))


def _push_t(task: TaskConfig) -> Env:
    return PushTEnv(max_steps=task.max_steps)


def _push_t_demonstrations(_: TaskConfig, path: str | None) -> TaskDemonstrations:
    read = read_push_t(PUSH_T_DEMOS if path is None else path)
    return TaskDemonstrations(read.observations, read.actions, read.episode_ends)


def _robomimic(task: TaskConfig) -> Env:
    # Here, for Push-T must run without robomimic's packages.
    from envs.robomimic import RobomimicEnv

    absolute = is_absolute(task.name, task.action_dim)
    return RobomimicEnv(task.name, absolute=absolute, observation=tuple(task.observation), max_steps=task.max_steps)


def _robomimic_demonstrations(task: TaskConfig, path: str | None) -> TaskDemonstrations:
    absolute = is_absolute(task.name, task.action_dim)
    from envs.demos.robomimic import read_robomimic

    file = f"outputs/demos/{task.name}/low_dim.hdf5" if path is None else path
    read = read_robomimic(file, task.name, absolute=absolute, keys=tuple(task.observation))
    return TaskDemonstrations(read.observations, read.actions, read.episode_ends)


_ENVIRONMENTS = {"push_t": _push_t, **dict.fromkeys(TASKS, _robomimic)}
_DEMONSTRATIONS = {"push_t": _push_t_demonstrations, **dict.fromkeys(TASKS, _robomimic_demonstrations)}


def _known(task: TaskConfig, table: Mapping[str, _Entry]) -> _Entry:
    if task.name not in table:
        raise InvalidInput(
            sentence("task.name", expected=f"one of {sorted(table)}", got=task.name, mend="choose one of these")
        )
    return table[task.name]
