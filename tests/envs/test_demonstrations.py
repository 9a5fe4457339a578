import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, ZipStore

from envs.demos.push_t import PUSH_T_DEMOS, copy_low_dim, main, read_push_t
from envs.demos.replay import Demonstrations, read_demonstrations, write_demonstrations
from envs.demos.windows import window_index
from envs.errors import DemonstrationError, EnvError

FRAMES, ENDS = 50, np.array([20, 50])
SHAPES = {"keypoint": (9, 2), "state": (5,), "action": (2,), "n_contacts": (1,)}


def small(value: float = 1.0) -> Demonstrations:
    return Demonstrations({"action": np.full((4, 2), value)}, np.array([1, 4]), {"licence": "MIT"})


def write_published(path: Path, *, images: bool = True) -> dict[str, np.ndarray]:
    """Write a zarr v2 store as diffusion_policy publishes it, its images in a codec that nobody has."""
    store = ZipStore(path, mode="w") if path.suffix == ".zip" else LocalStore(path)
    root = zarr.create_group(store, zarr_format=2)
    data, meta = root.create_group("data"), root.create_group("meta")
    rng = np.random.default_rng(0)
    arrays = {name: rng.uniform(0, 512, (FRAMES, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    for name, values in arrays.items():
        data.create_array(name, data=values, chunks=(7, *values.shape[1:]))
    meta.create_array("episode_ends", data=ENDS)
    if images:
        data.create_array("img", data=np.ones((FRAMES, 4, 4, 3), np.float32), chunks=(7, 4, 4, 3))
    store.close()
    return arrays


def test_our_store_is_whole_and_says_where_it_is_from() -> None:
    demos = read_push_t()
    assert (len(demos.episode_ends), demos.episode_ends[-1]) == (206, 25_650)
    assert {key: (values.shape, values.dtype) for key, values in demos.observations.items()} == {
        "keypoints": ((25_650, 18), np.float32),
        "agent_position": ((25_650, 2), np.float32),
    }
    assert (demos.actions.shape, demos.states.shape) == ((25_650, 2), (25_650, 5))
    assert all(array.dtype == np.float32 for array in (demos.actions, demos.states))
    np.testing.assert_array_equal(demos.actions[0], [233, 71])
    attributes = read_demonstrations(PUSH_T_DEMOS, ("action",)).attributes
    assert attributes["licence"] == "MIT"
    assert {"source", "citation"} < set(attributes)
    assert (PUSH_T_DEMOS.parent / "LICENSE").read_text().startswith("MIT License")
    assert PUSH_T_DEMOS.stat().st_size < 1_200_000


def test_episodes_are_slices_of_the_arrays() -> None:
    demos = read_demonstrations(PUSH_T_DEMOS, ("action",))
    assert (demos.episodes, demos.frames) == (206, 25_650)
    assert [demos.episode(index) for index in (0, 1)] == [slice(0, 161), slice(161, 279)]
    assert demos.episode(205).stop == 25_650


def test_push_t_has_24208_windows() -> None:
    windows = window_index(read_push_t().episode_ends, horizon=16, pad_before=1, pad_after=7)
    assert windows.shape == (24_208, 16)


def test_window_padding_repeats_the_edges_of_the_episode() -> None:
    windows = window_index(np.array([3, 7]), horizon=3, pad_before=1, pad_after=2)
    assert windows.tolist() == [
        [0, 0, 1],
        [0, 1, 2],
        [1, 2, 2],
        [2, 2, 2],
        [3, 3, 4],
        [3, 4, 5],
        [4, 5, 6],
        [5, 6, 6],
        [6, 6, 6],
    ]


@pytest.mark.parametrize("name", ["replay.zarr", "replay.zarr.zip"])
def test_published_v2_store_reads_with_images_present_but_not_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    arrays = write_published(path)
    if path.is_dir():
        for chunk in (path / "data" / "img").glob("[0-9]*"):
            chunk.write_bytes(b"not a chunk")
        with pytest.raises(DemonstrationError):
            read_demonstrations(path, ("img",))
    demos = read_push_t(path)
    np.testing.assert_array_equal(demos.observations["keypoints"], arrays["keypoint"].reshape(FRAMES, 18))
    np.testing.assert_array_equal(demos.observations["agent_position"], arrays["state"][:, :2])
    np.testing.assert_array_equal(demos.actions, arrays["action"])
    np.testing.assert_array_equal(demos.states, arrays["state"])
    np.testing.assert_array_equal(demos.episode_ends, ENDS)


def test_copy_keeps_all_but_the_images(tmp_path: Path) -> None:
    arrays = write_published(tmp_path / "published.zarr")
    main([str(tmp_path / "published.zarr"), str(tmp_path / "copy.zarr.zip")])
    copy = read_demonstrations(tmp_path / "copy.zarr.zip", tuple(SHAPES))
    assert all(np.array_equal(copy.arrays[name], values) for name, values in arrays.items())
    assert copy.attributes == read_demonstrations(PUSH_T_DEMOS, ("action",)).attributes
    assert not any("img" in name for name in zipfile.ZipFile(tmp_path / "copy.zarr.zip").namelist())


def test_command_line_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing.zarr"), str(tmp_path / "copy.zarr.zip")])
    assert "expected a zarr store at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_written_store_reads_back(tmp_path: Path) -> None:
    write_demonstrations(small(3), tmp_path / "a.zarr.zip")
    read = read_demonstrations(tmp_path / "a.zarr.zip", ("action",))
    np.testing.assert_array_equal(read.arrays["action"], np.full((4, 2), 3.0))
    assert (read.episode_ends.tolist(), dict(read.attributes)) == ([1, 4], {"licence": "MIT"})


def test_killed_write_leaves_the_older_store(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr.zip"
    write_demonstrations(small(1), path)
    # The process kills itself with SIGKILL when the arrays are written and the store is not yet closed.
    code = """
import os, sys, numpy as np, zarr
from envs.demos.replay import Demonstrations, write_demonstrations
write = zarr.Group.create_array
def killed(group, name, **arguments):
    if name == "episode_ends":
        os.kill(os.getpid(), 9)
    return write(group, name, **arguments)
zarr.Group.create_array = killed
write_demonstrations(Demonstrations({"action": np.full((4, 2), 2.0)}, np.array([4]), {}), sys.argv[1])
"""
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_array_equal(read_demonstrations(path, ("action",)).arrays["action"], small(1).arrays["action"])
    write_demonstrations(small(2), path)
    np.testing.assert_array_equal(read_demonstrations(path, ("action",)).arrays["action"], small(2).arrays["action"])
    assert list(tmp_path.iterdir()) == [path]


def refusal(path: Path, keys: tuple[str, ...] = ("action",)) -> str:
    """Return the sentence of the refusal to read."""
    with pytest.raises(DemonstrationError) as refused:
        read_demonstrations(path, keys)
    assert isinstance(refused.value, EnvError)
    assert "\n" not in str(refused.value)
    return str(refused.value)


class Ran:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


@pytest.mark.parametrize("key", ["data/action", "meta/episode_ends"])
def test_a_published_store_runs_no_pickle(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As numcodecs before 0.16.6 has it.
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    write_published(tmp_path / "a.zarr")
    folder = tmp_path / "a.zarr" / key
    array = json.loads((folder / ".zarray").read_text())
    disguise = {"dtype": "|O", "fill_value": None, "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}]}
    (folder / ".zarray").write_text(json.dumps(array | disguise | {"compressor": None}))
    for chunk in folder.glob("[0-9]*"):
        chunk.write_bytes(pickle.dumps(Ran(tmp_path / "ran")))
    message = refusal(tmp_path / "a.zarr")
    assert f"expected numbers in '{key.split('/')[1]}', got" in message
    assert "behind ['vlen-utf8', 'pickle']; unpickling runs whatever the file says" in message
    assert not (tmp_path / "ran").exists()


def test_missing_path_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    assert refusal(path) == f"demonstrations: expected a zarr store at {path}, got nothing; check the path."


def test_missing_key_refuses_and_lists_what_is_there(tmp_path: Path) -> None:
    write_demonstrations(small(), tmp_path / "a.zarr.zip")
    message = refusal(tmp_path / "a.zarr.zip", ("action", "image"))
    assert "expected arrays ['action', 'image'] in 'data', got ['action']; ['image'] must be recorded" in message


@pytest.mark.parametrize("lost", ["data", "meta"])
def test_missing_group_refuses(lost: str, tmp_path: Path) -> None:
    write_published(tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr" / lost)
    assert f"expected a group '{lost}', got" in refusal(tmp_path / "a.zarr")


def test_missing_episode_ends_refuse(tmp_path: Path) -> None:
    write_published(tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr" / "meta" / "episode_ends")
    assert "expected arrays ['episode_ends'] in 'meta', got []" in refusal(tmp_path / "a.zarr")


def test_folder_without_a_store_refuses(tmp_path: Path) -> None:
    assert "expected a zarr group, got a folder or zip without one at its top" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated_zip_refuses(kept: float, tmp_path: Path) -> None:
    whole = PUSH_T_DEMOS.read_bytes()
    (tmp_path / "a.zarr.zip").write_bytes(whole[: int(len(whole) * kept)])
    assert "expected a whole zarr store, got a damaged one" in refusal(tmp_path / "a.zarr.zip")


def test_flipped_byte_in_the_zip_refuses(tmp_path: Path) -> None:
    damaged = bytearray(PUSH_T_DEMOS.read_bytes())
    damaged[100_000] ^= 1
    (tmp_path / "a.zarr.zip").write_bytes(damaged)
    assert "Bad CRC-32" in refusal(tmp_path / "a.zarr.zip", ("keypoint", "action", "state"))


def test_folder_that_lost_a_chunk_refuses(tmp_path: Path) -> None:
    write_published(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "data" / "action" / "3.0").unlink()
    assert "expected every chunk of 'data', got these numbers missing: {'action': 1}" in refusal(tmp_path / "a.zarr")


def test_folder_with_an_emptied_chunk_refuses(tmp_path: Path) -> None:
    write_published(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "data" / "action" / "3.0").write_bytes(b"")
    assert "expected a whole zarr store, got a damaged one" in refusal(tmp_path / "a.zarr")


@pytest.mark.parametrize(("ends", "frames"), [([], 4), ([4, 2], 4), ([2, 2, 4], 4), ([2, 5], 4)])
def test_frames_that_do_not_fit_the_episodes_refuse(ends: list[int], frames: int) -> None:
    with pytest.raises(DemonstrationError, match=r"^demonstrations: expected increasing episode ends and arrays of"):
        Demonstrations({"action": np.zeros((frames, 2))}, np.array(ends, np.int64), {})


def test_store_of_another_task_refuses(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {name: np.zeros((4, *shape)) for name, shape in SHAPES.items()} | {
        "action": np.zeros((4, 7))
    }
    write_demonstrations(Demonstrations(arrays, np.array([4]), {}), tmp_path / "a.zarr.zip")
    with pytest.raises(DemonstrationError, match=r"expected Push-T frames .*, got .*\(7,\)"):
        read_push_t(tmp_path / "a.zarr.zip")


def test_copy_refuses_a_source_without_contacts(tmp_path: Path) -> None:
    write_published(tmp_path / "a.zarr")
    shutil.rmtree(tmp_path / "a.zarr" / "data" / "n_contacts")
    with pytest.raises(DemonstrationError, match=r"\['n_contacts'\] must be recorded"):
        copy_low_dim(tmp_path / "a.zarr", tmp_path / "copy.zarr.zip")
