"""What a latency benchmark times: one network under every executor, schedule and sampler, on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bac.accelerate import accelerate, attach, build_executor
from bac.executors import ChunkNoise, ExecutorKind, Selection, WeightType, select
from bac.methods import BlockAdaptive, Uniform, full_schedule
from bac.passes import optimise
from bac.plan import cost, lower
from bac.profile import FeatureProfile
from bac.profiler import profile_features
from bac.schedule import CacheSchedule
from policies.base import PolicySpec
from policies.checkpoint import PolicyCheckpoint
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.diffusion_trunk import diffusion_transformer_sites
from policies.loading import load_policy
from policies.normalizer import LimitsNormalizer
from policies.samplers import DiffusionProcess, ddim

Denoise = Callable[[Tensor, ChunkNoise], Tensor]
Loop = Callable[[DiffusionTransformer], Denoise]
"""Makes the denoising loop that users write around a network."""

KITCHEN = DiffusionTransformerConfig(action_dim=9, observation_dim=60, horizon=16, observation_steps=4, width=768)
"""The original Franka Kitchen low-dim network."""

FULL = "full"
_PROFILE_OBSERVATIONS = 4


@dataclass(frozen=True)
class Row:
    """Something to time.

    Attributes:
        name: what the table calls it.
        build: returns (float32[B, To, Do] normalised, noise) -> chunk; may raise ``Unavailable``.
        steps: denoising steps K, the length of the noise it takes.
        gflops: of a chunk at batch 1, None where they are not counted.
    """

    name: str
    build: Callable[[], Denoise]
    steps: int
    gflops: float | None


@dataclass(frozen=True)
class StartedRow:
    """A row that was built.

    Attributes:
        row: what was built.
        denoise: the result.
        start_s: seconds that took.
    """

    row: Row
    denoise: Denoise
    start_s: float


def start(row: Row) -> StartedRow:
    """Build a row and take the time."""
    began = time.perf_counter()
    denoise = row.build()
    return StartedRow(row, denoise, time.perf_counter() - began)


def schedules(policy: DiffusionPolicy, profile: FeatureProfile, updates: Sequence[int]) -> dict[str, CacheSchedule]:
    """Return the schedules of the benchmark by name: full, uniform with 10 updates, BAC with n = 5 at each budget."""
    named = {FULL: full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)}
    named["uniform S=10"] = Uniform(10).schedule(profile)
    return named | {f"BAC S={budget}": BlockAdaptive(budget).schedule(profile) for budget in updates}


def executor_rows(
    policy: DiffusionPolicy, named: Mapping[str, CacheSchedule], kind: ExecutorKind, weights: WeightType
) -> Iterator[Row]:
    """Yield a row per schedule under one executor."""
    label = kind if weights is WeightType.FP32 else f"{kind} {weights}"
    for name, schedule in named.items():
        executor = partial(_planned, policy, schedule, kind, weights)
        yield Row(f"{label}, {name}", executor, policy.sampler.steps, _gflops(policy, schedule))


def hook_rows(policy: DiffusionPolicy, named: Mapping[str, CacheSchedule], loop: Loop) -> Iterator[Row]:
    """Yield a row per cached schedule by patched branches inside a user's own loop."""
    for name, schedule in named.items():
        if name != FULL:
            yield Row(f"hooks, {name}", partial(_hooked, policy, schedule, loop), policy.sampler.steps, None)


def ddim_rows(
    policy: DiffusionPolicy, observed: Tensor, updates: Mapping[int, int], kind: ExecutorKind
) -> Iterator[Row]:
    """Yield a row per DDIM step count, BAC on top of it; calibrated here on a few of the observations."""
    for steps, budget in updates.items():
        short = DiffusionPolicy(policy.checkpoint, ddim(policy.spec.process, steps))
        schedule = BlockAdaptive(budget).schedule(quick_profile(short, observed))
        yield from executor_rows(short, {f"DDIM-{steps} BAC S={budget}": schedule}, kind, WeightType.FP32)


def quick_profile(policy: DiffusionPolicy, observed: Tensor) -> FeatureProfile:
    """Return a profile over the first few of normalised observations float32[N, To, Do]."""
    rows = observed[:_PROFILE_OBSERVATIONS]
    noise = policy.draw_noise(len(rows), [(0, row) for row in range(len(rows))])
    return profile_features(policy.trunk, policy.sampler, policy.provenance, [(rows, noise)])


def random_policy(network: DiffusionTransformerConfig, seed: int = 0) -> DiffusionPolicy:
    """Return a policy of these sizes with random weights: right for latencies, meaningless for actions."""
    torch.manual_seed(seed)
    spec = PolicySpec("random", {"state": network.observation_dim}, 8, network, DiffusionProcess(100))
    observation, action = (
        LimitsNormalizer(torch.ones(size), torch.zeros(size)) for size in (network.observation_dim, network.action_dim)
    )
    weights = DiffusionTransformer(network).eval().requires_grad_(False)
    return DiffusionPolicy(PolicyCheckpoint(spec, weights, observation, action, training={}))


def _planned(policy: DiffusionPolicy, schedule: CacheSchedule, kind: ExecutorKind, weights: WeightType) -> Denoise:
    executor: Selection = select(kind, policy.trunk, weights)
    return build_executor(schedule, policy.trunk, policy.sampler, policy.provenance, executor)


def _hooked(policy: DiffusionPolicy, schedule: CacheSchedule, loop: Loop) -> Denoise:
    network = deepcopy(policy.checkpoint.network)  # patched for good: the other rows keep theirs
    attach(diffusion_transformer_sites(network), schedule, policy.sampler.timesteps)
    return loop(network)


def _gflops(policy: DiffusionPolicy, schedule: CacheSchedule) -> float:
    return cost(optimise(lower(schedule)), policy.trunk.cost).planned / 1e9


def play_once(source: str, schedule: str, kind: ExecutorKind, weights: WeightType) -> None:
    """Load a policy, bind a schedule and predict one chunk, for ``bac.memory.peak_memory``."""
    policy = load_policy(source)
    fast = accelerate(policy, schedule, select(kind, policy.trunk, weights))
    channels = policy.spec.observation.items()
    fast.predict({key: np.zeros((policy.observation_steps, size), np.float32) for key, size in channels})
