"""Profiler: records every block's feature at every step of uncached calls and compares the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bac.executors import ChunkNoise, EagerExecutor
from bac.methods.none import full_schedule
from bac.plan import lower
from bac.profile import FeatureProfile, Metric
from bac.sampler_table import SamplerTable
from bac.schedule import Provenance
from bac.trunk import BlockKind, ResidualTrunk, TokenTrunk


def profile_features(
    trunk: ResidualTrunk,
    sampler: SamplerTable,
    provenance: Provenance,
    batches: Sequence[tuple[Tensor, ChunkNoise]],
    on_batch: Callable[[int], None] | None = None,
) -> FeatureProfile:
    """Measure a feature profile; of a ``TokenTrunk`` also how its action tokens attend to and resemble each other.

    Memory grows with the batch: K x B x T x d floats per block (39 MB per observation at Push-T's sizes).

    Args:
        trunk: the denoiser.
        sampler: its sampler.
        provenance: names both.
        batches: (normalised observations float32[B, To, Do], noise of the call) pairs.
        on_batch: called with the number of batches done.

    Raises:
        InvalidInput: a feature is NaN or never changes.
    """
    recorder = _RecordingTrunk(trunk)
    schedule = full_schedule(trunk.blocks, sampler.steps, provenance)
    execute = EagerExecutor(lower(schedule), recorder, sampler)
    totals = {metric: np.zeros((len(trunk.blocks), sampler.steps, sampler.steps)) for metric in Metric}
    likeness: list[Any] = [0.0 for _ in trunk.blocks]
    attention: dict[int, Any] = dict.fromkeys(sorted({block.layer for block in trunk.blocks}), 0.0)
    observations = 0
    for done, (observation, noise) in enumerate(batches, start=1):
        recorder.features = [[] for _ in trunk.blocks]
        execute(observation, noise)
        for block, features in enumerate(recorder.features):
            recorded = torch.stack(features)
            for metric, values in _compare(recorded).items():
                totals[metric][block] += values
            likeness[block] += _token_likeness(recorded)
            features.clear()
        for layer, received in recorder.attention.items():
            attention[layer] += torch.stack(received).double().sum(dim=1).cpu().numpy()
            received.clear()
        observations += len(observation)
        if on_batch is not None:
            on_batch(done)
    means = {metric: (total / observations).astype(np.float32) for metric, total in totals.items()}
    tokens = {"token_likeness": likeness, "attention": list(attention.values())} if recorder.attention else {}
    return FeatureProfile(
        means,
        trunk.blocks,
        observations,
        provenance,
        **{name: (np.stack(total) / observations).astype(np.float32) for name, total in tokens.items()},
    )


class _RecordingTrunk:
    """A trunk that keeps what its branches return, and the attention its tokens receive; all else passes through."""

    def __init__(self, trunk: ResidualTrunk) -> None:
        self._trunk = trunk
        self.features: list[list[Tensor]] = [[] for _ in trunk.blocks]
        self.attention: dict[int, list[Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def branch(self, block: int, stream: Tensor, table: Any, condition: Any) -> Tensor:
        feature = self._trunk.branch(block, stream, table, condition)
        self.features[block].append(feature)
        layer, kind = self._trunk.blocks[block].layer, self._trunk.blocks[block].kind
        # A single token has no neighbour to resemble.
        if kind is BlockKind.SELF_ATTENTION and isinstance(self._trunk, TokenTrunk) and self._trunk.horizon > 1:
            self.attention.setdefault(layer, []).append(self._trunk.attention_received(layer, stream))
        return feature


def _token_likeness(features: Tensor) -> np.ndarray:
    """Return float64[K, T - 1] for float[K, B, T, d]: the cosine of neighbouring tokens, summed over B."""
    cosine = F.cosine_similarity(features[:, :, :-1].double(), features[:, :, 1:].double(), dim=3)
    return cosine.sum(dim=1).cpu().numpy()


def _compare(features: Tensor) -> dict[Metric, np.ndarray]:
    """Compare all pairs of steps of float[K, B, T, d]; return float64[K, K] per metric, summed over B."""
    rows = features.flatten(2).transpose(0, 1)
    elements = rows.shape[2]
    # float64 and the Gram matrix: the difference of two nearly equal features drowns in float32.
    exact = rows.double()
    gram = exact @ exact.transpose(1, 2)
    square = gram.diagonal(dim1=1, dim2=2)
    squared_distance = (square[:, :, None] + square[:, None, :] - 2 * gram).clamp_(min=0)
    norm = square.sqrt()
    values = {
        Metric.COSINE: gram / (norm[:, :, None] * norm[:, None, :]),
        Metric.L1: torch.cdist(rows, rows, p=1).double() / elements,
        Metric.L2: squared_distance.sqrt(),
        Metric.MSE: squared_distance / elements,
    }
    return {metric: value.sum(dim=0).cpu().numpy() for metric, value in values.items()}
