"""Committed actions: a part of the chunk that is given, around which the rest is denoised (inpainting).

A robot goes on while its next chunk is denoised. The actions it will have executed by then are committed: they must
come out as they went in, and the rest of the chunk should go on smoothly from them. So at each denoising step their
place in the sample is overwritten by what they look like at that step's noise level, and at the end by themselves; the
network sees them as it would have seen them in training and fits the rest to them. This is the replacement form of
RePaint (Lugmayr et al., arXiv 2201.09865), used for real-time chunking as in Black et al. (arXiv 2506.07339).

The noisy form is the sampler's own step under the true clean action ``c`` in place of an estimate: with ``x_0 = s_0 c +
n_0 z``, every further ``x_k`` is again linear in c and the call's noise, and distributed as ``s_k c + n_k z``, as the
rest of the sample is. So the whole path is one product with a matrix that depends on the sampler alone; no further
noise is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bac.errors import InvalidInput, Unavailable, sentence
from bac.executors.base import ChunkNoise
from bac.sampler_table import SamplerTable


@dataclass(frozen=True)
class Committed:
    """Given actions of a chunk.

    Attributes:
        actions: float32[B, n, Da], normalised units.
        first: place of the first in the chunk, in [0, T - n].
    """

    actions: Tensor
    first: int

    @property
    def count(self) -> int:
        """Number of actions n; 0 leaves the chunk as it would be without."""
        return self.actions.shape[1]

    @property
    def place(self) -> slice:
        """Where they are in the chunk."""
        return slice(self.first, self.first + self.count)

    def require(self, noise: ChunkNoise) -> None:
        """Refuse what does not fit into the chunks of ``noise``.

        Raises:
            InvalidInput: another batch size or number of channels, too many actions, or NaN.
        """
        batch, horizon, channels = noise.initial.shape
        shape = tuple(self.actions.shape)
        fits = len(shape) == 3 and (shape[0], shape[2]) == (batch, channels)
        if not fits or not 0 <= self.first <= horizon - shape[1] or not bool(torch.isfinite(self.actions).all()):
            raise InvalidInput(
                sentence(
                    "committed actions",
                    expected=f"finite float[{batch}, n, {channels}] within {horizon} places",
                    got=f"{list(shape)} from place {self.first}",
                    mend="commit fewer, or check them",
                )
            )

    def rows(self, rows: list[int]) -> Committed:
        """Return those of some rows of the batch."""
        return Committed(self.actions[rows], self.first)


class CommittedPaths:
    """What committed actions look like at each denoising step of a sampler.

    Args:
        sampler: K steps.
        device: of the actions.
    """

    def __init__(self, sampler: SamplerTable, device: torch.device) -> None:
        self._sampler, self._device = sampler, device

    def __call__(self, committed: Committed, noise: ChunkNoise) -> Tensor:
        """Return float32[K + 1, B, n, Da]: the committed actions as step k sees them, and last as they are.

        They fit the noise: an executor asks ``Committed.require`` at its entrance, for that reads values back to the
        host, which no CUDA graph can capture.

        Raises:
            Unavailable: the sampler's steps have no noise level.
        """
        actions, place = committed.actions.float(), committed.place
        given = torch.cat((actions[None], noise.initial[None, :, place], noise.steps[:, :, place]))
        path = (self._operator @ given.flatten(1)).reshape(-1, *actions.shape)
        path[-1] = actions  # without the rounding of a product
        return path

    @cached_property
    def _operator(self) -> Tensor:
        return torch.from_numpy(path_operator(self._sampler)).float().to(self._device)


def path_operator(sampler: SamplerTable) -> np.ndarray:
    """Return float64[K + 1, K + 2]: ``x_k`` as a sum over the clean action, the initial and the K steps' noise.

    Raises:
        Unavailable: the sampler's steps have no noise level.
    """
    if not (sampler.recover_sample.all() and sampler.recover_estimate.all()):
        raise Unavailable(
            sentence(
                "committed actions",
                expected="a sampler that estimates the clean chunk from a sample of known noise",
                got=dict(sampler.identity),
                mend="use DDPM, DDIM or DPM-Solver++, or another seam than inpaint",
            )
        )
    # x0 = (x - noise e) / signal is what the table's recover columns say.
    signal, noise = 1 / sampler.recover_sample, -sampler.recover_estimate / sampler.recover_sample
    clean, *fresh = np.eye(sampler.steps + 2)
    rows = [signal[0] * clean + noise[0] * fresh[0]]
    for step in range(sampler.steps):
        estimate = (rows[-1] - signal[step] * clean) / noise[step]
        rows.append(
            (sampler.to_original[step] + (sampler.to_previous[step] if step else 0.0)) * clean
            + sampler.to_sample[step] * rows[-1]
            + sampler.to_estimate[step] * estimate
            + sampler.to_noise[step] * fresh[step + 1]
        )
    return np.stack(rows)
