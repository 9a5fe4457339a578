"""Eager executor: a plan bound to weights and sampler table, run operation by operation. Any device and batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from bac.executors.base import ChunkNoise, require_together
from bac.executors.committed import Committed, CommittedPaths
from bac.plan import Add, Combine, CombineGroups, Compute, Fold, Operation, Plan
from bac.sampler_table import SamplerTable
from bac.trunk import ResidualTrunk

_Slots = list[Tensor | None]
_Action = Callable[[Tensor, _Slots, Any, Any], Tensor]


class EagerExecutor:
    """Runs a plan. Safe to call from several threads at once: all state of a call is local to it.

    Args:
        plan: operations per step.
        trunk: the weights; its blocks must be the plan's.
        sampler: K steps, as many as the plan.

    Raises:
        Mismatch: the three do not belong together.
    """

    def __init__(self, plan: Plan, trunk: ResidualTrunk, sampler: SamplerTable) -> None:
        require_together(plan, trunk, sampler)
        self.plan = plan
        self._trunk = trunk
        self._sampler = sampler
        self._paths = CommittedPaths(sampler, trunk.device)
        with torch.inference_mode():
            tables = trunk.step_tables(sampler.timesteps)
        self._steps = [
            (table, [_bind(op, plan, trunk) for op in operations], sampler_update(sampler, step))
            for step, (table, operations) in enumerate(zip(tables, plan.steps, strict=True))
        ]

    @torch.inference_mode()
    def __call__(self, observation: Tensor, noise: ChunkNoise, committed: Committed | None = None) -> Tensor:
        """Return the normalised action chunk float32[B, T, Da] for normalised observations float32[B, To, Do]."""
        noise.require(observation.shape[0], self._sampler.steps)
        if committed is not None:
            committed.require(noise)
        return self.denoise(self._trunk.condition(observation), noise, committed)

    @torch.inference_mode()
    def denoise(self, condition: Any, noise: ChunkNoise, committed: Committed | None = None) -> Tensor:
        """Return the normalised action chunk float32[B, T, Da] under a condition of this executor's trunk.

        Nothing is checked, so nothing is read back to the host: the caller knows that noise and committed actions fit.
        """
        slots: _Slots = [None] * self.plan.slots
        original = torch.zeros_like(noise.initial)
        impose, path = _imposing(committed, noise, self._paths)
        sample = impose(noise.initial, path[0])
        for (table, actions, update), fresh, given in zip(self._steps, noise.steps, path[1:], strict=True):
            stream = self._trunk.embed(sample)
            for act in actions:
                stream = act(stream, slots, table, condition)
            sample, original = update(sample, self._trunk.head(stream), fresh, original)
            sample = impose(sample, given)
        return sample


def _imposing(
    committed: Committed | None, noise: ChunkNoise, paths: CommittedPaths
) -> tuple[Callable[[Tensor, Tensor | None], Tensor], Sequence[Tensor | None]]:
    """Return what writes the committed actions into a sample float[B, T, Da], and, K + 1 times, what it writes."""
    if committed is None or not committed.count:
        return lambda sample, _: sample, [None] * (len(noise.steps) + 1)
    before, after = slice(committed.first), slice(committed.place.stop, None)

    def impose(sample: Tensor, given: Tensor | None) -> Tensor:
        assert given is not None
        return torch.cat((sample[:, before], given, sample[:, after]), dim=1)

    return impose, list(paths(committed, noise))


def _bind(op: Operation, plan: Plan, trunk: ResidualTrunk) -> _Action:
    match op:
        case Compute(block, int(slot)):
            return partial(_compute_and_keep, trunk, block, slot)
        case Compute(block, _):
            return partial(_compute, trunk, block)
        case Add(slot):
            return partial(_add, slot)
        case Fold(slots, into):
            return partial(_fold, slots, into)
        case Combine(slots, weights):
            return partial(_combine, slots, weights)
        case CombineGroups(_, slots, _):
            rows = torch.tensor(plan.channel_weights(op), dtype=torch.float32, device=trunk.device)
            return partial(_combine_channels, slots, tuple(rows))


def _compute(trunk: ResidualTrunk, block: int, stream: Tensor, slots: _Slots, table: Any, condition: Any) -> Tensor:
    return stream + trunk.branch(block, stream, table, condition)


def _compute_and_keep(
    trunk: ResidualTrunk, block: int, slot: int, stream: Tensor, slots: _Slots, table: Any, condition: Any
) -> Tensor:
    feature = trunk.branch(block, stream, table, condition)
    slots[slot] = feature
    return stream + feature


def _add(slot: int, stream: Tensor, slots: _Slots, table: Any, condition: Any) -> Tensor:
    feature = slots[slot]
    assert feature is not None  # bac.plan.simulate refuses plans that read an empty slot
    return stream + feature


def _fold(sources: tuple[int, ...], into: int, stream: Tensor, slots: _Slots, table: Any, condition: Any) -> Tensor:
    features = [feature for slot in sources if (feature := slots[slot]) is not None]
    slots[into] = reduce(torch.add, features)
    return stream


def _combine(
    sources: tuple[int, ...],
    weights: tuple[float, ...],
    stream: Tensor,
    slots: _Slots,
    table: Any,
    condition: Any,
) -> Tensor:
    for source, weight in zip(sources, weights, strict=True):
        feature = slots[source]
        assert feature is not None
        stream = stream + weight * feature
    return stream


def _combine_channels(
    sources: tuple[int, ...],
    rows: tuple[Tensor, ...],
    stream: Tensor,
    slots: _Slots,
    table: Any,
    condition: Any,
) -> Tensor:
    for source, row in zip(sources, rows, strict=True):
        feature = slots[source]
        assert feature is not None
        stream = torch.addcmul(stream, feature, row)
    return stream


def sampler_update(
    sampler: SamplerTable, step: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return step ``step`` of the sampler: (sample, estimate, fresh noise, previous x0) -> (sample, x0).

    Also for gradients: the inputs are not changed.
    """
    recover_sample, recover_estimate = float(sampler.recover_sample[step]), float(sampler.recover_estimate[step])
    to_original, to_sample = float(sampler.to_original[step]), float(sampler.to_sample[step])
    to_estimate, to_noise = float(sampler.to_estimate[step]), float(sampler.to_noise[step])
    to_previous, clip = float(sampler.to_previous[step]), sampler.clip

    def update(sample: Tensor, estimate: Tensor, fresh: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        original = (recover_sample * sample + recover_estimate * estimate).clamp_(-clip, clip)
        result = to_original * original + to_sample * sample + to_estimate * estimate + to_noise * fresh
        return (result + to_previous * previous if to_previous else result), original

    return update
