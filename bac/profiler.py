"""Profiler: records every block's feature at every step of uncached calls and compares the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bac.channels import ChannelTotals
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
    recorder = _RecordingTrunk(trunk, sampler.steps)
    execute = _uncached(recorder, sampler)
    totals = {metric: np.zeros((len(trunk.blocks), sampler.steps, sampler.steps)) for metric in Metric}
    residuals = _ResidualTotals(sampler.steps)
    likeness: list[Any] = [0.0 for _ in trunk.blocks]
    attention: dict[int, Any] = dict.fromkeys(sorted({block.layer for block in trunk.blocks}), 0.0)
    channels = ChannelTotals(len(trunk.blocks), sampler.steps)
    observations = 0
    for done, (observation, noise) in enumerate(batches, start=1):
        recorder.begin()
        execute(observation, noise)
        for block, features in enumerate(recorder.features):
            recorded = torch.stack(features)
            for metric, values in _compare(recorded).items():
                totals[metric][block] += values
            likeness[block] += _token_likeness(recorded)
            channels.add(block, recorded)
            features.clear()
        residuals.add(torch.stack(recorder.residuals))
        for layer, received in recorder.attention.items():
            attention[layer] += torch.stack(received).double().sum(dim=1).cpu().numpy()
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
        stream_change=recorder.change / observations,
        residual_change=residuals.change / observations,
        residual_slope=residuals.slope,
        **{name: (np.stack(total) / observations).astype(np.float32) for name, total in tokens.items()},
        **channels.statistics(),
    )


def record_features(
    trunk: ResidualTrunk, sampler: SamplerTable, observation: Tensor, noise: ChunkNoise
) -> list[Tensor]:
    """Return the features of an uncached call, per block float[K, B, T, d]; see ``profile_features`` for the memory."""
    recorder = _RecordingTrunk(trunk, sampler.steps)
    _uncached(recorder, sampler)(observation, noise)
    return [torch.stack(features) for features in recorder.features]


def _uncached(recorder: _RecordingTrunk, sampler: SamplerTable) -> EagerExecutor:
    nowhere = Provenance("", sampler.identity)  # nothing of it is kept
    return EagerExecutor(lower(full_schedule(recorder.blocks, sampler.steps, nowhere)), recorder, sampler)


class _RecordingTrunk:
    """A trunk that keeps what its branches return and watches the stream; all else passes through.

    Attributes:
        features: per block and step, float[B, T, d].
        residuals: per step, what all blocks together added to the stream, float[B, T, d].
        attention: layer -> per step, the attention that its tokens receive, float[B, T]; empty where the trunk does not
            show it, or has a single token, without a neighbour to resemble.
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
        self.attention: dict[int, list[Tensor]] = {}
        self._streams: list[Tensor | None] = [None] * points

    def branch(self, block: int, stream: Tensor, table: Any, condition: Any) -> Tensor:
        self._watch(block, stream)
        feature = self._trunk.branch(block, stream, table, condition)
        self.features[block].append(feature)
        layer, kind = self._trunk.blocks[block].layer, self._trunk.blocks[block].kind
        if kind is BlockKind.SELF_ATTENTION and isinstance(self._trunk, TokenTrunk) and self._trunk.horizon > 1:
            self.attention.setdefault(layer, []).append(self._trunk.attention_received(layer, stream))
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
