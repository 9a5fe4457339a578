"""Training of a diffusion policy's network: noise prediction, EMA weights, cosine rate, exact resume.

Step ``s`` draws its windows, time steps, noise, crops and dropout from generators seeded by ``(seed, s)`` alone, so on
a CPU a run that was killed and resumed gives bit for bit the weights of one that was not. For the same reason a
finished run can be continued by another cycle: the longer recipe begins with the shorter one.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bac.errors import CorruptArtefact, InvalidInput, Mismatch, sentence
from bac.files import write_whole
from policies.hybrid_network import HybridObservation, PolicyNetwork, network_parts

STATE_FILE = "training.pt"
LOG_FILE = "training_log.csv"
_LOG_COLUMNS = ("step", "loss", "learning_rate", "seconds", "score")
_LOG_EVERY = 20


@dataclass(frozen=True)
class TrainingWindows:
    """Normalised demonstrations and the windows to draw from them; all tensors on the training device.

    Attributes:
        observations: float32[N, Do], every frame; of an image policy its low-dim part.
        actions: float32[N, Da], every frame.
        index: int64[W, T], the frames of each window.
        observation_steps: leading frames of a window that the policy observes (To).
        images: key -> uint8[N, H, W, 3], every frame; empty for a low-dim policy. Kept as bytes, a quarter of float32.
    """

    observations: Tensor
    actions: Tensor
    index: Tensor
    observation_steps: int
    images: Mapping[str, Tensor] = field(default_factory=dict)

    def batch(self, windows: Tensor) -> tuple[Tensor | HybridObservation, Tensor]:
        """Return (observation, actions float32[B, T, Da]) for window numbers int64[B].

        The observation is float32[B, To, Do], or a ``HybridObservation`` where there are images.
        """
        frames = self.index[windows]
        seen = frames[:, : self.observation_steps]
        low_dim, actions = self.observations[seen], self.actions[frames]
        if not self.images:
            return low_dim, actions
        return HybridObservation(low_dim, {key: images[seen] for key, images in self.images.items()}), actions

    def to(self, device: torch.device | str) -> TrainingWindows:
        """Return the same windows on ``device``."""
        observations, actions, index = (each.to(device) for each in (self.observations, self.actions, self.index))
        images = {key: each.to(device) for key, each in self.images.items()}
        return TrainingWindows(observations, actions, index, self.observation_steps, images)


@dataclass(frozen=True)
class TrainingConfig:
    """What decides the resulting weights, besides data and network.

    Attributes:
        cycles: optimiser steps of each cosine cycle (warm restarts, Loshchilov and Hutter 2017, arXiv:1608.03983).
        batch_size: windows per step.
        learning_rate: peak rate of AdamW, reached ``warmup_steps`` into a cycle, then a half cosine to 0.
        warmup_steps: linear warm-up of each cycle, less than the shortest.
        weight_decay: on matrices of the denoiser only, as in the original.
        betas: AdamW moments.
        gradient_clip: largest gradient norm.
        ema_power: EMA decay at step s is ``1 - (1 + s) ** -ema_power``, at most 0.9999.
        precision: ``fp32`` or ``bf16`` autocast; bf16 pays where the processor multiplies it natively (AMX, CUDA).
        seed: of initial weights, windows, time steps and noise.
        encoder_weight_decay: on all weights of an image policy's encoder, as in the original.
        noise_draws: time steps and noises that each window of a step is noised with. An image policy encodes what it
            observes once for all of them: where the encoder is most of the work, more draws cost little.
        scaled_condition: begin as ``DiffusionTransformer.scale_condition`` says, not as the original.
    """

    cycles: tuple[int, ...]
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    gradient_clip: float
    ema_power: float
    precision: str
    seed: int
    encoder_weight_decay: float = 1e-6
    noise_draws: int = 1
    scaled_condition: bool = False

    def __post_init__(self) -> None:
        shortest = min(self.cycles, default=0)
        rules = {
            "warmup_steps": (0 <= self.warmup_steps < shortest, f"0 to below each cycle of {list(self.cycles)}"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "noise_draws": (self.noise_draws >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0, finite"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "encoder_weight_decay": (self.encoder_weight_decay >= 0, "at least 0"),
            "betas": (len(self.betas) == 2 and all(0 <= each < 1 for each in self.betas), "two, from 0 to below 1"),
            "gradient_clip": (self.gradient_clip > 0, "above 0"),
            "ema_power": (self.ema_power > 0, "above 0"),
            "precision": (self.precision in {"fp32", "bf16"}, "fp32 or bf16"),
        }
        for name, (fine, expected) in rules.items():
            if not fine:
                raise InvalidInput(
                    sentence(f"optimiser.{name}", expected=expected, got=getattr(self, name), mend="correct it")
                )

    @property
    def steps(self) -> int:
        """Optimiser steps of all cycles."""
        return sum(self.cycles)

    def rate(self, step: int) -> float:
        """Return the learning rate of step ``step`` in [0, steps)."""
        for cycle in self.cycles:
            if step < cycle:
                break
            step -= cycle
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / (cycle - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def begins_like(self, other: TrainingConfig, steps: int) -> bool:
        """Return whether both recipes give the same weights after ``steps`` steps."""
        same_rates = all(self.rate(step) == other.rate(step) for step in range(steps))
        return same_rates and replace(self, cycles=other.cycles) == other


@dataclass(frozen=True)
class TrainingProgress:
    """What the caller sees after each step: step in [1, steps], loss, rate and seconds since the run began."""

    step: int
    loss: float
    learning_rate: float
    seconds: float


class Trainer:
    """Trains ``network`` in place and keeps an EMA copy; the policy is the EMA copy.

    Args:
        network: freshly initialised, on the training device.
        windows: what to train on, same device.
        alphas_cumprod: float[train steps], the forward process.
        config: the recipe.
        folder: where the training state and log are kept.
        identity: of data and network (``policies.training_identity``); a state of another is not resumed.
    """

    def __init__(
        self,
        network: PolicyNetwork,
        windows: TrainingWindows,
        alphas_cumprod: Tensor,
        config: TrainingConfig,
        folder: Path,
        identity: Mapping[str, str],
    ) -> None:
        self.network = network
        if config.scaled_condition:
            network_parts(network)[0].scale_condition()
        self.ema = deepcopy(network).eval().requires_grad_(False)
        self.config = config
        self.step = 0
        self._windows = windows
        self._device = windows.actions.device
        # Each kind of device draws other numbers from the same seed.
        self._identity = {**identity, "device type": self._device.type}
        alphas = alphas_cumprod.to(self._device, torch.float32)
        self._signal, self._noise = alphas.sqrt(), (1 - alphas).sqrt()
        self._optimizer = torch.optim.AdamW(_parameter_groups(network, config), betas=config.betas, fused=True)
        self._folder = folder
        self._rows: list[dict[str, Any]] = []
        self._seconds = 0.0

    def run(self, until: int | None = None) -> Iterator[TrainingProgress]:
        """Train up to step ``until`` (default: the end), yielding after every step."""
        began = time.monotonic() - self._seconds
        self.network.train()
        for step in range(self.step, self.config.steps if until is None else until):
            rate = self.config.rate(step)
            loss = self._advance(step, rate)
            self.step = step + 1
            self._seconds = time.monotonic() - began
            if self.step % _LOG_EVERY == 0:
                self._rows.append(
                    {"step": self.step, "loss": loss, "learning_rate": rate, "seconds": round(self._seconds, 1)}
                )
            yield TrainingProgress(self.step, loss, rate, self._seconds)

    def note_score(self, score: float) -> None:
        """Record a rollout score of the EMA weights beside the current step."""
        self._rows.append({"step": self.step, "score": score, "seconds": round(self._seconds, 1)})

    @property
    def has_score(self) -> bool:
        """Whether a rollout score of the current step is recorded."""
        return any(row["step"] == self.step and "score" in row for row in self._rows)

    def save(self) -> None:
        """Write training state and log; each replaces its older version only once it is whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "seconds": self._seconds,
            "rows": self._rows,
            "config": asdict(self.config),
            "identity": self._identity,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        write_whole(self._folder / STATE_FILE, lambda path: torch.save(state, path))
        write_whole(self._folder / LOG_FILE, self._write_log)

    def resume(self) -> bool:
        """Continue from the saved state if there is one; return whether there was.

        Raises:
            Mismatch: the saved steps followed another recipe (further cycles are none), or had other data, another
                network or another type of device.
            CorruptArtefact: the state file cannot be read.
        """
        path = self._folder / STATE_FILE
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location=self._device, weights_only=True)
            saved = TrainingConfig(**state["config"])
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, UnpicklingError) as error:
            raise CorruptArtefact(
                sentence(
                    f"training state {path}",
                    expected="a whole file of this version",
                    got=error,
                    mend="delete it to start again",
                )
            ) from error
        if state["step"] > self.config.steps or not self.config.begins_like(saved, state["step"]):
            raise Mismatch(
                sentence(
                    f"training state {path}",
                    expected=asdict(self.config),
                    got=f"{asdict(saved)} at step {state['step']}",
                    mend="give the same overrides or another output folder",
                )
            )
        # A state without an identity is taken as it is, if its weights fit.
        saved_identity = state.get("identity", self._identity)
        if saved_identity != self._identity:
            names = [*dict.fromkeys([*self._identity, *saved_identity])]
            other = [name for name in names if saved_identity.get(name) != self._identity.get(name)]
            raise self._of_another_run(path, ", ".join(other))
        try:
            self.network.load_state_dict(state["network"])
            self.ema.load_state_dict(state["ema"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise self._of_another_run(path, "network") from error
        self.step, self._seconds, self._rows = state["step"], state["seconds"], state["rows"]
        return True

    def _of_another_run(self, path: Path, other: str) -> Mismatch:
        return Mismatch(
            sentence(
                f"training state {path}",
                expected="the data, network and type of device of this run",
                got=f"another {other}",
                mend="give the same task, policy, demonstrations, filter_key and device or another output folder",
            )
        )

    def _advance(self, step: int, rate: float) -> float:
        observations, actions = self._windows.batch(self._window_numbers(step))
        # One copy of the batch after the other, so that the strata below spread a window's time steps.
        actions = actions.repeat(self.config.noise_draws, 1, 1)
        batch = actions.shape[0]
        generator = _generator(self._device, self.config.seed, step)
        # One time step from each of B equal strata: the same expectation as B independent draws, less variance.
        strata = torch.arange(batch, device=self._device) + torch.rand(batch, generator=generator, device=self._device)
        timestep = (strata * (len(self._signal) / batch)).long().clamp_(max=len(self._signal) - 1)
        noise = torch.randn(actions.shape, generator=generator, device=self._device)
        noisy = self._signal[timestep, None, None] * actions + self._noise[timestep, None, None] * noise
        torch.manual_seed(generator.initial_seed())  # crops and dropout, if any
        with self._autocast():
            prediction = self.network(noisy, timestep, self._repeated(observations))
        loss = (prediction.float() - noise).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.gradient_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._average(step)
        value = loss.item()
        if not math.isfinite(value):
            raise InvalidInput(
                sentence(
                    f"loss at step {step}",
                    expected="a finite number",
                    got=value,
                    mend="lower learning_rate; the last saved state is whole",
                )
            )
        return value

    def _repeated(self, observations: Tensor | HybridObservation) -> Tensor | HybridObservation:
        """Return an observation for every noised copy; images are repeated by the network, after its encoder."""
        if isinstance(observations, HybridObservation):
            return observations
        return observations.repeat(self.config.noise_draws, 1, 1)

    def _window_numbers(self, step: int) -> Tensor:
        total, size = len(self._windows.index), min(self.config.batch_size, len(self._windows.index))
        epoch, position = divmod(step, total // size)
        order = torch.randperm(total, generator=_generator("cpu", self.config.seed + 1, epoch))
        return order[position * size : (position + 1) * size].to(self._device)

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with ExitStack() as contexts:
            if self.config.precision == "bf16":
                contexts.enter_context(torch.autocast(self._device.type, torch.bfloat16))
                # On a CPU the fused attention's bf16 backward costs more than all the rest of a step (torch 2.13).
                if self._device.type == "cpu":
                    contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(0.9999, 1 - (1 + step) ** -self.config.ema_power)
        for averaged, current in zip(self.ema.parameters(), self.network.parameters(), strict=True):
            averaged.lerp_(current, 1 - decay)

    def _write_log(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, _LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(self._rows)


def _parameter_groups(network: PolicyNetwork, config: TrainingConfig) -> list[dict[str, Any]]:
    """Decay the denoiser's matrices, leave its biases, norms and positions alone; decay all of the encoder."""
    denoiser, encoder = network_parts(network)
    decayed = [p for p in denoiser.parameters() if p.ndim == 2]
    others = [p for p in denoiser.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if encoder is not None:
        groups.append({"params": list(encoder.parameters()), "weight_decay": config.encoder_weight_decay})
    return groups


def _generator(device: torch.device | str, seed: int, step: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)
