"""The public verb: a policy in, the same policy over a cached denoiser out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import (
    BLOCKS,
    PROVENANCE,
    ToyTrunk,
    decode,
    latest_update,
    random_schedule,
    small_network,
    toy_noise,
    toy_observation,
    toy_sampler,
)
from typing_extensions import Self

import bac
from bac.errors import Mismatch, MissingArtefact
from bac.executors import Executor
from bac.methods import full_schedule
from bac.passes import optimise
from bac.plan import lower
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule, Provenance
from policies.base import PolicySpec
from policies.checkpoint import PolicyCheckpoint
from policies.diffusion_policy import DiffusionPolicy
from policies.normalizer import LimitsNormalizer
from policies.samplers import DiffusionProcess

STEPS = 12
SCHEDULE = random_schedule(0, STEPS)


@dataclass(frozen=True)
class ToyPolicy:
    """What ``bac.accelerate`` needs of a policy, and no more."""

    schedules: Path | None = None
    action_steps: int = 1
    provenance: Provenance = PROVENANCE
    sampler: SamplerTable = field(default_factory=lambda: toy_sampler(STEPS))
    trunk: ToyTrunk = field(default_factory=ToyTrunk)
    denoiser: Executor | None = None

    def with_denoiser(self, denoiser: Executor) -> Self:
        return replace(self, denoiser=denoiser)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    SCHEDULE.save(tmp_path / "schedules" / "bac-s10.json")
    return tmp_path / "schedules"


@pytest.mark.parametrize("form", ["object", "path", "path as text", "name"])
def test_accelerates_by_object_path_and_name(folder: Path, form: str) -> None:
    path = folder / "bac-s10.json"
    given = {"object": SCHEDULE, "path": path, "path as text": str(path), "name": "bac-s10"}[form]
    policy = ToyPolicy(folder)
    fast = bac.accelerate(policy, given)
    assert fast.denoiser is not None
    fast.denoiser(toy_observation(5), toy_noise(1, STEPS))
    assert len(fast.trunk.calls) == SCHEDULE.updates
    last = STEPS - 1
    assert decode(fast.trunk.streams[last])[0] == [latest_update(row, last) for row in SCHEDULE.mask]
    assert policy.denoiser is None, "the policy given stays as it is"


def test_runs_the_optimised_plan() -> None:
    policy = ToyPolicy()
    execute = bac.build_executor(SCHEDULE, policy.trunk, policy.sampler, policy.provenance)
    assert execute.plan == optimise(lower(SCHEDULE))


def test_refuses_unknown_names(folder: Path) -> None:
    with pytest.raises(MissingArtefact, match=r"schedule: expected a file or one of \['bac-s10'\], got bac-s11; run"):
        bac.accelerate(ToyPolicy(folder), "bac-s11")


@pytest.mark.parametrize("folder", [None, Path("/no/such/folder")])
def test_refuses_names_where_no_schedules_ship(folder: Path | None) -> None:
    with pytest.raises(MissingArtefact, match=r"schedule: expected a file or one of \[\], got bac-s10"):
        bac.accelerate(ToyPolicy(folder), "bac-s10")


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (
            replace(SCHEDULE, provenance=Provenance("decaf", PROVENANCE.sampler)),
            "schedule and checkpoint: expected checkpoint decaf, got c0ffee",
        ),
        (
            replace(SCHEDULE, provenance=Provenance("c0ffee", {"name": "ddim", "steps": 12})),
            "schedule and sampler: expected .*'ddim'.*, got .*'toy'",
        ),
        (random_schedule(0, STEPS + 1), "schedule: expected 12 steps of 6 blocks .*, got 13 steps of 6 blocks"),
        (random_schedule(0, STEPS, BLOCKS[:3]), "schedule: expected 12 steps of 6 blocks .*, got 12 steps of 3 blocks"),
        (random_schedule(0, STEPS, BLOCKS[::-1]), r"expected .* L0\.sa\.\.L1\.ffn, got .* L1\.ffn\.\.L0\.sa"),
    ],
    ids=["checkpoint", "sampler", "steps", "blocks", "order of blocks"],
)
def test_refuses_schedules_of_something_else(schedule: CacheSchedule, sentence: str) -> None:
    with pytest.raises(Mismatch, match=sentence + ".*; run scripts/calibrate.py"):
        bac.accelerate(ToyPolicy(), schedule)


def test_accelerates_a_diffusion_policy() -> None:
    network = small_network()
    spec = PolicySpec("toy", {"state": 5}, 3, network.config, DiffusionProcess(train_steps=STEPS))
    observations, actions = (LimitsNormalizer(torch.ones(size), torch.zeros(size)) for size in (5, 2))
    policy = DiffusionPolicy(PolicyCheckpoint(spec, network, observations, actions, {}))
    blocks, provenance = policy.trunk.blocks, policy.provenance
    observation = {"state": np.random.default_rng(0).random((4, 2, 5))}
    keys = [(seed, 0) for seed in range(4)]

    before = policy.predict(observation, keys)
    same = bac.accelerate(policy, full_schedule(blocks, STEPS, provenance)).predict(observation, keys)
    fast = bac.accelerate(policy, replace(SCHEDULE, provenance=provenance)).predict(observation, keys)
    assert np.array_equal(same, before)
    assert fast.shape == before.shape == (4, 3, 2)
    assert np.abs(fast - before).max() > 0.01
    assert np.array_equal(policy.predict(observation, keys), before), "the policy given stays as it is"
