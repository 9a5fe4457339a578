"""What a task needs of this machine, and which episodes of a file it takes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from bac.errors import InvalidInput
from configs.schema import CalibrateConfig, EvalConfig, TrainConfig
from configs.tasks import TaskDemonstrations, demonstrations, require_environment
from envs import graphics
from envs.errors import EnvError
from tests.composing import composed


@pytest.fixture
def no_graphics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with neither EGL nor OSMesa, as it looks once mujoco is imported."""
    pytest.importorskip("robosuite", reason="pip install -e '.[robomimic]'")
    # Before the variable is set, for mujoco reads it once.
    import envs.robomimic  # noqa: F401

    monkeypatch.setenv("MUJOCO_GL", graphics._NO_DRAWING)
    monkeypatch.delenv("DISPLAY", raising=False)


@pytest.mark.sim
@pytest.mark.parametrize(
    ("task", "draws", "refused"),
    [
        ("lift", False, False),
        ("lift", True, True),
        ("can_image", False, True),
        ("push_t", True, False),
        ("push_t_image", True, False),
    ],
)
def test_drawing_is_asked_for_where_it_is_needed(no_graphics: None, task: str, draws: bool, refused: bool) -> None:
    config = composed("eval", f"task={task}").task
    if not refused:
        require_environment(config, draws=draws)
        return
    with pytest.raises(EnvError, match=r"^rendering: expected a working EGL .*, or give video=0 and a task without im"):
        require_environment(config, draws=draws)


@pytest.mark.sim
def test_missing_packages_are_told_without_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("robosuite", reason="pip install -e '.[robomimic]'")
    for module in ("envs.robomimic", "envs.robomimic_package"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "robomimic", None)
    with pytest.raises(EnvError, match=r"^robomimic tasks: expected the packages .*, got no robomimic.*; install them"):
        require_environment(composed("eval", "task=can").task, draws=False)


def test_unknown_task_has_no_environment() -> None:
    with pytest.raises(InvalidInput, match=r"task\.name: expected one of .*, got chess"):
        require_environment(composed("eval", "task.name=chess").task, draws=False)


@pytest.mark.parametrize("script", ["eval", "calibrate", "train"])
def test_filter_key_is_an_option_of_what_reads_demonstrations(script: str) -> None:
    config: EvalConfig | CalibrateConfig | TrainConfig = composed(script, "task=can", "filter_key=20_percent")
    assert config.filter_key == "20_percent"
    assert composed(script, "task=can").filter_key is None


@pytest.mark.parametrize("task", ["push_t", "lift"])
def test_store_has_no_filter_keys(task: str) -> None:
    config = composed("eval", f"task={task}").task
    with pytest.raises(
        InvalidInput, match=rf"^filter_key: expected null for .*{task}\.zarr\.zip, a store .*, got train; leave it out"
    ):
        demonstrations(config, filter_key="train")


def _lift_file(path: Path) -> Path:
    """Write three episodes of one, two and three frames, each of its own number; the second is ``valid``."""
    from envs.demos.robomimic import RecordedEpisode, write_robomimic
    from envs.robomimic import env_args
    from envs.robomimic_package import h5py
    from envs.robomimic_tasks import TASKS

    def episode(number: int) -> RecordedEpisode:
        sizes = {f"obs/{key}": size for key, size in TASKS["lift"].low_dim.items()}
        sizes |= {"actions": 7, "actions_abs": 7, "states": 32}
        frames = {name: np.full((number, size), number / 10) for name, size in sizes.items()}
        return RecordedEpisode(frames, "<mujoco/>", number)

    write_robomimic(path, map(episode, (1, 2, 3)), env_args("lift", absolute=False))
    with h5py.File(path, "r+") as file:
        file["mask/20_percent"] = np.array(["demo_1"], dtype="S")
    return path


@pytest.mark.sim
def test_filter_key_chooses_the_episodes_of_a_robomimic_file(tmp_path: Path) -> None:
    pytest.importorskip("robosuite", reason="pip install -e '.[robomimic]'")
    path, task = str(_lift_file(tmp_path / "low_dim.hdf5")), composed("eval", "task=lift").task

    def read(filter_key: str | None) -> TaskDemonstrations:
        return demonstrations(task, path, filter_key)

    assert [read(key).episode_ends.tolist() for key in (None, "train", "valid")] == [[1, 3, 6], [1, 3], [3]]
    chosen = read("20_percent")
    assert (chosen.episode_ends.tolist(), chosen.actions.shape) == ([2], (2, 10))
    assert (chosen.observations["object"] == np.float32(0.2)).all()
    told = re.escape("expected a filter key among ['20_percent', 'train', 'valid'], got 'best'; choose one of these")
    with pytest.raises(EnvError, match=told):
        read("best")
