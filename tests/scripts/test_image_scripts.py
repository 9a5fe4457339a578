"""The path of the data from images, small: Push-T in a store as published, for it needs no graphics library."""

import json
from pathlib import Path

import numpy as np
import pytest

from envs.demos.push_t import read_push_t
from envs.demos.replay import Demonstrations, write_demonstrations
from tests.commands import run_script

SMALL = ["task=push_t_image", "threads=1", "demonstrations=published.zarr.zip"]


def _run(folder: Path, script: str, *overrides: str, ok: bool = True) -> str:
    done = run_script(folder, script, *overrides, status=0 if ok else 1)
    return done.stdout if ok else done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the start of a demonstration, images of noise, and a policy trained on it for two steps."""
    folder = tmp_path_factory.mktemp("image")
    read = read_push_t()
    arrays = {
        "state": read.states[:20],
        "action": read.actions[:20],
        "keypoint": read.observations["keypoints"][:20].reshape(-1, 9, 2),
        "img": np.random.default_rng(0).integers(0, 256, (20, 96, 96, 3)).astype(np.float32),
    }
    write_demonstrations(Demonstrations(arrays, np.array([20]), {}), folder / "published.zarr.zip")
    sizes = ["policy.layers=1", "policy.width=16", "policy.heads=2", "policy.train_steps=10"]
    steps = ["optimiser.cycles=[2]", "optimiser.warmup_steps=1", "optimiser.batch_size=2", "rollout.every=0"]
    _run(folder, "train", *SMALL, *sizes, *steps, "output=run", "sampler.steps=2")
    return folder


def test_image_policy_is_trained_played_and_its_encoder_itemised(trained: Path) -> None:
    short = ["episodes=1", "task.max_steps=9", "video=0", "latency_calls=1", "error_observations=2"]
    told = _run(
        trained, "eval", *SMALL, *short, "checkpoint=run/checkpoint.safetensors", "cache=none", "executor=eager"
    )
    assert "of which encoder, ms" in told
    results = json.loads((max((trained / "outputs" / "eval").iterdir()) / "results.json").read_text())
    assert results["task"] == "push_t_image"
    assert results["latency_ms"]["encoder"]["p50"] > 0
    assert results["gflops"]["encoder"] > 0


def test_image_policy_has_no_graph(trained: Path) -> None:
    given = ["task=push_t_image", "checkpoint=run/checkpoint.safetensors", "cache=none"]
    told = _run(trained, "export", *given, ok=False)
    assert told.startswith("error: export: expected a low-dim policy, got an image policy; play it with scripts/eval")
    # As the refusal says.
    short = ["episodes=1", "task.max_steps=9", "video=0", "latency_calls=1", "error_observations=2"]
    given = ["checkpoint=run/checkpoint.safetensors", "cache=none", "executor=onnx"]
    _run(trained, "eval", *SMALL, *short, *given)
    results = json.loads((max((trained / "outputs" / "eval").iterdir()) / "results.json").read_text())
    assert results["executor"]["kind"] == "onnx"
