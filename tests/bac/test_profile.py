"""Feature profiles: what they say, their file, and what they refuse."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from toys import BLOCKS, PROVENANCE, random_profile
from zarr.storage import ZipStore

from bac.errors import CorruptArtefact, InvalidInput, MissingArtefact, Unavailable
from bac.profile import FeatureProfile, Metric


def changed(metric: Metric, change: Callable[[np.ndarray], np.ndarray]) -> FeatureProfile:
    values = dict(random_profile(seed=0).values)
    return FeatureProfile(values | {metric: change(values[metric].copy())}, BLOCKS, 32, PROVENANCE)


def with_nan(values: np.ndarray) -> np.ndarray:
    values[2, 3, 4] = np.nan
    return values


def with_infinity(values: np.ndarray) -> np.ndarray:
    values[0, 0, 1] = np.inf
    return values


def with_a_dead_block(values: np.ndarray) -> np.ndarray:
    values[4] = 1.0
    return values


def test_similarity_grows_with_likeness() -> None:
    profile = random_profile(seed=0)
    assert np.array_equal(profile.similarity(Metric.COSINE), profile.values[Metric.COSINE])
    for distance in (Metric.L1, Metric.L2, Metric.MSE):
        assert np.array_equal(profile.similarity(distance), -profile.values[distance])


def test_reuse_error_is_the_mean_over_all_pairs_of_steps() -> None:
    profile = random_profile(seed=0, steps=3)
    pairs = [(step, other) for step in range(3) for other in range(3)]
    for block, error in enumerate(profile.reuse_error()):
        assert error == pytest.approx(sum(float(profile.values[Metric.L1][block][pair]) for pair in pairs) / 9)


def test_file_round_trip(tmp_path: Path) -> None:
    profile = random_profile(seed=1)
    path = tmp_path / "deeper" / "p.zarr.zip"
    profile.save(path)
    read = FeatureProfile.load(str(path))
    assert (read.blocks, read.observations, read.provenance) == (BLOCKS, 32, PROVENANCE)
    assert read.steps == 7
    for metric in Metric:
        assert np.array_equal(read.values[metric], profile.values[metric])
        assert read.values[metric].dtype == np.float32
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("change", [with_nan, with_infinity])
def test_refuses_nan(metric: Metric, change: Callable[[np.ndarray], np.ndarray]) -> None:
    with pytest.raises(InvalidInput, match=rf"feature profile, {metric}: expected finite .* with 1 NaN or infinite"):
        changed(metric, change)


@pytest.mark.parametrize("metric", list(Metric))
def test_refuses_constant_statistics(metric: Metric) -> None:
    with pytest.raises(InvalidInput, match=rf"{metric}: expected features that change .* statistics for \['L1.ca'\]"):
        changed(metric, with_a_dead_block)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize(
    "change",
    [
        lambda values: values[:5],
        lambda values: values[:, :6],
        lambda values: values[:, :6, :6],
        lambda values: values[0],
    ],
    ids=["blocks", "not square", "other steps than the other metrics", "no blocks"],
)
def test_refuses_another_shape(metric: Metric, change: Callable[[np.ndarray], np.ndarray]) -> None:
    with pytest.raises(InvalidInput, match=r"expected finite float\[6 blocks, K, K\], got shape \("):
        changed(metric, change)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: b"",
        lambda whole: b"not a zip at all",
        # A flipped bit in the stored numbers: the zip's checksum must catch it, the numbers would look sound.
        lambda whole: whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:],
    ],
    ids=["half", "one byte short", "empty", "text", "flipped bit"],
)
def test_load_refuses_damaged_files(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "p.zarr.zip"
    random_profile(seed=1).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptArtefact, match=r"feature profile .*: expected a whole bac-profile-1 store, got"):
        FeatureProfile.load(path)


def test_load_refuses_foreign_zips(tmp_path: Path) -> None:
    holiday, other, partial = (tmp_path / name for name in ("holiday.zip", "other.zarr.zip", "partial.zarr.zip"))
    with zipfile.ZipFile(holiday, "w") as archive:
        archive.writestr("beach.txt", "sand")
    with ZipStore(other, mode="w") as store:
        zarr.open_group(store, mode="w", attributes={"format": "somebody's"})
    with ZipStore(partial, mode="w") as store:
        zarr.open_group(store, mode="w", attributes={"format": "bac-profile-1"})
    for path in (holiday, other, partial):
        with pytest.raises(CorruptArtefact, match=r"expected a whole bac-profile-1 store, got .*; write it again with"):
            FeatureProfile.load(path)


class Ran:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


@pytest.mark.parametrize("consolidated", [False, True])
def test_load_runs_no_pickle(tmp_path: Path, consolidated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # As numcodecs before 0.16.6 has it.
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    path = tmp_path / "p.zarr.zip"
    random_profile(seed=1).save(path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    attributes = json.loads(files["zarr.json"])["attributes"]
    array = {
        "zarr_format": 2,
        "shape": [1],
        "chunks": [1],
        "dtype": "|O",
        "fill_value": None,
        "order": "C",
        "compressor": None,
        "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}],
    }
    inline = {"kind": "inline", "must_understand": False, "metadata": {"cosine": array | {"attributes": {}}}}
    if consolidated:
        group = {"zarr_format": 3, "node_type": "group", "attributes": attributes, "consolidated_metadata": inline}
        described = {"zarr.json": group}
    else:
        described = {".zgroup": {"zarr_format": 2}, ".zattrs": attributes, "cosine/.zarray": array}
    with zipfile.ZipFile(path, "w") as archive:
        for name, document in described.items():
            archive.writestr(name, json.dumps(document))
        archive.writestr("cosine/0", pickle.dumps(Ran(tmp_path / "ran")))
    with pytest.raises(CorruptArtefact, match="expected a whole bac-profile-1 store, got"):
        FeatureProfile.load(path)
    assert not (tmp_path / "ran").exists()


def test_load_refuses_missing_files(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefact, match=r"feature profile: expected a file .*, got none; run scripts/calibrate"):
        FeatureProfile.load(tmp_path / "absent.zarr.zip")


def test_failed_save_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "p.zarr.zip"
    random_profile(seed=1).save(path)
    unwritable = FeatureProfile(random_profile(seed=2).values, BLOCKS, object(), PROVENANCE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not JSON serializable"):
        unwritable.save(path)
    assert np.array_equal(FeatureProfile.load(path).values[Metric.L1], random_profile(seed=1).values[Metric.L1])
    assert list(tmp_path.iterdir()) == [path]


STATISTICS = {
    "sensitivity": (7,),
    "stream_change": (7, 7),
    "residual_change": (7, 7),
    "residual_slope": (7, 7),
    "gates": (6, 7),
    "attention": (2, 7, 4),
    "token_likeness": (6, 7, 3),
    "solver_mse": (1, 5, 6, 16),
    "channel_dynamics": (3, 6, 16),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistic_survives_the_file(tmp_path: Path, name: str) -> None:
    array = np.random.default_rng(0).random(STATISTICS[name])
    for given in (array, None):
        replace(random_profile(seed=0), **{name: given}).save(tmp_path / "profile.zarr.zip")
        read = FeatureProfile.load(tmp_path / "profile.zarr.zip")
        assert set(read.statistics) == (set() if given is None else {name})
        assert given is None or np.array_equal(read.require(name, "toy"), given)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistic_refuses_what_it_cannot_be(name: str) -> None:
    shape = STATISTICS[name]
    for array in (np.ones((8, *shape[1:])), np.zeros(shape), np.full(shape, np.nan), np.ones((*shape, 1))):
        with pytest.raises(InvalidInput, match=rf"feature profile, {name}: expected \[.*\] in \[.*\], not all 0, got"):
            replace(random_profile(seed=0), **{name: array})
    if name == "gates":
        with pytest.raises(InvalidInput, match=r"in \[0, 1\].*, 1 values outside or NaN"):
            replace(random_profile(seed=0), gates=np.linspace(0, 1.001, 42).reshape(shape))
    if name != "residual_slope":
        with pytest.raises(InvalidInput, match=r"in \[(0|-1\.0001), .* values outside or NaN"):
            replace(random_profile(seed=0), **{name: -2 * np.ones(shape)})


def test_a_missing_statistic_says_how_to_get_it() -> None:
    for name in STATISTICS:
        with pytest.raises(InvalidInput, match=rf"cache=toy: expected a profile with {name}, got one without; run scr"):
            random_profile(seed=0).require(name, "toy")


def test_a_python_without_zarr_says_where_to_calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, path = random_profile(seed=0), tmp_path / "profile.zarr.zip"
    kept.save(path)
    monkeypatch.setitem(sys.modules, "zarr", None)
    told = "feature profile: expected zarr 3, from Python 3.11 on, got none; calibrate on another machine"
    with pytest.raises(Unavailable, match=told):
        FeatureProfile.load(path)
    with pytest.raises(Unavailable, match=told):
        kept.save(tmp_path / "other.zarr.zip")
    assert not (tmp_path / "other.zarr.zip").exists()
