"""A checkpoint given by its path is calibrated when it is first used, once; original ones play as they are."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_checkpoint import main as convert
from studies.calibration import Calibration
from studies.episodes import play

import bac
from bac.errors import InvalidInput, Mismatch, Unavailable
from bac.methods import BlockAdaptive, HarmoniCa, HyCa, Method, NoCache, ProfilingDit, Search, SensitivityWeighted
from bac.profile import FeatureProfile
from configs.schema import CalibrationConfig, ImportConfig, TaskConfig
from configs.tasks import TaskDemonstrations, demonstrations, require_task
from envs.demos.replay import Demonstrations, write_demonstrations
from envs.robomimic_tasks import TASKS
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import CHECKPOINT_FILE, load_policy, make_schedule, profile_path
from policies.samplers import ddim
from tests.policies.original_image_payloads import original_image_payload
from tests.policies.original_payloads import original_payload, save

EVAL = Path(__file__).parent.parent.parent / "scripts" / "eval.py"
FEW = CalibrationConfig(
    observations=3,
    batch=2,
    seed=0,
    sensitivity_observations=1,
    trial_observations=3,
    router_observations=2,
    router_batch=2,
    router_iterations=1,
    router_penalty=0.02,
)
BAC = BlockAdaptive(updates=3)


def _push_t(max_steps: int = 8) -> TaskConfig:
    observation = {"keypoints": 18, "agent_position": 2}
    return TaskConfig(
        name="push_t",
        observation=observation,
        action_dim=2,
        action_steps=8,
        max_steps=max_steps,
        seed=100_000,
        rate_hz=10.0,
        least_range=0.0,
    )


@pytest.fixture(scope="module")
def demos() -> TaskDemonstrations:
    return demonstrations(_push_t())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "latest.ckpt", original_payload())


def _use(checkpoint: Path, demos: TaskDemonstrations, method: Method, **how: Any) -> DiffusionPolicy:
    policy = load_policy(checkpoint, **how)
    Calibration(FEW, policy, demos).on_first_use(method)
    return policy


def test_profile_is_made_once_and_reused(
    checkpoint: Path, demos: TaskDemonstrations, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = _use(checkpoint, demos, BAC)
    path = profile_path(policy)
    assert f"calibrate once, kept in {path}" in capsys.readouterr().out
    assert path == checkpoint.with_name("latest.ckpt.calibration") / "ema" / "profiles" / "ddpm-10.zarr.zip"
    profile, written = FeatureProfile.load(path), path.stat().st_mtime_ns
    assert (profile.provenance, profile.observations) == (policy.provenance, 3)
    assert make_schedule(BAC, policy).method == "bac"
    _use(checkpoint, demos, SensitivityWeighted(updates=2))
    assert path.stat().st_mtime_ns == written
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_every_sampler_and_set_of_weights_has_its_own(checkpoint: Path, demos: TaskDemonstrations) -> None:
    default = _use(checkpoint, demos, BAC)
    raw = _use(checkpoint, demos, BAC, weights="raw")
    short = _use(checkpoint, demos, BAC, sampler=lambda process: ddim(process, 5))
    assert len({profile_path(policy) for policy in (default, raw, short)}) == 3
    for policy in (default, raw, short):
        schedule = make_schedule(BAC, policy)
        assert schedule.provenance == policy.provenance
        bac.accelerate(policy, schedule, "eager")


def test_what_a_method_needs_besides_is_added(checkpoint: Path, demos: TaskDemonstrations) -> None:
    policy = _use(checkpoint, demos, BAC)
    before = FeatureProfile.load(profile_path(policy))
    assert before.gates is None
    _use(checkpoint, demos, HarmoniCa(updates=3))
    after = FeatureProfile.load(profile_path(policy))
    assert after.gates is not None
    np.testing.assert_array_equal(after.sensitivity, before.sensitivity)
    search = Search(gflops=1.0, trials=2)
    _use(checkpoint, demos, search)
    assert make_schedule(search, policy).method == "search"


def test_a_search_does_not_replace_another_of_the_same_budget(
    checkpoint: Path, demos: TaskDemonstrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = _use(checkpoint, demos, Search(gflops=1.0, trials=2))
    monkeypatch.setattr(Calibration, "search", lambda *_: pytest.fail("searched"))
    with pytest.raises(
        Mismatch, match=r"search-1g\.json: expected one made with trials=3, got trials=2; delete it, or"
    ):
        _use(checkpoint, demos, Search(gflops=1.0, trials=3))
    assert make_schedule(Search(gflops=1.0, trials=2), policy).parameters["trials"] == 2


def test_nothing_is_measured_for_the_uncached_policy(checkpoint: Path, demos: TaskDemonstrations) -> None:
    _use(checkpoint, demos, NoCache())
    assert [each.name for each in checkpoint.parent.iterdir()] == ["latest.ckpt"]


def test_checkpoint_that_changed_since_refuses(checkpoint: Path, demos: TaskDemonstrations) -> None:
    _use(checkpoint, demos, BAC)
    payload = original_payload()
    payload["state_dicts"]["ema_model"] = payload["state_dicts"]["model"]
    save(checkpoint, payload)
    with pytest.raises(Mismatch, match=r"feature profile and checkpoint: .*; run scripts/calibrate\.py on this"):
        _use(checkpoint, demos, BAC)


@pytest.mark.parametrize(
    ("method", "prepare", "error", "told"),
    [
        (BlockAdaptive(updates=11), lambda folder: None, InvalidInput, r"cache\.updates: expected 1 to 10, got 11"),
        (
            BlockAdaptive(updates=3, upstream_blocks=99),
            lambda folder: None,
            InvalidInput,
            r"cache\.upstream_blocks: exp",
        ),
        (
            ProfilingDit(updates=3, cached_layers=99),
            lambda folder: None,
            InvalidInput,
            r"cache\.cached_layers: expected",
        ),
        (BAC, Path.touch, Unavailable, r"calibration folder .*profiles: .* got Not a directory; copy the checkpoint"),
    ],
    ids=["too many updates", "too many blocks", "too many layers", "folder that cannot be written"],
)
def test_refusals_come_before_any_measurement(
    checkpoint: Path,
    demos: TaskDemonstrations,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    prepare: Callable[[Path], None],
    error: type[Exception],
    told: str,
) -> None:
    monkeypatch.setattr(Calibration, "features", lambda self: pytest.fail("measured"))
    prepare(checkpoint.with_name("latest.ckpt.calibration"))
    with pytest.raises(error, match=told):
        _use(checkpoint, demos, method)


def test_too_few_steps_for_hyca_are_refused_before_any_measurement(
    checkpoint: Path, demos: TaskDemonstrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "features", lambda self: pytest.fail("measured"))
    with pytest.raises(InvalidInput, match="cache=hyca: expected a sampler of at least 6 steps, got 5"):
        _use(checkpoint, demos, HyCa(updates=3), sampler=lambda process: ddim(process, 5))


def test_a_method_that_needs_what_is_not_to_be_measured_refuses_before_any_measurement(
    checkpoint: Path, demos: TaskDemonstrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "features", lambda self: pytest.fail("measured"))
    calibration = Calibration(replace(FEW, sensitivity_observations=0), load_policy(checkpoint), demos)
    with pytest.raises(InvalidInput, match="cache=bac_weighted: expected a profile with sensitivity, got one without"):
        calibration.on_first_use(SensitivityWeighted(updates=3))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "lift"}, "expected task lift, got push_t; give task=push_t"),
        ({"observation": {"keypoints": 18}}, "expected observations {'keypoints': 18}, got"),
        ({"images": {"image": [96, 96]}}, "expected images of {'image': [96, 96]} pixels, got {}; change task.images"),
        ({"action_dim": 7}, "expected 7 channels of action, got 2; set task.action_dim=2"),
    ],
)
def test_policy_of_another_task_refuses(checkpoint: Path, change: dict[str, Any], told: str) -> None:
    spec = load_policy(checkpoint).spec
    require_task(_push_t(), spec)
    with pytest.raises(Mismatch) as refusal:
        require_task(replace(_push_t(), **change), spec)
    assert told in str(refusal.value)


def test_converted_checkpoint_plays_as_the_original(checkpoint: Path, tmp_path: Path) -> None:
    convert(ImportConfig(task=_push_t(), source=str(checkpoint), weights="raw"), tmp_path)
    ours, original = load_policy(tmp_path / CHECKPOINT_FILE), load_policy(checkpoint, weights="raw")
    assert (ours.checkpoint.digest, ours.spec) == (original.checkpoint.digest, original.spec)


def test_hybrid_image_checkpoint_plays_after_calibration_on_first_use(tmp_path: Path) -> None:
    task = replace(
        _push_t(),
        name="push_t_image",
        observation={"image": 64, "agent_position": 2},
        images={"image": [96, 96]},
        # Of one that is trained here: the checkpoint has its own.
        crop=[76, 76],
    )
    draw = np.random.default_rng(0)
    frames = {
        "keypoint": draw.uniform(0, 512, (12, 9, 2)),
        "state": draw.uniform(0, 512, (12, 5)),
        "action": draw.uniform(0, 512, (12, 2)),
        "img": draw.integers(0, 256, (12, 96, 96, 3)).astype(np.float32),
    }
    store = tmp_path / "published.zarr.zip"
    write_demonstrations(Demonstrations(frames, np.array([7, 12]), {}), store)
    checkpoint = save(tmp_path / "latest.ckpt", original_image_payload("push_t", raw=False))
    policy = _use(checkpoint, demonstrations(task, str(store)), BAC)
    require_task(task, policy.spec)
    assert policy.spec.vision is not None
    assert policy.spec.vision.crop == (84, 84)
    with pytest.raises(Mismatch, match=r"images of {'image': \[84, 84\]} pixels, got {'image': \[96, 96\]}"):
        require_task(replace(task, images={"image": [84, 84]}), policy.spec)
    cached = bac.accelerate(policy, make_schedule(BAC, policy), "eager")
    (episode,) = play(task, cached, range(100_000, 100_001), parallel=1, processes=1, title="play")
    assert (episode.seed, episode.steps) == (100_000, 8)
    convert(ImportConfig(task=task, source=str(checkpoint), weights="ema"), tmp_path)
    ours = load_policy(tmp_path / CHECKPOINT_FILE)
    assert (ours.checkpoint.digest, ours.spec) == (policy.checkpoint.digest, policy.spec)


def _evaluation(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    small = ["episodes=2", "task.max_steps=8", "latency_calls=1", "error_observations=2", "threads=1", "video=0"]
    few = ["calibration.observations=3", "calibration.sensitivity_observations=1", "cache=bac", "cache.updates=3"]
    command = [sys.executable, str(EVAL), "checkpoint=latest.ckpt", *small, *few, *overrides]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_evaluations_may_calibrate_the_same_checkpoint_at_once(checkpoint: Path) -> None:
    folder = checkpoint.parent
    runs = [_evaluation(folder, f"hydra.run.dir=run{each}") for each in range(2)]
    told = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert all("ema weights of latest.ckpt" in out for out, _ in told)
    first, second = (json.loads((folder / f"run{each}" / "results.json").read_text()) for each in range(2))
    assert first["checkpoint"] == {"file": "latest.ckpt", "weights": "ema"}
    assert first["scores"] == second["scores"]
    assert first["schedule"] == second["schedule"]
    kept = profile_path(load_policy(checkpoint))
    FeatureProfile.load(kept)
    assert [each.name for each in kept.parent.iterdir()] == [kept.name]


@pytest.mark.sim
def test_lift_plays_absolute_and_delta_checkpoints(tmp_path: Path) -> None:
    pytest.importorskip("robosuite", reason="pip install -e '.[robomimic]'")
    from envs.demos.recording import Recorder, make_demonstrations

    recorded = tmp_path / "low_dim.hdf5"
    make_demonstrations(Recorder("lift"), recorded, episodes=1, first_seed=0)
    for payload, action_dim in (("lift", 10), ("lift with deltas", 7)):
        task = TaskConfig(
            name="lift",
            observation=dict(TASKS["lift"].low_dim),
            action_dim=action_dim,
            action_steps=8,
            max_steps=5,
            seed=100_000,
            rate_hz=20.0,
            least_range=0.0,
        )
        checkpoint = save(tmp_path / f"{action_dim}.ckpt", original_payload(payload))
        policy = _use(checkpoint, demonstrations(task, str(recorded)), BAC)
        require_task(task, policy.spec)
        cached = bac.accelerate(policy, make_schedule(BAC, policy), "eager")
        (episode,) = play(task, cached, range(100_000, 100_001), parallel=1, title="play")
        assert (episode.seed, episode.success) == (100_000, False)
