"""Stores of robomimic demonstrations, read without robomimic's packages."""

import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from envs.demos.replay import Demonstrations, write_demonstrations
from envs.demos.robomimic_store import main, read_store
from envs.errors import DemonstrationError
from envs.robomimic_tasks import TASKS

ENDS = np.array([3, 7])


def store(path: Path, task: str = "lift", **changed: np.ndarray) -> Path:
    """Write a store of two episodes whose numbers count up."""
    known = TASKS[task]
    sizes = {**known.low_dim, "action": known.policy_size, "delta_action": known.delta_size}
    arrays = {key: np.arange(7 * size, dtype=np.float32).reshape(7, size) for key, size in sizes.items()} | changed
    write_demonstrations(Demonstrations(MappingProxyType(arrays), ENDS, MappingProxyType({"task": task})), path)
    return path


def test_both_kinds_of_actions(tmp_path: Path) -> None:
    path = store(tmp_path / "lift.zarr.zip")
    absolute, deltas = (read_store(path, "lift", absolute=each) for each in (True, False))
    assert absolute.actions.tolist() == np.arange(70.0).reshape(7, 10).tolist()
    assert deltas.actions.tolist() == np.arange(49.0).reshape(7, 7).tolist()
    assert {key: values.shape for key, values in absolute.observations.items()} == {
        key: (7, size) for key, size in TASKS["lift"].low_dim.items()
    }
    assert absolute.episode_ends.tolist() == [3, 7]


def test_another_task_refuses(tmp_path: Path) -> None:
    # Can and Square have the same sizes.
    path = store(tmp_path / "can.zarr.zip", task="can")
    for task in ("square", "lift"):
        with pytest.raises(
            DemonstrationError, match=rf"expected {task} with frames .*, got can with .*; give the store"
        ):
            read_store(path, task, absolute=True)


def test_another_action_size_refuses(tmp_path: Path) -> None:
    path = store(tmp_path / "lift.zarr.zip", action=np.zeros((7, 9), np.float32))
    with pytest.raises(DemonstrationError, match=r"'action': \(10,\).*, got lift with .*'action': \(9,\)"):
        read_store(path, "lift", absolute=True)


def test_copying_a_missing_file_ends_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("robosuite", reason="pip install -e '.[robomimic]'")
    with pytest.raises(SystemExit):
        main(["lift", str(tmp_path / "none.hdf5"), str(tmp_path / "lift.zarr.zip")])
    assert "expected a robomimic file at" in capsys.readouterr().err
    assert not (tmp_path / "lift.zarr.zip").exists()


def test_reading_imports_no_simulator(tmp_path: Path) -> None:
    path = store(tmp_path / "lift.zarr.zip")
    code = (
        "import sys; from envs.demos.robomimic_store import read_store; "
        f"read_store({str(path)!r}, 'lift', absolute=True); "
        "assert not {'robosuite', 'robomimic', 'mujoco', 'h5py'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
