"""Profiler: records every block's feature at every step of uncached calls and compares the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bac.channels import ChannelTotals
from bac.executors import ChunkNoise, EagerExecutor
from bac.methods.none import full_schedule
from bac.plan import lower
from bac.profile import FeatureProfile, Metric
from bac.sampler_table import SamplerTable
from bac.schedule import Provenance
from bac.trunk import ResidualTrunk


def profile_features(
    trunk: ResidualTrunk,
    sampler: SamplerTable,
    provenance: Provenance,
    batches: Sequence[tuple[Tensor, ChunkNoise]],
    on_batch: Callable[[int], None] | None = None,
) -> FeatureProfile:
    """Measure a feature profile.

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
    recorder = _RecordingTrunk(trunk, sampler.steps)
    schedule = full_schedule(trunk.blocks, sampler.steps, provenance)
    execute = EagerExecutor(lower(schedule), recorder, sampler)
    totals = {metric: np.zeros((len(trunk.blocks), sampler.steps, sampler.steps)) for metric in Metric}
    residuals = _ResidualTotals(sampler.steps)
    channels = ChannelTotals(len(trunk.blocks), sampler.steps)
    observations = 0
    for done, (observation, noise) in enumerate(batches, start=1):
        recorder.begin()
        execute(observation, noise)
        for block, features in enumerate(recorder.features):
            recorded = torch.stack(features)
            for metric, values in _compare(recorded).items():
                totals[metric][block] += values
            channels.add(block, recorded)
            features.clear()
        residuals.add(torch.stack(recorder.residuals))
        observations += len(observation)
        if on_batch is not None:
            on_batch(done)
    means = {metric: (total / observations).astype(np.float32) for metric, total in totals.items()}
    return FeatureProfile(
        means,
        trunk.blocks,
        observations,
        provenance,
        stream_change=recorder.change / observations,
        residual_change=residuals.change / observations,
        residual_slope=residuals.slope,
        **channels.statistics(),
    )


class _RecordingTrunk:
    """A trunk that keeps what its branches return and watches the stream; all else passes through.

    Attributes:
        features: per block and step, float[B, T, d].
        residuals: per step, what all blocks together added to the stream, float[B, T, d].
        change: float64[blocks + 1, K], relative change of the stream from the step before, summed over all rows so far.
    """

    def __init__(self, trunk: ResidualTrunk, steps: int) -> None:
        self._trunk = trunk
        self.change = np.zeros((len(trunk.blocks) + 1, steps))
        self.begin()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def begin(self) -> None:
        """Forget the call before."""
        points = len(self._trunk.blocks) + 1
        self.features: list[list[Tensor]] = [[] for _ in self._trunk.blocks]
        self.residuals: list[Tensor] = []
        self._streams: list[Tensor | None] = [None] * points

    def branch(self, block: int, stream: Tensor, table: Any, condition: Any) -> Tensor:
        self._watch(block, stream)
        feature = self._trunk.branch(block, stream, table, condition)
        self.features[block].append(feature)
        return feature

    def head(self, stream: Tensor) -> Tensor:
        self._watch(len(self._trunk.blocks), stream)
        embedded = self._streams[0]
        assert embedded is not None  # block 0 saw it
        self.residuals.append(stream - embedded)
        return self._trunk.head(stream)

    def _watch(self, point: int, stream: Tensor) -> None:
        before = self._streams[point]
        if before is not None:
            change = (stream - before).abs().sum(dim=(1, 2)) / before.abs().sum(dim=(1, 2))
            self.change[point, len(self.residuals)] += float(change.double().sum())
        self._streams[point] = stream


class _ResidualTotals:
    """Compares the stack's whole residual between steps, summed over rows."""

    def __init__(self, steps: int) -> None:
        self.change = np.zeros((steps, steps))
        self._gram = np.zeros((steps, steps))

    @property
    def slope(self) -> np.ndarray:
        """float64[K, K], least-squares factor from the row's residual to the column's."""
        return self._gram / self._gram.diagonal()[:, None]

    def add(self, residuals: Tensor) -> None:
        """Count float[K, B, T, d]."""
        rows = residuals.flatten(2).transpose(0, 1)
        change = torch.cdist(rows, rows, p=1) / rows.abs().sum(dim=2, keepdim=True)
        self.change += change.double().sum(dim=0).cpu().numpy()
        centred = (residuals - residuals.mean(dim=3, keepdim=True)).flatten(2).transpose(0, 1).double()
        self._gram += (centred @ centred.transpose(1, 2)).sum(dim=0).cpu().numpy()


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
