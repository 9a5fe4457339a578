"""From a task's name to its environment and demonstrations.

Their packages are imported where they are asked for, and one that is missing refuses there in one sentence: Push-T runs
without robomimic's, and a robot without any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from bac.errors import InvalidInput, Mismatch, sentence
from configs.schema import TaskConfig
from envs.demos.windows import window_index
from envs.graphics import require_graphics
from envs.robomimic_tasks import RATE_HZ, TASKS, is_absolute
from policies.base import PolicySpec

if TYPE_CHECKING:
    from envs.demos.robomimic import RobomimicDemonstrations
    from envs.demos.robomimic_store import LowDimDemonstrations
    from envs.stage import Env

HELD_OUT_SEED = 1_000_003
"""Draws the observations that errors are judged on; calibration draws others (``CalibrationConfig.seed``)."""

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
    """Return what makes one environment of the task, of ``envs`` alone: another process imports nothing else for it.

    Raises:
        InvalidInput: no such environment.
    """
    return _known(task, _ENVIRONMENTS)(task)


def require_environment(task: TaskConfig, *, draws: bool) -> None:
    """Refuse a task that cannot be played on this machine, before any work for it is done.

    Args:
        task: which.
        draws: its frames are wanted, for a video.

    Raises:
        EnvError: its packages are not installed, or nothing can draw what is observed or wanted.
        InvalidInput: no such environment.
    """
    import_module(_known(task, _MODULES))
    # Push-T is drawn without OpenGL.
    if task.world in TASKS and (task.images or draws):
        require_graphics()


def loop_rate(task: TaskConfig, rate_hz: float | None) -> float:
    """Return the rate of a loop around the environment, Hz: a step of it lasts as long as it lasts.

    Raises:
        InvalidInput: ``rate_hz`` or ``task.rate_hz`` is another, or there is no such environment.
    """
    own = _known(task, _RATES_HZ)()
    for name, given in {"task.rate_hz": task.rate_hz, "rate_hz": rate_hz}.items():
        if given not in {None, own}:
            raise InvalidInput(
                sentence(name, expected=f"{own:g}, the rate of {task.name}", got=given, mend="leave it out")
            )
    return own


def demonstrations(task: TaskConfig, path: str | None = None, filter_key: str | None = None) -> TaskDemonstrations:
    """Read what the task observes out of its demonstrations.

    Args:
        task: which.
        path: of a zarr store or robomimic file; None for the committed store.
        filter_key: the mask of a robomimic file that names the episodes to read; None for all.

    Raises:
        InvalidInput: no such task, no committed demonstrations, a filter key for a store, or none of what the task
            observes, at the size it observes.
        EnvError: they cannot be read.
    """
    reader = _known(task, _DEMONSTRATIONS)
    source = _committed(task) if path is None else Path(path)
    read = reader(task, source, filter_key)
    lacking = sorted(task.observation.keys() - read.observations.keys())
    if lacking:
        raise InvalidInput(
            sentence(
                f"demonstrations {source}",
                expected=f"{lacking} as task.observation",
                got=sorted(read.observations),
                mend="correct task.observation or give others with demonstrations=PATH",
            )
        )
    for key, size in task.images.items():
        shape = read.observations[key].shape[1:]
        if shape != (*size, 3):
            raise InvalidInput(
                sentence(
                    f"demonstrated images '{key}'",
                    expected=f"{size} pixels as task.images",
                    got=list(shape[:2]),
                    mend="correct task.images and task.crop, or give demonstrations of that size",
                )
            )
    return replace(read, observations={key: read.observations[key] for key in task.observation})


def require_task(task: TaskConfig, policy: PolicySpec) -> None:
    """Refuse a policy that cannot play the task.

    Raises:
        Mismatch: it is of another task, sees other observations or images of another size, or gives other actions. What
            it crops out of an image is its own affair.
    """
    action_dim = policy.network.action_dim
    images = {} if policy.vision is None else {key: list(size) for key, size in policy.vision.images.items()}
    if policy.task != task.name:
        expected, got, mend = f"task {task.name}", policy.task, f"give task={policy.task}"
    elif dict(policy.observation) != dict(task.observation):
        expected, got = f"observations {dict(task.observation)}", str(dict(policy.observation))
        mend = "change task.observation to these if the environment has them"
    elif images != task.images:
        expected, got = f"images of {task.images} pixels", str(images)
        mend = "change task.images to these, and give demonstrations of that size"
    elif action_dim != task.action_dim:
        expected, got = f"{task.action_dim} channels of action", str(action_dim)
        mend = f"set task.action_dim={action_dim}, which for robomimic's tasks chooses absolute or delta actions"
    else:
        return
    raise Mismatch(sentence(f"policy for task={task.name}", expected=expected, got=got, mend=mend))


def _push_t(task: TaskConfig) -> Callable[[], Env]:
    from envs.push_t import PushTEnv

    return partial(PushTEnv, max_steps=task.max_steps, observation=tuple(task.observation))


def _push_t_rate() -> float:
    from envs.push_t import PushTEnv

    return float(PushTEnv.metadata["render_fps"])


def _push_t_demonstrations(task: TaskConfig, source: Path, filter_key: str | None) -> TaskDemonstrations:
    from envs.demos.push_t import read_push_t

    _require_no_filter(source, filter_key)
    read = read_push_t(source, images=bool(task.images))
    return TaskDemonstrations(read.observations, read.actions, read.episode_ends)


def _robomimic(task: TaskConfig) -> Callable[[], Env]:
    from envs.robomimic import RobomimicEnv

    name = task.world
    return partial(
        RobomimicEnv,
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


def _robomimic_demonstrations(task: TaskConfig, source: Path, filter_key: str | None) -> TaskDemonstrations:
    from envs.demos.robomimic_store import read_store

    name = task.world
    absolute = is_absolute(name, task.action_dim)
    read: LowDimDemonstrations | RobomimicDemonstrations
    if task.images or source.suffix == ".hdf5":
        from envs.demos.robomimic import read_robomimic

        read = read_robomimic(source, name, absolute=absolute, keys=tuple(task.observation), filter_key=filter_key)
    else:
        _require_no_filter(source, filter_key)
        read = read_store(source, name, absolute=absolute)
    return TaskDemonstrations(read.observations, read.actions, read.episode_ends)


def _require_no_filter(store: Path, filter_key: str | None) -> None:
    if filter_key is not None:
        raise InvalidInput(
            sentence(
                "filter_key",
                expected=f"null for {store}, a store without filter keys",
                got=filter_key,
                mend="leave it out, or give a robomimic file with demonstrations=PATH.hdf5",
            )
        )


def _committed(task: TaskConfig) -> Path:
    """Return the store that comes with this package; none has images."""
    from envs.demos.robomimic_store import store_of

    store = store_of(task.world)
    if task.images or not store.exists():
        raise InvalidInput(
            sentence(
                f"demonstrations of {task.name}",
                expected="a path, for none come with this package",
                got="null",
                mend="give demonstrations=PATH of its published or recorded ones",
            )
        )
    return store


_MODULES = {"push_t": "envs.push_t", **dict.fromkeys(TASKS, "envs.robomimic")}
_ENVIRONMENTS = {"push_t": _push_t, **dict.fromkeys(TASKS, _robomimic)}
_RATES_HZ: dict[str, Callable[[], float]] = {"push_t": _push_t_rate, **dict.fromkeys(TASKS, lambda: RATE_HZ)}
_DEMONSTRATIONS = {"push_t": _push_t_demonstrations, **dict.fromkeys(TASKS, _robomimic_demonstrations)}


def _known(task: TaskConfig, table: Mapping[str, _Entry]) -> _Entry:
    name = task.world
    if name not in table:
        raise InvalidInput(
            sentence("task.name", expected=f"one of {sorted(table)}", got=task.name, mend="choose one of these")
        )
    return table[name]
