"""The diffusion policy: normalise, denoise, unnormalise. The denoiser is injected: all that caching changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from bac.errors import InvalidInput, sentence
from bac.executors import ChunkNoise, EagerExecutor, Executor
from bac.methods import full_schedule
from bac.passes import optimise
from bac.plan import lower
from bac.sampler_table import SamplerTable
from bac.schedule import Provenance
from policies.base import PolicySpec
from policies.checkpoint import PolicyCheckpoint
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import ddpm

_ENCODED_ROWS = 32
"""Observations that the encoder takes at a time, which bounds its memory: calibration observes hundreds at once."""


class DiffusionPolicy:
    """Maps observations to action chunks.

    Args:
        checkpoint: weights, normalisers and specification.
        sampler: denoising steps; by default DDPM over all training steps.
        denoiser: what runs them; by default the full plan, nothing cached.
        artefacts: folder of what calibration kept for these weights, with ``profiles`` and ``schedules`` in it.
    """

    def __init__(
        self,
        checkpoint: PolicyCheckpoint,
        sampler: SamplerTable | None = None,
        denoiser: Executor | None = None,
        artefacts: Path | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.sampler = ddpm(checkpoint.spec.process) if sampler is None else sampler
        self.trunk = DiffusionTransformerTrunk(checkpoint.network)
        self.provenance = Provenance(checkpoint.digest, self.sampler.identity)
        self.artefacts = artefacts
        self.denoiser = self._uncached() if denoiser is None else denoiser

    @property
    def spec(self) -> PolicySpec:
        """What the policy takes and gives."""
        return self.checkpoint.spec

    @property
    def schedules(self) -> Path | None:
        """Folder of the named schedules of this sampler, for ``bac.accelerate``."""
        return None if self.artefacts is None else self.artefacts / "schedules" / self.sampler.name

    @property
    def observation_steps(self) -> int:
        """Observations To that ``predict`` wants, oldest first."""
        return self.spec.network.observation_steps

    @property
    def action_steps(self) -> int:
        """Actions of a chunk that are executed, Ta."""
        return self.spec.action_steps

    def with_denoiser(self, denoiser: Executor) -> Self:
        """Return the same policy over another denoiser."""
        return type(self)(self.checkpoint, self.sampler, denoiser, self.artefacts)

    def predict(
        self, observation: Mapping[str, np.ndarray], noise_keys: Sequence[tuple[int, int]] | None = None
    ) -> np.ndarray:
        """Return the actions to execute.

        Args:
            observation: key -> float[B, To, channels] or float[To, channels], task units, oldest first; images
                uint8[B, To, H, W, 3] or float[B, To, 3, H, W] in [0, 1].
            noise_keys: per row (episode seed, chunk number); equal keys draw equal noise whatever the batch, so that
                two policies can be compared on the same noise. Without keys the noise is fresh.

        Returns:
            float32[B, Ta, Da], task units; without B if the observation came without.

        Raises:
            InvalidInput: the observation does not fit, or there is not one key per row.
        """
        observed = self.observe(observation)
        actions = self.executed(self.denoiser(observed, self.draw_noise(len(observed), noise_keys)))
        return actions if self.spec.is_batched(observation) else actions[0]

    def observe(self, observation: Mapping[str, np.ndarray]) -> Tensor:
        """Return the observation tokens float32[B, To, Do] that the denoiser takes; see ``predict``.

        The normalised low-dim observation, and of an image policy what its encoder makes of both.
        """
        device, encoder = self.trunk.device, self.checkpoint.encoder
        joined, images = self.spec.separate(observation)
        low_dim = self.checkpoint.observation_normalizer.normalize(torch.from_numpy(joined).to(device))
        if encoder is None:
            return low_dim
        starts = range(0, len(low_dim), _ENCODED_ROWS)
        parts = [slice(start, start + _ENCODED_ROWS) for start in starts]
        seen = {key: torch.from_numpy(each) for key, each in images.items()}
        return torch.cat(
            [encoder(low_dim[part], {key: each[part].to(device) for key, each in seen.items()}) for part in parts]
        )

    def executed(self, chunk: Tensor) -> np.ndarray:
        """Return float32[B, Ta, Da] in task units: the actions to execute of a normalised chunk float32[B, T, Da]."""
        return self.checkpoint.action_normalizer.unnormalize(chunk[:, self.spec.executed]).float().cpu().numpy()

    def draw_noise(self, batch: int, noise_keys: Sequence[tuple[int, int]] | None = None) -> ChunkNoise:
        """Draw all noise of a call for ``batch`` rows; see ``predict`` for the keys."""
        if noise_keys is not None and len(noise_keys) != batch:
            raise InvalidInput(
                sentence("noise keys", expected=f"{batch}, one per row", got=len(noise_keys), mend="give one per row")
            )
        network = self.spec.network
        shape = (1 + self.sampler.steps, network.horizon, network.action_dim)
        if noise_keys is None:
            drawn = torch.randn(batch, *shape, device=self.trunk.device)
        else:
            # Drawn on the CPU, so that a key means the same noise on every device.
            rows = [torch.randn(shape, generator=_generator(seed, chunk)) for seed, chunk in noise_keys]
            drawn = torch.stack(rows).to(self.trunk.device)
        by_step = drawn.transpose(0, 1).contiguous()
        return ChunkNoise(by_step[0], by_step[1:], None if noise_keys is None else tuple(noise_keys))

    def _uncached(self) -> Executor:
        schedule = full_schedule(self.trunk.blocks, self.sampler.steps, self.provenance)
        return EagerExecutor(optimise(lower(schedule)), self.trunk, self.sampler)


def _generator(seed: int, chunk: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + chunk)
