"""A bank on disk becomes policies again: each schedule read once, and what cannot be timed or compared refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bac.control import DeviceProfile, ScheduleBank
from bac.errors import Mismatch, MissingArtefact, TooLarge
from bac.executors import Selection, select
from bac.schedule import CacheSchedule
from policies.bank import (
    bank_of,
    device_path,
    load_candidates,
    load_device_profile,
    load_member,
    measure_bank,
    members,
)
from policies.diffusion_policy import DiffusionPolicy
from tests.policies.networks import small_policy


@pytest.fixture
def policy() -> DiffusionPolicy:
    return small_policy()


def saved(policy: DiffusionPolicy, folder: Path) -> ScheduleBank:
    """A bank of the uncached policy and two DDIM samplers."""
    family = members(policy, [], [2, 5])
    for each in family:
        each.schedule.save(folder / f"{each.name}.json")
    return bank_of(policy, family, {each.name: 0.5 for each in family})


def measured(policy: DiffusionPolicy, bank: ScheduleBank, folder: Path, executor: Selection) -> DeviceProfile:
    candidates = dict(load_candidates(policy, folder, bank, executor))
    device = measure_bank(candidates, policy.spec.blank_observation(), 1, executor)
    device.save(device_path(folder, policy.trunk.device, executor))
    return device


def test_a_bank_loads_as_the_policies_it_was_made_of(policy: DiffusionPolicy, tmp_path: Path) -> None:
    bank, executor = saved(policy, tmp_path), select("eager", policy.trunk)
    loaded = dict(load_candidates(policy, tmp_path, bank, executor))
    assert {name: each.sampler.steps for name, each in loaded.items()} == {
        "ddpm-10/none": 10,
        "ddim-2-trailing/none": 2,
        "ddim-5-trailing/none": 5,
    }
    seen = policy.spec.blank_observation()
    batch = {key: values[None] for key, values in seen.items()}
    again = loaded["ddpm-10/none"].predict(batch, [(0, 0)])
    assert np.array_equal(again, policy.predict(batch, [(0, 0)]))


def test_a_member_is_the_entrys_by_one_read(
    policy: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, read = saved(policy, tmp_path), []
    load = CacheSchedule.load
    monkeypatch.setattr(CacheSchedule, "load", lambda path: read.append(path) or load(path))
    for entry in bank.entries:
        member = load_member(policy, tmp_path, entry)
        assert (member.name, member.sampler.identity) == (entry.name, entry.sampler)
    assert read == [tmp_path / entry.schedule for entry in bank.entries]
    with pytest.raises(MissingArtefact):
        load_member(policy, tmp_path, replace(bank.entries[0], schedule="gone.json"))


def test_an_executor_that_cannot_hold_the_bank_is_told_what_can(
    policy: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, executor = saved(policy, tmp_path), select("onnx", policy.trunk)
    monkeypatch.setattr("bac.executors.onnx._MOST_NODES", 1)
    with pytest.raises(TooLarge) as refusal:
        dict(load_candidates(policy, tmp_path, bank, executor))
    assert str(refusal.value) == (
        "schedule bank: expected an executor that holds each of its schedules, ddpm-10/none among them, got onnx; "
        "use executor=compiled, or make a bank on a sampler of fewer steps with scripts/calibrate.py."
    )


def test_latencies_of_another_torch_are_none(policy: DiffusionPolicy, tmp_path: Path) -> None:
    bank, executor = saved(policy, tmp_path), select("eager", policy.trunk)
    device, path = measured(policy, bank, tmp_path, executor), device_path(tmp_path, policy.trunk.device, executor)
    assert load_device_profile(tmp_path, policy.trunk.device, executor) == device
    assert device.versions["torch"].startswith(torch.__version__.partition("+")[0])
    replace(device, versions={**device.versions, "torch": "1.0"}).save(path)
    with pytest.raises(Mismatch, match=r"torch 1\.0; run scripts/latency_budget\.py measure=true on this device\.$"):
        load_device_profile(tmp_path, policy.trunk.device, executor)
    # Another version of a package that runs no chunk changes nothing.
    replace(device, versions={**device.versions, "numpy": "1.0"}).save(path)
    assert load_device_profile(tmp_path, policy.trunk.device, executor).latency == device.latency


def test_a_bank_without_latencies_here_refuses(policy: DiffusionPolicy, tmp_path: Path) -> None:
    saved(policy, tmp_path)
    executor = select("eager", policy.trunk)
    with pytest.raises(MissingArtefact, match=r"^device profile: .* run scripts/latency_budget\.py measure=true"):
        load_device_profile(tmp_path, policy.trunk.device, executor)
