"""DDPM, DDIM and DPM-Solver++ as coefficient tables.

The reference is diffusers, step by step (tests/policies/test_samplers.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from bac.choices import Choice
from bac.errors import CorruptArtefact, InvalidInput, Mismatch, sentence
from bac.sampler_table import SamplerTable

_MAX_BETA = 0.999
"""Bound of one step's noise in the cosine schedule (Nichol & Dhariwal, arXiv 2102.09672)."""


class Spacing(Choice):
    """Which of the training time steps a shorter sampler visits, names as in diffusers."""

    LEADING = "leading"
    TRAILING = "trailing"


@dataclass(frozen=True)
class DiffusionProcess:
    """The forward process a network was trained on: squared-cosine betas, noise prediction, clipped clean chunk.

    Attributes:
        train_steps: training time steps; the original trains on 100.
        clip: bound of the estimated clean chunk, normalised units.
    """

    train_steps: int = 100
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.train_steps < 2 or self.clip <= 0:
            raise InvalidInput(
                sentence(
                    "diffusion process",
                    expected="at least 2 training steps and a positive clip",
                    got=self,
                    mend="correct the policy configuration",
                )
            )

    def alphas_cumprod(self) -> np.ndarray:
        """Return float64[train steps]: the share of signal variance left at each time step (``squaredcos_cap_v2``)."""
        edge = np.arange(self.train_steps + 1) / self.train_steps
        signal = np.cos((edge + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - signal[1:] / signal[:-1], _MAX_BETA)
        return np.cumprod(1 - betas)


def ddpm(process: DiffusionProcess, steps: int | None = None) -> SamplerTable:
    """Return ancestral sampling with the fixed small variance (Ho et al., arXiv 2006.11239, eq. 7).

    Args:
        process: the forward process.
        steps: K; by default all training steps.
    """
    steps = process.train_steps if steps is None else steps
    timesteps = _timesteps(process, steps, Spacing.LEADING)
    alpha, previous = _alphas(process, timesteps, np.append(timesteps[1:], -1))
    ratio = alpha / previous
    variance = np.maximum((1 - previous) / (1 - alpha) * (1 - ratio), 1e-20)
    return SamplerTable(
        identity={"name": "ddpm", "steps": steps, **_identity(process)},
        timesteps=timesteps,
        recover_sample=1 / np.sqrt(alpha),
        recover_estimate=-np.sqrt((1 - alpha) / alpha),
        to_original=np.sqrt(previous) * (1 - ratio) / (1 - alpha),
        to_sample=np.sqrt(ratio) * (1 - previous) / (1 - alpha),
        to_estimate=np.zeros(steps),
        to_noise=np.where(timesteps > 0, np.sqrt(variance), 0.0),
        to_previous=np.zeros(steps),
        clip=process.clip,
    )


def ddim(process: DiffusionProcess, steps: int = 10, spacing: Spacing = Spacing.TRAILING) -> SamplerTable:
    """Return the deterministic sampler, eta = 0 (Song et al., arXiv 2010.02502, eq. 12).

    Args:
        process: the forward process.
        steps: K.
        spacing: which time steps to visit. ``leading`` starts below the noisiest step, on a sample that is pure noise.
    """
    timesteps = _timesteps(process, steps, spacing)
    # Where K does not divide the training steps, diffusers steps down by the rounded ratio rather than to the next
    # visited time step; we do the same, so that a checkpoint scores the same under both.
    alpha, previous = _alphas(process, timesteps, timesteps - process.train_steps // steps)
    return SamplerTable(
        identity={"name": "ddim", "steps": steps, "spacing": str(spacing), **_identity(process)},
        timesteps=timesteps,
        recover_sample=1 / np.sqrt(alpha),
        recover_estimate=-np.sqrt((1 - alpha) / alpha),
        to_original=np.sqrt(previous),
        to_sample=np.zeros(steps),
        to_estimate=np.sqrt(1 - previous),
        to_noise=np.zeros(steps),
        to_previous=np.zeros(steps),
        clip=process.clip,
    )


def dpm_solver(process: DiffusionProcess, steps: int = 10) -> SamplerTable:
    """Return the second-order multistep solver on clean chunks (DPM-Solver++ 2M, Lu et al., arXiv 2211.01095, eq. 9).

    The first and the last step are of first order. The clean chunk's estimate is clipped as in the other samplers; in
    diffusers that is ``thresholding`` with ``dynamic_thresholding_ratio=1`` and ``sample_max_value=clip``.

    Args:
        process: the forward process.
        steps: K, in trailing spacing; the last step goes all the way to the clean chunk.
    """
    timesteps = _timesteps(process, steps, Spacing.TRAILING)
    alpha, following = _alphas(process, timesteps, np.append(timesteps[1:], -1))
    signal, noise = np.sqrt(alpha), np.sqrt(1 - alpha)
    next_signal, next_noise = np.sqrt(following), np.sqrt(1 - following)
    shrink = next_noise / noise
    gain = next_signal - shrink * signal
    # Half the ratio of the coming to the past step in log signal-to-noise; 0 where a step is of first order.
    half_snr = np.log(signal / noise)
    ratio = np.zeros(steps)
    ratio[1:-1] = np.diff(half_snr)[1:] / np.diff(half_snr)[:-1] / 2
    return SamplerTable(
        identity={"name": "dpm_solver", "steps": steps, **_identity(process)},
        timesteps=timesteps,
        recover_sample=1 / signal,
        recover_estimate=-noise / signal,
        to_original=gain * (1 + ratio),
        to_sample=shrink,
        to_estimate=np.zeros(steps),
        to_noise=np.zeros(steps),
        to_previous=-gain * ratio,
        clip=process.clip,
    )


def sampler_named(process: DiffusionProcess, identity: Mapping[str, object]) -> SamplerTable:
    """Return the sampler that an artefact or a result was made with.

    Args:
        process: of the checkpoint.
        identity: as ``SamplerTable.identity``.

    Raises:
        CorruptArtefact: it names no sampler of ours.
        Mismatch: it belongs to another diffusion process.
    """
    try:
        steps = int(str(identity["steps"]))
        match identity["name"]:
            case "ddpm":
                table = ddpm(process, steps)
            case "ddim":
                table = ddim(process, steps, Spacing(str(identity["spacing"])))
            case "dpm_solver":
                table = dpm_solver(process, steps)
            case other:
                raise KeyError(other)
    except (LookupError, ValueError) as error:
        raise CorruptArtefact(
            sentence("sampler", expected="one of ours", got=dict(identity), mend="make its file again")
        ) from error
    if dict(table.identity) != dict(identity):
        raise Mismatch(
            sentence(
                "sampler",
                expected=f"{dict(table.identity)} of this checkpoint",
                got=dict(identity),
                mend="make its file again for this checkpoint",
            )
        )
    return table


def _identity(process: DiffusionProcess) -> dict[str, str | int | float]:
    return {"betas": "squaredcos_cap_v2", "prediction": "epsilon", **asdict(process)}


def _timesteps(process: DiffusionProcess, steps: int, spacing: Spacing) -> np.ndarray:
    if not 1 <= steps <= process.train_steps:
        raise InvalidInput(
            sentence(
                "sampler.steps",
                expected=f"1 to {process.train_steps}",
                got=steps,
                mend="choose a number the network was trained for",
            )
        )
    if spacing is Spacing.LEADING:
        return np.arange(steps, dtype=np.int64)[::-1] * (process.train_steps // steps)
    ratio = process.train_steps / steps
    return np.round(np.arange(process.train_steps, 0, -ratio)).astype(np.int64)[:steps] - 1


def _alphas(process: DiffusionProcess, timesteps: np.ndarray, previous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the signal shares at each time step and at the one after it; past the last, all is signal."""
    alphas = process.alphas_cumprod()
    return alphas[timesteps], np.where(previous >= 0, alphas[np.maximum(previous, 0)], 1.0)
