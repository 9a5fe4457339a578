"""Toys whose arithmetic tells computing from reusing, and a small random network.

A toy feature has two channels: ``(step + 1) * 128**block`` and ``tag * 128**block``, where the tag is the observation.
Six of them sum to an integer that float64 holds exactly, so a stream decodes into the step and the call that each
block's feature comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bac.executors import ChunkNoise
from bac.methods.forecast import forecast_of
from bac.profile import FeatureProfile, Metric
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule, Provenance
from bac.trunk import Block, BlockKind, TrunkCost
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig

BASE = 128
BLOCKS = tuple(Block(layer, kind) for layer in range(2) for kind in BlockKind)
PROVENANCE = Provenance("c0ffee", {"name": "toy", "steps": 12})
# Powers of ten, so that a total shows by its digits what was counted how often.
COST = TrunkCost(
    branch=tuple(10**block for block in range(6)),
    step=10**6,
    call=10**7,
    original_branch=tuple(2 * 10**block for block in range(6)),
    original_step=5 * 10**6,
)


class ToyTrunk:
    """A residual trunk of integers; ``meet`` runs at the start of every step."""

    blocks = BLOCKS
    cost = COST
    device = torch.device("cpu")

    def __init__(self, meet: Callable[[], object] = lambda: None) -> None:
        self.calls: list[tuple[int, int]] = []
        self.streams: list[Tensor] = []
        self._meet = meet

    def step_tables(self, timesteps: np.ndarray) -> range:
        return range(len(timesteps))

    def condition(self, observation: Tensor) -> Tensor:
        return observation

    def embed(self, sample: Tensor) -> Tensor:
        self._meet()
        return torch.zeros_like(sample)

    def branch(self, block: int, stream: Tensor, table: int, condition: Tensor) -> Tensor:
        self.calls.append((block, table))
        return torch.cat((torch.full_like(condition, table + 1), condition), dim=-1) * BASE**block

    def head(self, stream: Tensor) -> Tensor:
        self.streams.append(stream)
        return stream


class NoHostReads(TorchDispatchMode):
    """Refuses what waits for a device to tell the host a value or a size, as the capture of a CUDA graph does."""

    # In inference mode the first three arrive as they are, else as the fourth.
    _READS = ("is_nonzero", "item", "allclose", "_local_scalar_dense", "equal", "nonzero", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self._READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return func(*args, **(kwargs or {}))


def decode(stream: Tensor) -> tuple[list[int], list[int]]:
    """Return per block the step and the tag of the one feature in the stream."""
    steps, tags = ([int(number) // BASE**block % BASE for block in range(len(BLOCKS))] for number in stream.flatten())
    return [step - 1 for step in steps], tags


def toy_observation(*tags: int) -> Tensor:
    return torch.tensor(tags, dtype=torch.float64).reshape(-1, 1, 1)


def toy_noise(batch: int, steps: int) -> ChunkNoise:
    return ChunkNoise(torch.zeros(batch, 1, 2, dtype=torch.float64), torch.zeros(steps, batch, 1, 2))


def toy_sampler(steps: int, identity: dict[str, str | int | float] | None = None) -> SamplerTable:
    """Add every noise estimate to the sample, so that the chunk holds what each step made of the stream."""
    one, zero = np.ones(steps), np.zeros(steps)
    return SamplerTable(
        identity={"name": "toy", "steps": steps} if identity is None else identity,
        timesteps=np.arange(steps)[::-1],
        recover_sample=zero,
        recover_estimate=one,
        to_original=one,
        to_sample=one,
        to_estimate=zero,
        to_noise=zero,
        to_previous=zero,
        clip=np.inf,
    )


def latest_update(row: Sequence[bool] | np.ndarray, step: int) -> int:
    """Return the step whose feature a block adds at ``step``: the definition, without array tricks."""
    return max(earlier for earlier in range(step + 1) if row[earlier])


def schedule_of(*rows: str, provenance: Provenance = PROVENANCE) -> CacheSchedule:
    """Read a schedule from rows of ``#`` (update) and ``.`` (reuse), one per block."""
    mask = np.array([[cell == "#" for cell in row] for row in rows])
    return CacheSchedule(mask, BLOCKS[: len(rows)], provenance, "toy", {"rows": list(rows)})


