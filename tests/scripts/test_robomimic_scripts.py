"""The path of the data on robomimic's tasks: recorded, trained, played; an original checkpoint; a refusal in time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("robosuite", reason="pip install -e '.[robomimic]'")

import eval as evaluation
from studies.calibration import Calibration

# Before any test takes the graphics away: mujoco reads once what draws.
import envs.robomimic  # noqa: F401
from envs.demos.robomimic import read_robomimic
from envs.errors import EnvError
from tests.commands import run_script
from tests.composing import composed
from tests.policies.original_payloads import original_payload, save

pytestmark = pytest.mark.sim

SMALL = ["policy.layers=2", "policy.width=16", "policy.heads=2", "policy.train_steps=10", "optimiser.batch_size=4"]
STEPS = ["optimiser.cycles=[2]", "optimiser.warmup_steps=1", "sampler.steps=2"]
SHORT = ["episodes=1", "task.max_steps=8", "processes=1", "video=0", "latency_calls=1", "error_observations=2"]
FEW = ["calibration.observations=2", "calibration.sensitivity_observations=0", "cache=bac", "cache.updates=3"]


def _run(folder: Path, script: str, *overrides: str) -> str:
    return run_script(folder, script, *overrides).stdout


def _results(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "outputs" / "eval").glob("*/results.json")
    return json.loads(path.read_text())


def test_lift_is_recorded_trained_and_played(tmp_path: Path) -> None:
    _run(tmp_path, "make_demos", "task=lift", "episodes=1")
    demos = "outputs/demos/lift/low_dim.hdf5"
    recorded = read_robomimic(tmp_path / demos, "lift", absolute=True)
    assert len(recorded.episode_ends) == 1
    given = ["task=lift", f"demonstrations={demos}", "threads=1"]
    _run(tmp_path, "train", *given, *SMALL, *STEPS, "rollout.every=2", "rollout.episodes=1", "task.max_steps=8")
    trained = json.loads((tmp_path / "outputs/train/lift/results.json").read_text())
    assert trained["steps"] == 2
    _run(tmp_path, "eval", *given, *SHORT, *FEW, "checkpoint=outputs/train/lift/checkpoint.safetensors")
    results = _results(tmp_path)
    assert (results["task"], results["seed"], results["scores"]) == ("lift", 100_000, [0])
    assert results["schedule"]["checkpoint"] == trained["digest"]
    assert results["schedule"]["method"] == "bac"


def test_original_checkpoint_of_can_plays(tmp_path: Path) -> None:
    save(tmp_path / "x.ckpt", original_payload("can"))
    told = _run(tmp_path, "eval", "task=can", "checkpoint=x.ckpt", "threads=1", *SHORT, *FEW)
    assert "first use of bac with this checkpoint" in told
    results = _results(tmp_path)
    assert (results["task"], results["scores"]) == ("can", [0])
    assert results["checkpoint"] == {"file": "x.ckpt", "weights": "ema"}
    assert results["schedule"]["method"] == "bac"


def test_missing_graphics_are_told_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glx")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(Calibration, "on_first_use", lambda *_: pytest.fail("calibrated"))
    config = composed("eval", "task=can", f"checkpoint={save(tmp_path / 'x.ckpt', original_payload('can'))}")
    with pytest.raises(EnvError, match=r"^rendering: expected a working EGL or OSMesa library, .*give video=0"):
        evaluation.main(config, tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["x.ckpt"]
