"""Sensitivity: how much of an error made at a denoising step is still there in the action chunk.

Measured, not derived: small random errors are added to the noise estimate of one step, the rest of the call runs
uncached, and the executed actions are compared with those of the undisturbed call. Late steps decide the chunk; that is
what ``cache=late`` and ``cache=bac_weighted`` build on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bac.executors import ChunkNoise, EagerExecutor
from bac.methods.none import full_schedule
from bac.passes import optimise
from bac.plan import lower
from bac.sampler_table import SamplerTable
from bac.schedule import Provenance
from bac.trunk import ResidualTrunk

_SIZE = 0.1
"""Root mean square of the error, where noise estimates have 1.

Small enough to act nearly linearly, large enough that the smallest gains, about 1e-5, stand clear of float32's
rounding.
"""


def step_sensitivity(
    trunk: ResidualTrunk,
    sampler: SamplerTable,
    batches: Sequence[tuple[Tensor, ChunkNoise]],
    executed: slice,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Measure the gain from the noise estimate of each step to the executed actions.

    Costs K + 1 uncached calls per observation.

    Args:
        trunk: the denoiser.
        sampler: its sampler.
        batches: (normalised observations float32[B, To, Do], noise of the call) pairs.
        executed: the actions of a chunk that count.
        seed: of the errors.
        on_batch: called with the number of batches done.

    Returns:
        float64[K]: root mean square of the actions' change over that of the error, over all observations.
    """
    copies = sampler.steps + 1
    squares, observations = np.zeros(sampler.steps), 0
    for done, (observation, noise) in enumerate(batches, start=1):
        rows = len(observation)
        nudged = _NudgedTrunk(trunk, rows, torch.Generator().manual_seed(seed + done))
        plan = optimise(lower(full_schedule(trunk.blocks, sampler.steps, Provenance("", sampler.identity))))
        many = ChunkNoise(noise.initial.repeat(copies, 1, 1), noise.steps.repeat(1, copies, 1, 1))
        chunks = EagerExecutor(plan, nudged, sampler)(observation.repeat(copies, 1, 1), many)
        actions = chunks.view(copies, rows, *chunks.shape[1:])[:, :, executed].double()
        change = (actions[:-1] - actions[-1]).square().mean(dim=(2, 3)).sum(dim=1)
        squares += change.cpu().numpy()
        observations += rows
        if on_batch is not None:
            on_batch(done)
    return np.sqrt(squares / observations) / _SIZE


class _NudgedTrunk:
    """A trunk whose rows come in K + 1 groups; group t gets an error in its noise estimate at step t, the last none."""

    def __init__(self, trunk: ResidualTrunk, rows: int, draw: torch.Generator) -> None:
        self._trunk = trunk
        self._rows = rows
        self._draw = draw
        self._step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def head(self, stream: Tensor) -> Tensor:
        estimate = self._trunk.head(stream).clone()
        group = slice(self._step * self._rows, (self._step + 1) * self._rows)
        error = torch.randn(estimate[group].shape, generator=self._draw)
        error *= _SIZE / error.square().mean(dim=(1, 2), keepdim=True).sqrt()
        estimate[group] += error.to(estimate)
        self._step += 1
        return estimate