def random_schedule(seed: int, steps: int = 12, blocks: tuple[Block, ...] = BLOCKS) -> CacheSchedule:
    mask = np.random.default_rng(seed).random((len(blocks), steps)) < 0.4
    mask[:, 0] = True
    return CacheSchedule(mask, blocks, PROVENANCE, "random")


def random_forecast(mask: np.ndarray, seed: int) -> np.ndarray:
    """Return random weights of the latest three features; now and then the latest is held as it is."""
    draw = np.random.default_rng(seed)

    def rule(seen: np.ndarray, step: int) -> np.ndarray:
        weights = draw.uniform(-1, 1, len(seen))
        return np.eye(len(seen))[0] if draw.random() < 0.3 else weights

    return forecast_of(mask, 3, rule)


def with_groups(schedule: CacheSchedule, width: int, seed: int = 0, count: int = 3) -> CacheSchedule:
    """Return the schedule with random groups of channels, each of them predicted by random weights of its own."""
    groups = np.random.default_rng(seed).integers(count, size=(len(schedule.blocks), width))
    forecast = np.stack([random_forecast(schedule.mask, seed + group) for group in range(count)], axis=-1)
    return replace(schedule, forecast=forecast, groups=groups)


def alike(schedule: CacheSchedule) -> CacheSchedule:
    """Give all blocks the first one's update steps, predictions and groups, so that runs of predictions fold."""
    changes = {
        name: np.repeat(values[:1], len(schedule.blocks), axis=0)
        for name in ("mask", "forecast", "groups")
        if (values := getattr(schedule, name)) is not None
    }
    return replace(schedule, **changes)


def random_profile(seed: int, steps: int = 7, blocks: tuple[Block, ...] = BLOCKS) -> FeatureProfile:
    """Return a profile whose metrics disagree with each other, so that taking the wrong one shows."""
    rng = np.random.default_rng(seed)
    values = {}
    for metric in Metric:
        upper = np.triu(rng.random((len(blocks), steps, steps)), k=1)
        diagonal = np.eye(steps) if metric is Metric.COSINE else 0.0
        values[metric] = (upper + upper.transpose(0, 2, 1) + diagonal).astype(np.float32)
    return FeatureProfile(values, blocks, 32, PROVENANCE)


def small_network(layers: int = 2) -> DiffusionTransformer:
    """Return a network with large weights: at the usual 0.02 its branches add next to nothing and no cache shows."""
    config = DiffusionTransformerConfig(
        action_dim=2, observation_dim=5, horizon=4, observation_steps=2, layers=layers, heads=2, width=16
    )
    network = DiffusionTransformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.normal_(std=0.25, generator=generator)
    return network


def random_inputs(seed: int, batch: int, steps: int) -> tuple[Tensor, ChunkNoise]:
    """Return an observation and noise for ``small_network``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(1 + steps, batch, 4, 2, generator=generator)
    return torch.randn(batch, 2, 5, generator=generator), ChunkNoise(drawn[0], drawn[1:])


def sampler_step(sampler: SamplerTable, step: int, sample: Tensor, estimate: Tensor, fresh: Tensor) -> Tensor:
    """Apply the formula at the head of bac/sampler_table.py, for samplers that do not look back."""
    assert sampler.to_previous[step] == 0
    original = sampler.recover_sample[step] * sample + sampler.recover_estimate[step] * estimate
    return (
        sampler.to_original[step] * original.clip(-sampler.clip, sampler.clip)
        + sampler.to_sample[step] * sample
        + sampler.to_estimate[step] * estimate
        + sampler.to_noise[step] * fresh
    )


def drive(network: DiffusionTransformer, sampler: SamplerTable, observation: Tensor, noise: ChunkNoise) -> Tensor:
    """Run the network's own forward at every step, as a user's loop does."""
    sample = noise.initial
    for step, timestep in enumerate(sampler.timesteps):
        estimate = network(sample, torch.tensor(int(timestep)), observation)
        sample = sampler_step(sampler, step, sample, estimate, noise.steps[step])
    return sample
