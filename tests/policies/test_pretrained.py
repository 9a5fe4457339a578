"""What ships is whole and belongs together: checkpoint, profile, schedules, log, results."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import bac
from bac.errors import Mismatch
from bac.methods import BlockAdaptive
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule
from configs.methods import default_method
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import (
    PRETRAINED,
    load_policy,
    locate_checkpoint,
    make_schedule,
    profile_path,
    require_free,
)
from policies.samplers import ddim

README = Path(__file__).parent.parent.parent / "README.md"
FOLDER = locate_checkpoint("push_t").parent


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    return load_policy("push_t")


def test_specification_is_the_originals(policy: DiffusionPolicy) -> None:
    network = policy.spec.network
    assert (network.layers, network.width, network.heads) == (8, 256, 4)
    assert (network.horizon, network.observation_steps) == (16, 2)
    assert policy.spec.observation == {"keypoints": 18, "agent_position": 2}
    assert policy.spec.action_steps == 8
    assert policy.sampler.steps == 100


def test_training_log_and_digest_are_this_checkpoints(policy: DiffusionPolicy) -> None:
    results = json.loads((FOLDER / "training.json").read_text())
    assert results["digest"] == policy.checkpoint.digest
    with (FOLDER / "training_log.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["loss"]][-1]
    assert int(last["step"]) == results["steps"] == policy.checkpoint.training["step"]


def test_every_schedule_is_its_methods_choice_on_the_shipped_profile(policy: DiffusionPolicy) -> None:
    profile = FeatureProfile.load(profile_path(policy))
    profile.provenance.require(policy.provenance, "profile")
    shipped = sorted((FOLDER / "schedules" / "ddpm-100").glob("bac-s*.json"))
    assert "bac-s10.json" in [path.name for path in shipped]
    for path in shipped:
        schedule = CacheSchedule.load(path)
        schedule.require(policy.provenance, policy.trunk.blocks, 100)
        again = BlockAdaptive(updates=int(path.stem.removeprefix("bac-s"))).schedule(profile)
        np.testing.assert_array_equal(schedule.mask, again.mask)


_TASKS = sorted(path.parent.name for path in PRETRAINED.glob("*/checkpoint.safetensors"))
_OFFERED = re.search(r"`cache={([\w,]+)}` and, for comparison", README.read_text())[1].split(",")


@pytest.mark.parametrize("task", _TASKS)
@pytest.mark.parametrize("cache", _OFFERED)
def test_every_cache_that_the_readme_offers_is_found_as_it_is_configured(task: str, cache: str) -> None:
    policy, method = load_policy(task), default_method(cache)
    if cache == "search" and not list(policy.schedules.glob("search-*.json")):
        pytest.skip("found by trials: none ships with this task")
    schedule = make_schedule(method, policy)
    assert schedule.method == cache
    schedule.require(policy.provenance, policy.trunk.blocks, policy.sampler.steps)


@pytest.mark.parametrize("task", _TASKS)
def test_calibrating_a_shipped_policy_again_is_not_refused(task: str) -> None:
    policy = load_policy(task)
    for path in policy.schedules.iterdir():
        kept = CacheSchedule.load(path)
        budget = kept.parameters.get("updates", kept.parameters.get("gflops"))
        method = default_method(kept.method).with_budget(budget)
        assert method.label == path.stem
        require_free(method, policy)


def test_shipped_schedule_refuses_another_sampler(policy: DiffusionPolicy) -> None:
    schedule = CacheSchedule.load(FOLDER / "schedules" / "ddpm-100" / "bac-s10.json")
    other = DiffusionPolicy(policy.checkpoint, ddim(policy.spec.process, 100))
    with pytest.raises(Mismatch, match="schedule and sampler"):
        bac.accelerate(other, schedule)


def test_readme_lines_work(policy: DiffusionPolicy) -> None:
    fast = bac.accelerate(policy, schedule="bac-s30")
    chunk = fast.predict(
        {"keypoints": np.full((2, 18), 256, np.float32), "agent_position": np.full((2, 2), 200, np.float32)}
    )
    assert chunk.shape == (8, 2)
    assert torch.isfinite(torch.from_numpy(chunk)).all()
    assert sum(fast.denoiser.plan.block_calls().values()) < 0.5 * 2400
