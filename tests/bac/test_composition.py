"""Every caching method composes with every deterministic sampler, and with the exact tables that are always on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import random_inputs, small_network

from bac.acceleration import build_executor
from bac.executors import ChunkNoise, EagerExecutor
from bac.methods import Method, ProfilingDit, Search, full_schedule
from bac.methods.base import ByThreshold, ByUpdates
from bac.passes import optimise
from bac.plan import lower
from bac.profile import FeatureProfile
from bac.profiler import profile_features
from bac.router import train_router
from bac.sampler_table import SamplerTable
from bac.schedule import Provenance
from bac.sensitivity import step_sensitivity
from configs.methods import METHODS, default_method
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, Spacing, ddim, dpm_solver

PROCESS = DiffusionProcess(train_steps=100, clip=1e9)  # a random network would clip every action
SAMPLERS: dict[str, Callable[[], SamplerTable]] = {
    "ddim-10": lambda: ddim(PROCESS, 10),
    "ddim-16 leading": lambda: ddim(PROCESS, 16, Spacing.LEADING),
    "dpm_solver-10": lambda: dpm_solver(PROCESS, 10),
}
TRUNK = DiffusionTransformerTrunk(small_network(layers=4))
EXECUTED = slice(1, 3)


@pytest.fixture(scope="module")
def profiles() -> dict[str, FeatureProfile]:
    """Return a whole profile per sampler."""
    measured = {}
    for name, make in SAMPLERS.items():
        sampler = make()
        batches = [random_inputs(seed, batch=2, steps=sampler.steps) for seed in (1, 2)]
        profile = profile_features(TRUNK, sampler, Provenance("toy", sampler.identity), batches)
        gates = train_router(TRUNK, sampler, batches, EXECUTED, iterations=1, penalty=0.02)
        measured[name] = replace(profile, sensitivity=step_sensitivity(TRUNK, sampler, batches, EXECUTED), gates=gates)
    return measured


def small(name: str) -> Method:
    """Return a method with values that fit ten steps of four layers of random weights."""
    method = default_method(name)
    match method:
        case ByUpdates():
            method = method.with_budget(4)
        case ByThreshold():
            method = method.with_budget(1e6)
    return replace(method, cached_layers=2) if isinstance(method, ProfilingDit) else method


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", sorted(set(METHODS) - {Search().name}))
def test_every_method_composes_with_every_sampler(profiles: dict[str, FeatureProfile], name: str, sampler: str) -> None:
    table, profile = SAMPLERS[sampler](), profiles[sampler]
    schedule = small(name).schedule(profile)
    observation, noise = random_inputs(5, batch=2, steps=table.steps)
    keyed = ChunkNoise(noise.initial, noise.steps, ((0, 0), (1, 0)))
    chunk, uncached = (
        build_executor(each, TRUNK, table, profile.provenance, "eager", action_steps=2)(observation, keyed)
        for each in (schedule, full_schedule(TRUNK.blocks, table.steps, profile.provenance))
    )
    assert torch.isfinite(chunk).all()
    computes_all = bool(schedule.mask.all()) and schedule.tokens is None
    assert torch.equal(chunk, uncached) == computes_all
    assert computes_all == (name == "none")


def test_tfmq_temporal_features_are_a_finite_set() -> None:
    """TFMQ-DM (arXiv 2311.16503): what depends on the step alone is a table, made once, before any observation."""
    sampler = ddim(PROCESS, 10)
    asked: list[np.ndarray] = []

    class Counting(DiffusionTransformerTrunk):
        def step_tables(self, timesteps: np.ndarray) -> list[torch.Tensor]:
            asked.append(timesteps)
            return list(super().step_tables(timesteps))

    trunk = Counting(small_network())
    plan = optimise(lower(full_schedule(trunk.blocks, 10, Provenance("toy", sampler.identity))))
    execute = EagerExecutor(plan, trunk, sampler)
    for seed in (1, 2, 3):
        execute(*random_inputs(seed, batch=1, steps=10))
    assert [steps.tolist() for steps in asked] == [sampler.timesteps.tolist()]


def test_dreamcache_condition_is_encoded_once_per_call() -> None:
    """DreamCache (arXiv 2411.17786): what depends on the observation alone is encoded once, for all steps."""
    sampler = ddim(PROCESS, 10)
    encoded: list[torch.Tensor] = []

    class Counting(DiffusionTransformerTrunk):
        def condition(self, observation: torch.Tensor) -> list[torch.Tensor]:
            encoded.append(observation)
            return super().condition(observation)

    trunk = Counting(small_network())
    plan = optimise(lower(full_schedule(trunk.blocks, 10, Provenance("toy", sampler.identity))))
    execute = EagerExecutor(plan, trunk, sampler)
    calls = [random_inputs(seed, batch=1, steps=10) for seed in (1, 2)]
    for observation, noise in calls:
        execute(observation, noise)
    assert [given is observation for given, (observation, _) in zip(encoded, calls, strict=True)] == [True, True]
