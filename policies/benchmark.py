"""What a latency benchmark times: one network under every executor, schedule and sampler, on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bac.acceleration import attach, build_executor, select_for
from bac.errors import Unavailable, sentence
from bac.executors import ChunkNoise, ExecutorKind, WeightType
from bac.memory import peak_memory
from bac.methods import BlockAdaptive, Uniform, full_schedule
from bac.plan import schedule_cost
from bac.profile import FeatureProfile
from bac.profiler import profile_features
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule
from policies.base import PolicySpec
from policies.checkpoint import PolicyCheckpoint
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.diffusion_trunk import diffusion_transformer_sites
from policies.normalizer import LimitsNormalizer
from policies.samplers import DiffusionProcess, ddim, ddpm, sampler_named

Denoise = Callable[[Tensor, ChunkNoise], Tensor]
"""(float32[B, To, Do] normalised, noise) -> float32[B, T, Da] normalised."""

PolicySource = Callable[[], DiffusionPolicy]
"""Makes the policy that rows are built on; picklable, so that another process can make it too."""

Loop = Callable[[DiffusionPolicy, DiffusionTransformer], Denoise]
"""Makes the denoising loop that users write around a network."""

KITCHEN = DiffusionTransformerConfig(action_dim=9, observation_dim=60, horizon=16, observation_steps=4, width=768)
"""The original Franka Kitchen low-dim network."""

FULL = "full"
_PROFILE_OBSERVATIONS = 4
_LATE_IMPORTS = ("onnx", "onnxruntime", "diffusers", "torch._dynamo")
"""What rows import when they are built: libraries, not part of anybody's own memory."""


@dataclass(frozen=True)
class Row:
    """Something to time, picklable.

    Attributes:
        name: what the table calls it.
        build: binds it to a policy; may raise ``Unavailable``.
        steps: denoising steps K, the length of the noise it takes.
        gflops: of a chunk at batch 1, None where they are not counted.
    """

    name: str
    build: Callable[[DiffusionPolicy], Denoise]
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


def start(row: Row, policy: DiffusionPolicy) -> StartedRow:
    """Build a row and take the time."""
    began = time.perf_counter()
    denoise = row.build(policy)
    return StartedRow(row, denoise, time.perf_counter() - began)


def run_once(row: Row, source: PolicySource, threads: int = 1) -> None:
    """Make the policy, build the row on it and denoise one chunk."""
    torch.set_num_threads(threads)
    policy = source()
    observation = torch.zeros(1, policy.observation_steps, policy.spec.network.observation_dim)
    row.build(policy)(observation.to(policy.trunk.device), noise_of(policy, row.steps, 1))


def row_memory(row: Row, source: PolicySource) -> int:
    """Return by how many bytes ``run_once`` raises the peak of a fresh process: policy, executor and one call.

    Raises:
        Unavailable: the row cannot be built here, or the system keeps no count.
    """
    return peak_memory(partial(run_once, row, source), _LATE_IMPORTS)


def noise_of(policy: DiffusionPolicy, steps: int, batch: int, seed: int = 0) -> ChunkNoise:
    """Return the noise of a call of ``steps`` steps; longer calls begin with the same."""
    drawn = policy.draw_noise(batch, [(seed, row) for row in range(batch)])
    return ChunkNoise(drawn.initial, drawn.steps[:steps])


def schedules(policy: DiffusionPolicy, profile: FeatureProfile, updates: Sequence[int]) -> dict[str, CacheSchedule]:
    """Return the schedules of the benchmark by name: full, uniform with 10 updates, BAC with n = 5 at each budget."""
    named = {FULL: full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)}
    named["uniform S=10"] = Uniform(10).schedule(profile)
    return named | {f"BAC S={budget}": BlockAdaptive(budget).schedule(profile) for budget in updates}


def executor_rows(
    policy: DiffusionPolicy,
    named: Mapping[str, CacheSchedule],
    kind: ExecutorKind,
    weights: WeightType = WeightType.FP32,
) -> Iterator[Row]:
    """Yield a row per schedule under one executor."""
    label = kind if weights is WeightType.FP32 else f"{kind} {weights}"
    for name, schedule in named.items():
        build = partial(_planned, schedule=schedule, kind=kind, weights=weights)
        yield Row(f"{label}, {name}", build, policy.sampler.steps, _gflops(policy, schedule))


