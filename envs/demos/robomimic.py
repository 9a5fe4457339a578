"""robomimic's HDF5 files: the published ones and ours, read and written.

::

    data            attributes env_args (JSON: env_name, env_version, env_kwargs), total
      demo_0        attributes num_samples, model_file (MuJoCo XML)
        actions     deltas [T, arms * 7];  actions_abs: the same as poses for the controller
        states      [T, S], before each action;  rewards, dones [T]
        obs         key -> [T, ...], before each action;  next_obs: after it
    mask            filter key -> names of demonstrations
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from envs.actions import absolute_episode, policy_from_controller
from envs.demos.replay import Demonstrations
from envs.errors import DemonstrationError
from envs.robomimic import RobomimicEnv
from envs.robomimic_package import ROBOSUITE_VERSION, SequenceDataset, h5py
from envs.robomimic_tasks import RobomimicTask, robomimic_task

_VALID_EVERY = 10
"""One demonstration in so many is masked ``valid``, as in the published files."""


@dataclass(frozen=True)
class RobomimicDemonstrations:
    """Demonstrations in the keys and units of ``envs.robomimic.RobomimicEnv``, at 20 Hz.

    Attributes:
        observations: key -> float32[N, size]; images uint8[N, height, width, 3].
        actions: float32[N, arms * 10], absolute, or float32[N, arms * 7], deltas; executed right after the observation
            of their row. See ``envs.actions``.
        states: float64[N, S], of the simulation, before the action of their row.
        models: E scenes as MuJoCo XML; with the first state of its episode it is what ``reset`` takes.
        episode_ends: int64[E], the index one past each episode's last frame.
    """

    observations: Mapping[str, np.ndarray]
    actions: np.ndarray
    states: np.ndarray
    models: tuple[str, ...]
    episode_ends: np.ndarray


@dataclass(frozen=True)
class RecordedEpisode:
    """One demonstration of T steps as it goes into a file.

    Attributes:
        arrays: ``actions``, ``actions_abs`` float64[T, arms * 7], ``states`` float64[T, S], ``rewards`` float64[T],
            ``dones`` int64[T], and ``obs/KEY``, ``next_obs/KEY`` of T rows each.
        model: the scene as MuJoCo XML.
        seed: what its first state was drawn with.
    """

    arrays: Mapping[str, np.ndarray]
    model: str
    seed: int

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.arrays.items()}
        if len(set(lengths.values())) != 1 or not lengths["actions"]:
            raise DemonstrationError(
                f"demonstration of seed {self.seed}: expected arrays of one length of at least 1, got {lengths}; "
                "record it again."
            )


def read_robomimic(
    path: Path | str,
    task: str,
    *,
    absolute: bool,
    keys: Sequence[str] | None = None,
    filter_key: str | None = None,
) -> RobomimicDemonstrations:
    """Read a robomimic file, published (``low_dim*.hdf5``, ``image*.hdf5``) or ours.

    Args:
        path: the file.
        task: the name of the task it must be of.
        absolute: give absolute actions. Where a file has deltas alone they are computed from its states: the simulated
            hand is put where it was, as in diffusion_policy's conversion.
        keys: observations to read, of ``low_dim`` or ``images`` of the task; null for all of ``low_dim``.
        filter_key: the mask of demonstrations to read (``train``, ``valid``, ...); null for all.

    Raises:
        DemonstrationError: the file is missing, damaged, of another task or robosuite, or lacks what is asked for, or
            its states are to be simulated and it does not say by which robosuite.
        EnvError: no such task.
    """
    path, known = Path(path), robomimic_task(task)
    keys = tuple(known.low_dim if keys is None else keys)
    observed = [f"obs/{key}" for key in keys]
    with _whole(path), h5py.File(path) as file:
        version = _require_task(file, path, known)
        _require_episodes(file, path, known, [*observed, "actions", "states"], filter_key)
    with _whole(path):
        # robomimic itself filters and sorts the episodes; read one by one, as its cache would keep every window.
        data = SequenceDataset(
            str(path), obs_keys=keys, dataset_keys=("actions",), filter_by_attribute=filter_key, load_next_obs=False
        )
        models = tuple(str(data.hdf5_file[f"data/{name}"].attrs["model_file"]) for name in data.demos)
        names = [*observed, "actions", "states"] + ["actions_abs"] * all(
            "actions_abs" in data.hdf5_file[f"data/{name}"] for name in data.demos
        )
        episodes = [{key: data.get_dataset_for_ep(demo, key)[()] for key in names} for demo in data.demos]
        data.close_and_delete_hdf5_handle()
    arrays = {key: np.concatenate([episode[key] for episode in episodes]) for key in names}
    ends = np.cumsum([len(episode["states"]) for episode in episodes]).astype(np.int64)
    arrays["wanted"] = _absolute(arrays, ends, known, path, version) if absolute else _deltas(arrays, path)
    # Built for its checks: episodes of at least one frame, arrays of one length.
    read = Demonstrations(MappingProxyType(arrays), ends, MappingProxyType({})).arrays
    observations = {key: _as_given(read[f"obs/{key}"]) for key in keys}
    actions = read["wanted"].astype(np.float32)
    return RobomimicDemonstrations(MappingProxyType(observations), actions, read["states"], models, ends)


def write_robomimic(path: Path | str, episodes: Iterable[RecordedEpisode], env_args: Mapping[str, Any]) -> None:
    """Write a file that robomimic reads; it replaces ``path`` only once it is whole.

    Args:
        path: the file.
        episodes: at least one; read one by one, so that they need not fit into memory.
        env_args: of the environment they were recorded in (``envs.robomimic.env_args``).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    names: list[str] = []
    total = 0
    with h5py.File(partial, "w") as file:
        data = file.create_group("data")
        for episode in episodes:
            name = f"demo_{len(names)}"
            group = data.create_group(name)
            for key, values in episode.arrays.items():
                # Images are most of a file and compress to a fifth; the rest is small and read as it lies.
                group.create_dataset(key, data=values, compression="gzip" if values.ndim > 2 else None)
            steps = len(episode.arrays["actions"])
            group.attrs.update({"num_samples": steps, "model_file": episode.model, "seed": episode.seed})
            names.append(name)
            total += steps
        data.attrs.update({"total": total, "env_args": json.dumps(dict(env_args), indent=4)})
        valid = names[_VALID_EVERY - 1 :: _VALID_EVERY] or names[-1:]
        masks = {"train": [name for name in names if name not in valid] or names, "valid": valid}
        for key, chosen in masks.items():
            file.create_dataset(f"mask/{key}", data=np.array(chosen, dtype="S"))
    partial.replace(path)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn what reading a missing or damaged file raises into a refusal."""
    if not path.is_file():
        raise DemonstrationError(
            f"demonstrations: expected a robomimic file at {path}, got nothing; record some with python "
            "scripts/make_demos.py, or give a file of yours with demonstrations=PATH."
        )
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise DemonstrationError(
            f"demonstrations {path}: expected a whole HDF5 file, got one cut short or damaged ({error}); copy it again."
        ) from error


def _require_task(file: h5py.File, path: Path, task: RobomimicTask) -> str | None:
    """Return the version of robosuite that the file names, which older ones do not."""
    stored = file["data"].attrs.get("env_args") if "data" in file else None
    if stored is None:
        raise DemonstrationError(
            f"demonstrations {path}: expected a group 'data' with env_args, got {sorted(file)}; "
            "this is not a robomimic data set."
        )
    env_args = json.loads(stored)
    if env_args["env_name"] != task.simulation:
        raise DemonstrationError(
            f"demonstrations {path}: expected {task.simulation} for task {task.name}, got {env_args['env_name']}; "
            "give the data set of this task."
        )
    version: str | None = env_args.get("env_version")
    if version is not None:
        _require_installed(version, path)
    return version


def _require_installed(version: str | None, path: Path) -> None:
    if version != ROBOSUITE_VERSION:
        raise DemonstrationError(
            f"demonstrations {path}: expected data of the installed robosuite {ROBOSUITE_VERSION}, got of "
            f"{version or 'an unnamed one'}; take the data set's file for that version, for the simulations differ."
        )


def _require_episodes(
    file: h5py.File, path: Path, task: RobomimicTask, keys: Sequence[str], filter_key: str | None
) -> None:
    masks = sorted(file.get("mask", ()))
    if filter_key is not None and filter_key not in masks:
        raise DemonstrationError(
            f"demonstrations {path}: expected a filter key among {masks}, got {filter_key!r}; choose one of these."
        )
    names = sorted(file["data"]) if filter_key is None else [name.decode() for name in file["mask"][filter_key]]
    if not names:
        raise DemonstrationError(f"demonstrations {path}: expected at least one episode, got none; record some.")
    for name in names:
        episode = file["data"].get(name, {})
        missing = [key for key in keys if key not in episode]
        attributes = {"num_samples", "model_file"} - set(episode.attrs if episode else ())
        if missing or attributes:
            raise DemonstrationError(
                f"demonstrations {path}, {name}: expected {[*keys, 'num_samples', 'model_file']}, got none of "
                f"{[*missing, *sorted(attributes)]}; extract them with robomimic's dataset_states_to_obs.py or leave "
                "them out of the task's observation."
            )
        sizes = {f"obs/{key}": size for key, size in task.low_dim.items()}
        sizes |= dict.fromkeys(("actions", "actions_abs"), task.delta_size)
        expected = {key: (sizes[key],) for key in (*keys, "actions_abs") if key in sizes and key in episode}
        widths = {key: episode[key].shape[1:] for key in expected}
        if widths != expected:
            raise DemonstrationError(
                f"demonstrations {path}, {name}: expected frames of {expected}, got {widths}; "
                "give the data set of this task."
            )


def _absolute(
    arrays: Mapping[str, np.ndarray], ends: np.ndarray, task: RobomimicTask, path: Path, version: str | None
) -> np.ndarray:
    """Return float64[N, arms * 10]."""
    if "actions_abs" in arrays:
        return policy_from_controller(arrays["actions_abs"])
    if _are_poses(arrays["actions"]):
        return policy_from_controller(arrays["actions"])
    _require_installed(version, path)
    with closing(RobomimicEnv(task.name)) as env:
        positions, rotations = env.hand_poses(arrays["states"])
    episodes = (np.split(each, ends[:-1]) for each in (arrays["actions"], positions, rotations))
    return policy_from_controller(np.concatenate([absolute_episode(*each) for each in zip(*episodes, strict=True)]))


def _deltas(arrays: Mapping[str, np.ndarray], path: Path) -> np.ndarray:
    """Return float64[N, arms * 7]."""
    if _are_poses(arrays["actions"]):
        raise DemonstrationError(
            f"demonstrations {path}: expected delta actions, got absolute ones; train with the task's absolute "
            "action_dim or give the file of deltas."
        )
    return arrays["actions"]


def _are_poses(actions: np.ndarray) -> bool:
    # diffusion_policy's converted files say in env_args what they were before. Deltas keep to [-1, 1]; a hand that
    # points down is turned by about pi.
    return bool(np.abs(actions).max() > 1.001)


def _as_given(observation: np.ndarray) -> np.ndarray:
    return observation if observation.dtype == np.uint8 else observation.astype(np.float32)
