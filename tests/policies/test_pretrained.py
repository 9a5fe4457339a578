"""What ships is whole and belongs together: checkpoint, profile, schedules, log, results."""

import csv
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import bac
from bac.control import DeviceProfile, ScheduleBank
from bac.errors import Mismatch
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule
from configs.methods import default_method
from policies.bank import BANK_FILE, load_member
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import (
    PRETRAINED,
    bank_folder,
    load_policy,
    make_schedule,
    profile_path,
    require_free,
)
from policies.samplers import ddim, sampler_named
from tests.composing import composed

README = Path(__file__).parent.parent.parent / "README.md"
TASKS = sorted(path.parent.name for path in PRETRAINED.glob("*/checkpoint.safetensors"))
SCHEDULES = sorted(str(path.relative_to(PRETRAINED)) for path in PRETRAINED.glob("*/schedules/*/*.json"))


@cache
def shipped(task: str) -> DiffusionPolicy:
    return load_policy(task)


def test_what_ships_is_small_enough_for_a_repository() -> None:
    assert {"push_t", "lift", "can"} <= set(TASKS)
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file()) < 120e6


@pytest.mark.parametrize("task", TASKS)
def test_specification_is_the_originals(task: str) -> None:
    spec, published = shipped(task).spec, composed("eval", f"task={task}").task
    network = spec.network
    assert (network.layers, network.width, network.heads) == (8, 256, 4)
    assert (network.horizon, network.observation_steps) == (16 if task == "push_t" else 10, 2)
    assert list(spec.observation.items()) == list(published.observation.items())
    assert (spec.task, network.action_dim, spec.action_steps) == (task, published.action_dim, 8)
    assert shipped(task).sampler.steps == 100


@pytest.mark.parametrize("task", TASKS)
def test_training_log_and_digest_are_this_checkpoints(task: str) -> None:
    checkpoint, folder = shipped(task).checkpoint, PRETRAINED / task
    results = json.loads((folder / "training.json").read_text())
    assert results["digest"] == checkpoint.digest
    with (folder / "training_log.csv").open() as file:
        last = [row for row in csv.DictReader(file) if row["loss"]][-1]
    assert int(last["step"]) == results["steps"] == checkpoint.training["step"]


@pytest.mark.parametrize("task", TASKS)
def test_paper_schedules_ship_on_both_samplers(task: str) -> None:
    assert {f"{task}/schedules/{each}" for each in ("ddpm-100/bac-s10.json", "ddim-16-trailing/bac-s5.json")} <= set(
        SCHEDULES
    )


@pytest.mark.parametrize("path", SCHEDULES)
def test_every_schedule_is_its_methods_choice_on_the_shipped_profile(path: str) -> None:
    task, _, sampler, _ = path.split("/")
    policy, schedule = shipped(task), CacheSchedule.load(PRETRAINED / path)
    table = sampler_named(policy.spec.process, schedule.provenance.sampler)
    sampled = DiffusionPolicy(policy.checkpoint, table, artefacts=policy.artefacts)
    assert sampled.schedules == PRETRAINED / task / "schedules" / sampler
    profile = FeatureProfile.load(profile_path(sampled))
    profile.provenance.require(sampled.provenance, "profile")
    schedule.require(sampled.provenance, sampled.trunk.blocks, table.steps)
    if schedule.method != "search":  # found by trials, not on the profile
        again = default_method(schedule.method).with_budget(schedule.parameters["updates"]).schedule(profile)
        np.testing.assert_array_equal(schedule.mask, again.mask)


_OFFERED = re.search(r"`cache={([\w,]+)}` and, for comparison", README.read_text())[1].split(",")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cache", _OFFERED)
def test_every_cache_that_the_readme_offers_is_found_as_it_is_configured(task: str, cache: str) -> None:
    policy, method = shipped(task), default_method(cache)
    if cache == "search" and not list(policy.schedules.glob("search-*.json")):
        pytest.skip("found by trials: none ships with this task")
    schedule = make_schedule(method, policy)
    assert schedule.method == cache
    schedule.require(policy.provenance, policy.trunk.blocks, policy.sampler.steps)


@pytest.mark.parametrize("task", TASKS)
def test_calibrating_a_shipped_policy_again_is_not_refused(task: str) -> None:
    policy = shipped(task)
    for path in policy.schedules.iterdir():
        kept = CacheSchedule.load(path)
        budget = kept.parameters.get("updates", kept.parameters.get("gflops"))
        method = default_method(kept.method).with_budget(budget)
        assert method.label == path.stem
        require_free(method, policy)


def test_the_bank_that_ships_is_whole_and_selects_within_a_budget() -> None:
    policy = shipped("push_t")
    home = bank_folder(policy)
    bank = ScheduleBank.load(home / BANK_FILE)
    assert bank.checkpoint == policy.checkpoint.digest
    listed = {home / entry.schedule for entry in bank.entries}
    assert listed == {path for path in home.rglob("*.json") if path.parent not in (home, home / "devices")}
    for entry in bank.entries:
        member = load_member(policy, home, entry)
        sampled = DiffusionPolicy(policy.checkpoint, member.sampler, artefacts=policy.artefacts)
        member.schedule.require(sampled.provenance, sampled.trunk.blocks, member.sampler.steps)
    (path,) = (home / "devices").iterdir()
    on = bank.on(device := DeviceProfile.load(path))
    fit = [entry for entry in bank.entries if device.latency[entry.name].p99_ms <= 80]
    assert 0 < len(fit) < len(bank.entries)
    assert on.select(80.0).action_error == min(entry.action_error for entry in fit)


def test_shipped_schedule_refuses_another_sampler() -> None:
    policy = shipped("push_t")
    schedule = CacheSchedule.load(policy.schedules / "bac-s10.json")
    other = DiffusionPolicy(policy.checkpoint, ddim(policy.spec.process, 100))
    with pytest.raises(Mismatch, match="schedule and sampler"):
        bac.accelerate(other, schedule)


def test_readme_lines_work() -> None:
    fast = bac.accelerate(shipped("push_t"), schedule="bac-s30")
    chunk = fast.predict(
        {"keypoints": np.full((2, 18), 256, np.float32), "agent_position": np.full((2, 2), 200, np.float32)}
    )
    assert chunk.shape == (8, 2)
    assert torch.isfinite(torch.from_numpy(chunk)).all()
    assert sum(fast.denoiser.plan.block_calls().values()) < 0.5 * 2400