def sampled_rows(
    policy: DiffusionPolicy,
    named: Mapping[str, tuple[SamplerTable, CacheSchedule]],
    kind: ExecutorKind,
    weights: WeightType,
) -> Iterator[Row]:
    """Yield a row per schedule under one executor, each with a sampler of its own, whatever the policy's is."""
    for name, (sampler, schedule) in named.items():
        sampled = DiffusionPolicy(policy.checkpoint, sampler)
        for row in executor_rows(sampled, {name: schedule}, kind, weights):
            yield Row(
                row.name, partial(_sampled, build=row.build, identity=dict(sampler.identity)), row.steps, row.gflops
            )


def hook_rows(policy: DiffusionPolicy, named: Mapping[str, CacheSchedule], loop: Loop) -> Iterator[Row]:
    """Yield a row per cached schedule by patched branches inside a user's own loop."""
    for name, schedule in named.items():
        if name != FULL:
            yield Row(f"hooks, {name}", partial(_hooked, schedule=schedule, loop=loop), policy.sampler.steps, None)


def ddim_rows(
    policy: DiffusionPolicy, observed: Tensor, updates: Mapping[int, int], kind: ExecutorKind
) -> Iterator[Row]:
    """Yield two rows per DDIM step count: full, and BAC on top of it, calibrated here on a few of the observations."""
    for steps, budget in updates.items():
        short = DiffusionPolicy(policy.checkpoint, ddim(policy.spec.process, steps))
        named = {
            f"DDIM-{steps} full": full_schedule(short.trunk.blocks, steps, short.provenance),
            f"DDIM-{steps} BAC S={budget}": BlockAdaptive(budget).schedule(quick_profile(short, observed)),
        }
        yield from sampled_rows(
            policy, {name: (short.sampler, schedule) for name, schedule in named.items()}, kind, WeightType.FP32
        )


def quick_profile(policy: DiffusionPolicy, observed: Tensor) -> FeatureProfile:
    """Return a profile over the first few of normalised observations float32[N, To, Do]."""
    rows = observed[:_PROFILE_OBSERVATIONS]
    return profile_features(
        policy.trunk, policy.sampler, policy.provenance, [(rows, noise_of(policy, policy.sampler.steps, len(rows)))]
    )


def random_policy(
    network: DiffusionTransformerConfig, steps: int = 100, seed: int = 0, device: str = "cpu"
) -> DiffusionPolicy:
    """Return a policy of these sizes with random weights: right for latencies, meaningless for actions.

    Args:
        network: the sizes.
        steps: denoising steps K of its DDPM sampler, at most 100.
        seed: of the weights.
        device: of the weights.
    """
    torch.manual_seed(seed)
    spec = PolicySpec("random", {"state": network.observation_dim}, 8, network, DiffusionProcess(100))
    observation, action = (
        LimitsNormalizer(torch.ones(size), torch.zeros(size)).to(device)
        for size in (network.observation_dim, network.action_dim)
    )
    weights = DiffusionTransformer(network).eval().requires_grad_(False).to(device)
    return DiffusionPolicy(PolicyCheckpoint(spec, weights, observation, action, training={}), ddpm(spec.process, steps))


def _planned(policy: DiffusionPolicy, *, schedule: CacheSchedule, kind: ExecutorKind, weights: WeightType) -> Denoise:
    if weights is not WeightType.FP32 and policy.trunk.device.type != "cpu":
        # To ``select_for`` it is a wrong setting; to a table of rows, one that is not to be had on this device.
        raise Unavailable(
            sentence(f"executor {kind} {weights}", expected="a CPU", got=policy.trunk.device, mend="use fp32 weights")
        )
    executor = select_for(schedule, policy.trunk, kind, weights)
    return build_executor(schedule, policy.trunk, policy.sampler, policy.provenance, executor, policy.action_steps)


def _hooked(policy: DiffusionPolicy, *, schedule: CacheSchedule, loop: Loop) -> Denoise:
    network = deepcopy(policy.checkpoint.network)  # patched for good: the other rows keep theirs
    attach(diffusion_transformer_sites(network), schedule, policy.sampler.timesteps)
    return loop(policy, network)


def _sampled(
    policy: DiffusionPolicy, *, build: Callable[[DiffusionPolicy], Denoise], identity: Mapping[str, object]
) -> Denoise:
    # By name, for a table of coefficients is not to be sent to the process that measures the row's memory.
    return build(DiffusionPolicy(policy.checkpoint, sampler_named(policy.spec.process, identity)))


def _gflops(policy: DiffusionPolicy, schedule: CacheSchedule) -> float:
    return schedule_cost(schedule, policy.trunk.cost).planned / 1e9
