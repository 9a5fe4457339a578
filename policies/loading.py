"""Finding a policy: the ones that ship, by task name, or a checkpoint file of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from bac.errors import InvalidInput, Mismatch, MissingArtefact, sentence
from bac.methods import Method, NoCache, Search, full_schedule
from bac.profile import FeatureProfile
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule
from policies.base import PolicySpec
from policies.checkpoint import PolicyCheckpoint, load_checkpoint
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer
from policies.original_checkpoint import OriginalCheckpoint, read_original_checkpoint
from policies.samplers import DiffusionProcess, ddpm
from policies.vision import ObservationEncoder, VisionConfig

PRETRAINED = Path(__file__).parent / "pretrained"
CHECKPOINT_FILE = "checkpoint.safetensors"
ORIGINAL_SUFFIX = ".ckpt"

Weights = Literal["ema", "raw"]


def load_policy(
    source: str | Path,
    *,
    sampler: Callable[[DiffusionProcess], SamplerTable] = ddpm,
    device: torch.device | str = "cpu",
) -> DiffusionPolicy:
    """Load a policy, uncached.

    Args:
        source: the name of a task whose policy ships (``"push_t"``), or the path of one of our checkpoints.
        sampler: makes the sampler table from the diffusion process the network was trained on.
        device: where it runs.

    Raises:
        MissingArtefact: no such task or file.
        CorruptArtefact: the file cannot be read.
    """
    path = locate_checkpoint(source)
    checkpoint = load_checkpoint(path, device)
    table = sampler(checkpoint.spec.process)
    return DiffusionPolicy(checkpoint, table, schedules=schedule_folder(path, table))


def locate_checkpoint(source: str | Path) -> Path:
    """Return the checkpoint file of a shipped task or of a path.

    Raises:
        MissingArtefact: neither exists.
        InvalidInput: it is a checkpoint of the original diffusion_policy, which must be converted first.
    """
    shipped = PRETRAINED / str(source) / CHECKPOINT_FILE
    if shipped.is_file():
        return shipped
    path = Path(source)
    if path.suffix == ORIGINAL_SUFFIX:
        raise InvalidInput(
            sentence(
                "checkpoint",
                expected="one of ours (.safetensors)",
                got=f"the original's {path.name}",
                mend="convert it with scripts/import_checkpoint.py",
            )
        )
    if not path.is_file():
        tasks = sorted(file.parent.name for file in PRETRAINED.glob(f"*/{CHECKPOINT_FILE}"))
        raise MissingArtefact(
            sentence("checkpoint", expected=f"a file or one of {tasks}", got=str(source), mend="check the name")
        )
    return path


def profile_path(checkpoint: Path, sampler: SamplerTable) -> Path:
    """Return where the feature profile of a checkpoint and sampler lies: beside the checkpoint."""
    return checkpoint.parent / "profiles" / f"{sampler.name}.zarr.zip"


def make_schedule(method: Method, policy: DiffusionPolicy, checkpoint: Path) -> CacheSchedule:
    """Return a method's schedule for a policy: the one calibration kept, else one from the profile.

    Both lie beside the checkpoint; ``none`` needs neither.

    Raises:
        MissingArtefact: the policy was not calibrated for its sampler, or not for this method.
    """
    if isinstance(method, NoCache):
        return full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)
    if isinstance(method, Search):
        kept = schedule_folder(checkpoint, policy.sampler) / f"{method.label}.json"
        if kept.is_file() and (schedule := CacheSchedule.load(kept)).parameters == method.parameters:
            return schedule
    return method.schedule(FeatureProfile.load(profile_path(checkpoint, policy.sampler)))


def schedule_folder(checkpoint: Path, sampler: SamplerTable) -> Path:
    """Return where the named schedules of a checkpoint and sampler lie: beside the checkpoint."""
    return checkpoint.parent / "schedules" / sampler.name


def import_original(
    path: str | Path, *, weights: Weights, task: str, observation: Mapping[str, int], vision: VisionConfig | None = None
) -> PolicyCheckpoint:
    """Convert a ``.ckpt`` of the original diffusion_policy; ``save_checkpoint`` makes it one of ours.

    Args:
        path: the original file; read without trust.
        weights: ``ema`` (what the original evaluates) or ``raw``.
        task: the task it was trained for.
        observation: key -> channels, in the order the observation was concatenated in training.
        vision: which keys are images, and their sizes; None for a low-dim policy. The crop is the checkpoint's.

    Raises:
        Mismatch: the checkpoint observes something else than the task.
        InvalidInput: the observation does not fit, or the diffusion process is not one of ours.
    """
    original = read_original_checkpoint(path, weights=weights)
    diffusion = original.diffusion
    ours = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon", "clip_sample": True}
    stored = {name: getattr(diffusion, name) for name in ours}
    if stored != ours:
        raise InvalidInput(
            sentence(f"diffusion of {path}", expected=ours, got=stored, mend="only this process has a sampler here")
        )
    process = DiffusionProcess(train_steps=diffusion.num_train_timesteps)
    observation, vision, encoder = _original_vision(path, original, observation, vision)
    spec = PolicySpec(task, dict(observation), original.action_steps, original.network_config, process, vision)
    network = DiffusionTransformer(original.network_config)
    network.load_state_dict(original.network)
    training = {"source": str(path), "weights": weights, "diffusion": asdict(diffusion)}
    normalizers = original.normalizers
    return PolicyCheckpoint(
        spec, network.eval().requires_grad_(False), normalizers["obs"], normalizers["action"], training, encoder
    )


def _original_vision(
    path: str | Path, original: OriginalCheckpoint, observation: Mapping[str, int], vision: VisionConfig | None
) -> tuple[Mapping[str, int], VisionConfig | None, ObservationEncoder | None]:
    """Return observation keys, cameras and encoder as the checkpoint has them, under the task's keys."""
    if original.vision is None and vision is None:
        return observation, None, None
    if original.vision is None or vision is None:
        kinds = ("a low-dim policy", "an image policy")
        raise Mismatch(
            sentence(
                f"checkpoint {path}",
                expected=f"{kinds[vision is not None]}, as the task is",
                got=kinds[original.vision is not None],
                mend="choose the task that it was trained for",
            )
        )
    found = original.vision.renamed(observation, vision.images)
    encoder = ObservationEncoder(found.observation, found.config)
    encoder.load_state_dict(found.encoder)
    return found.observation, found.config, encoder.eval().requires_grad_(False)
