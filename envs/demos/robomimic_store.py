"""The low-dim part of a robomimic file as a zarr store: a hundredth of its size, read without robomimic's packages.

``python -m envs.demos.robomimic_store TASK SOURCE [TARGET]`` makes it; those of Lift, Can and Square come with this
package, from what ``scripts/make_demos.py`` recorded.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from envs.demos.replay import Demonstrations, read_demonstrations, write_demonstrations
from envs.errors import DemonstrationError, EnvError
from envs.robomimic_tasks import TASKS, robomimic_task

STORES = Path(__file__).parent / "data"

_ACTION, _DELTA = "action", "delta_action"


@dataclass(frozen=True)
class LowDimDemonstrations:
    """Demonstrations in the keys and units of ``envs.robomimic.RobomimicEnv``, at 20 Hz.

    Attributes:
        observations: key -> float32[N, size].
        actions: float32[N, arms * 10], absolute, or float32[N, arms * 7], deltas; see ``envs.actions``.
        episode_ends: int64[E], the index one past each episode's last frame.
    """

    observations: Mapping[str, np.ndarray]
    actions: np.ndarray
    episode_ends: np.ndarray


def store_of(task: str) -> Path:
    """Return where this package keeps a task's store, whether there is one or not."""
    return STORES / f"{task}.zarr.zip"


def read_store(path: Path | str, task: str, *, absolute: bool) -> LowDimDemonstrations:
    """Read a store that ``copy_low_dim`` wrote.

    Args:
        path: the store.
        task: the name of the task it must be of.
        absolute: give absolute actions; false for deltas.

    Raises:
        DemonstrationError: the store cannot be read or holds another task.
        EnvError: no such task.
    """
    known = robomimic_task(task)
    action, width = (_ACTION, known.policy_size) if absolute else (_DELTA, known.delta_size)
    read = read_demonstrations(path, (*known.low_dim, action))
    shapes = {key: values.shape[1:] for key, values in read.arrays.items()}
    expected = {key: (size,) for key, size in known.low_dim.items()} | {action: (width,)}
    if shapes != expected or read.attributes.get("task") != task:
        raise DemonstrationError(
            f"demonstrations {path}: expected {task} with frames {expected}, got {read.attributes.get('task')} with "
            f"{shapes}; give the store of this task."
        )
    arrays = {key: np.asarray(values, dtype=np.float32) for key, values in read.arrays.items()}
    actions = arrays.pop(action)
    return LowDimDemonstrations(MappingProxyType(arrays), actions, read.episode_ends)


def copy_low_dim(task: str, source: Path | str, target: Path | str) -> None:
    """Write the store ``target`` from the robomimic file ``source``: low-dim observations and both kinds of actions.

    Raises:
        DemonstrationError: ``source`` cannot be read or is of another task.
        EnvError: no such task, or robomimic is not installed.
    """
    # Not above: a store is read without robomimic.
    from envs.demos.robomimic import read_robomimic

    absolute, deltas = (read_robomimic(source, task, absolute=each) for each in (True, False))
    arrays = {**absolute.observations, _ACTION: absolute.actions, _DELTA: deltas.actions}
    attributes = {"task": task, "source": f"python scripts/make_demos.py task={task}, file {Path(source).name}"}
    write_demonstrations(
        Demonstrations(MappingProxyType(arrays), absolute.episode_ends, MappingProxyType(attributes)), target
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``copy_low_dim`` from the command line."""
    parser = argparse.ArgumentParser(prog="python -m envs.demos.robomimic_store", description=copy_low_dim.__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("source", type=Path, help="a robomimic HDF5 file, published or recorded")
    parser.add_argument("target", type=Path, nargs="?", help="the store to write; this package's own by default")
    options = parser.parse_args(arguments)
    try:
        copy_low_dim(options.task, options.source, options.target or store_of(options.task))
    except (DemonstrationError, EnvError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
