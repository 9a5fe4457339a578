"""Finding a policy: the ones that ship, by task name, or a checkpoint file of the user's, ours or an original one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from bac.device import usable_device
from bac.errors import CorruptArtefact, InvalidInput, Mismatch, MissingArtefact, sentence
from bac.methods import Method, NoCache, Search, full_schedule
from bac.profile import FeatureProfile
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule
from policies.base import PolicySpec
from policies.checkpoint import PolicyCheckpoint, load_checkpoint
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer
from policies.original_checkpoint import OriginalCheckpoint, OriginalDiffusion, Weights, read_original_checkpoint
from policies.original_task import OriginalTask
from policies.original_vision import OriginalVision
from policies.samplers import DiffusionProcess, ddpm
from policies.vision import ObservationEncoder

PRETRAINED = Path(__file__).parent / "pretrained"
CHECKPOINT_FILE = "checkpoint.safetensors"
ORIGINAL_SUFFIX = ".ckpt"
CALIBRATION_SUFFIX = ".calibration"


def load_policy(
    source: str | Path,
    *,
    sampler: Callable[[DiffusionProcess], SamplerTable] = ddpm,
    device: torch.device | str = "cpu",
    weights: Weights | str | None = None,
) -> DiffusionPolicy:
    """Load a policy, uncached.

    Args:
        source: the name of a task whose policy ships (``"push_t"``), or the path of a checkpoint: one of ours or a
            ``.ckpt`` of the original diffusion_policy, which is read without trust.
        sampler: makes the sampler table from the diffusion process the network was trained on.
        device: where it runs.
        weights: of an original checkpoint: ``ema``, ``raw``, or None for those that the original evaluates. What was
            loaded is ``policy.checkpoint.training["weights"]``.

    Raises:
        MissingArtefact: no such task or file, or a file without the weights asked for.
        CorruptArtefact: the file cannot be read.
        Mismatch: an original policy that is none of ours.
        InvalidInput: weights of a checkpoint that has one set of them, a diffusion process or a task without a sampler
            or an environment here, or an unknown device.
        Unavailable: this machine does not have the device.
    """
    device = usable_device(device)
    path = locate_checkpoint(source)
    if path.suffix == ORIGINAL_SUFFIX:
        checkpoint = import_original(path, weights=weights, device=device)
        # Several lie in one folder, each with two sets of weights.
        artefacts = path.with_name(path.name + CALIBRATION_SUFFIX) / checkpoint.training["weights"]
    elif weights is not None:
        raise InvalidInput(
            sentence(
                "weights", expected="null for a checkpoint of ours", got=weights, mend="only an original .ckpt has two"
            )
        )
    else:
        checkpoint, artefacts = load_checkpoint(path, device), path.parent
    return DiffusionPolicy(checkpoint, sampler(checkpoint.spec.process), artefacts=artefacts)


def locate_checkpoint(source: str | Path) -> Path:
    """Return the checkpoint file of a shipped task or of a path.

    Raises:
        MissingArtefact: neither exists.
    """
    shipped = PRETRAINED / str(source) / CHECKPOINT_FILE
    if shipped.is_file():
        return shipped
    path = Path(source)
    if not path.is_file():
        tasks = sorted(file.parent.name for file in PRETRAINED.glob(f"*/{CHECKPOINT_FILE}"))
        inside = path / CHECKPOINT_FILE
        own = f"give checkpoint={inside}" if inside.is_file() else "give checkpoint=PATH of one that you trained"
        raise MissingArtefact(
            sentence("checkpoint", expected=f"a file, or a task of the shipped {tasks}", got=str(source), mend=own)
        )
    return path


def bank_folder(policy: DiffusionPolicy) -> Path:
    """Return where the schedule bank of a loaded policy lies: beside the checkpoint."""
    return _of_a_file(policy.artefacts) / "bank"


def profile_path(policy: DiffusionPolicy) -> Path:
    """Return where the feature profile of a loaded policy lies: beside the checkpoint, a file per sampler."""
    return _of_a_file(policy.artefacts) / "profiles" / f"{policy.sampler.name}.zarr.zip"


def schedule_path(policy: DiffusionPolicy, label: str) -> Path:
    """Return where a schedule of a loaded policy lies: beside the checkpoint, in a folder per sampler."""
    return _of_a_file(policy.schedules) / f"{label}.json"


def make_schedule(method: Method, policy: DiffusionPolicy) -> CacheSchedule:
    """Return a method's schedule for a loaded policy: the one calibration kept, else one from the profile.

    Both lie beside the checkpoint; ``none`` needs neither.

    Raises:
        MissingArtefact: the policy was not calibrated for its sampler, or not for this method.
    """
    if isinstance(method, NoCache):
        return full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)
    kept = kept_schedule(method, policy) if isinstance(method, Search) else None
    return method.schedule(FeatureProfile.load(profile_path(policy))) if kept is None else kept


def kept_schedule(method: Search, policy: DiffusionPolicy) -> CacheSchedule | None:
    """Return the schedule that calibration found by trials with exactly these parameters; None if there is none."""
    path = schedule_path(policy, method.label)
    schedule = CacheSchedule.load(path) if path.is_file() else None
    return schedule if schedule is not None and schedule.parameters == method.parameters else None


def require_free(method: Method, policy: DiffusionPolicy) -> None:
    """Refuse if a method's schedule would replace one that was made with other parameters for the same checkpoint.

    A label names the budget alone, so that methods of one budget share a file. What was made for another checkpoint or
    sampler, or cannot be read, serves nobody and is not in the way.

    Raises:
        Mismatch: it does.
    """
    path = schedule_path(policy, method.label)
    try:
        kept = CacheSchedule.load(path)
    except (MissingArtefact, CorruptArtefact, InvalidInput):
        return
    asked, found = method.parameters, kept.parameters
    other = sorted(name for name in asked.keys() | found.keys() if asked.get(name) != found.get(name))
    if other and kept.provenance == policy.provenance:
        expected, got = (", ".join(f"{name}={each.get(name)}" for name in other) for each in (asked, found))
        raise Mismatch(
            sentence(
                f"kept schedule {path}",
                expected=f"one made with {expected}",
                got=got,
                mend="delete it, or run scripts/calibrate.py with overwrite=true",
            )
        )


def import_original(
    path: str | Path,
    *,
    weights: Weights | str | None,
    task: OriginalTask | None = None,
    device: torch.device | str = "cpu",
) -> PolicyCheckpoint:
    """Convert a ``.ckpt`` of the original diffusion_policy; ``save_checkpoint`` makes it one of ours.

    Args:
        path: the original file; read without trust.
        weights: ``ema``, ``raw``, or None for those that the original evaluates.
        task: what it was trained for; None takes it from the file.
        device: where the network shall lie.

    Raises:
        MissingArtefact: no such file or weights.
        CorruptArtefact: the file cannot be read.
        Mismatch: the policy is none of ours, the file says that it is of another task, or the task has other images.
        InvalidInput: the observation does not fit, the file's task is unknown and none is given, or the diffusion
            process is not one of ours.
    """
    original = read_original_checkpoint(path, weights=weights)
    process = _process(path, original.diffusion)
    known = _task(path, original, task)
    vision = _vision(path, original, known)
    network = DiffusionTransformer(original.network_config)
    network.load_state_dict(original.network)
    encoder = None
    if vision is not None:
        encoder = ObservationEncoder(vision.observation, vision.config)
        encoder.load_state_dict(vision.encoder)
        encoder = encoder.eval().requires_grad_(False).to(device)
    spec = PolicySpec(
        known.name,
        dict(known.observation if vision is None else vision.observation),
        original.action_steps,
        original.network_config,
        process,
        None if vision is None else vision.config,
    )
    training = {"source": str(path), "weights": str(original.weights), "diffusion": asdict(original.diffusion)}
    observation, action = (original.normalizers[key].to(device) for key in ("obs", "action"))
    return PolicyCheckpoint(
        spec, network.eval().requires_grad_(False).to(device), observation, action, training, encoder
    )


def _of_a_file(folder: Path | None) -> Path:
    if folder is None:
        raise MissingArtefact(
            sentence("policy", expected="one loaded from a file", got="one made in memory", mend="save and load it")
        )
    return folder


def _process(path: str | Path, diffusion: OriginalDiffusion) -> DiffusionProcess:
    ours: Mapping[str, tuple[object, ...]] = {
        "beta_schedule": ("squaredcos_cap_v2",),
        "prediction_type": ("epsilon",),
        "clip_sample": (True,),
        # Both draw with the same variance; None is DDIM's, which draws nothing.
        "variance_type": ("fixed_small", "fixed_small_log", None),
    }
    other = {name: getattr(diffusion, name) for name, known in ours.items() if getattr(diffusion, name) not in known}
    if other:
        expected = {name: ours[name][0] for name in other}
        raise InvalidInput(
            sentence(f"diffusion of {path}", expected=expected, got=other, mend="only this process has a sampler here")
        )
    return DiffusionProcess(train_steps=diffusion.num_train_timesteps)


def _task(path: str | Path, original: OriginalCheckpoint, given: OriginalTask | None) -> OriginalTask:
    stated = original.task
    if given is None:
        if stated is None:
            raise InvalidInput(
                sentence(
                    f"task of {path}",
                    expected="Push-T or one of robomimic's in its configuration",
                    got="another",
                    mend="convert it with scripts/import_checkpoint.py and a task configuration of yours",
                )
            )
        return stated
    if stated is not None and stated != given:
        mend = "correct task.observation and task.images" if stated.name == given.name else f"give task={stated.name}"
        raise Mismatch(sentence(f"checkpoint {path}", expected=f"task {given}", got=stated, mend=mend))
    # The file knows the order in which training joined the keys.
    return given if stated is None else stated


def _vision(path: str | Path, original: OriginalCheckpoint, task: OriginalTask) -> OriginalVision | None:
    """Return what an image policy has beside its denoiser, under the task's keys."""
    if original.vision is not None and task.images:
        return original.vision.renamed(task.observation, task.images)
    if original.vision is not None or task.images:
        kinds = ("a low-dim policy", "an image policy")
        raise Mismatch(
            sentence(
                f"checkpoint {path}",
                expected=f"{kinds[bool(task.images)]}, as the task is",
                got=kinds[original.vision is not None],
                mend="choose the task that it was trained for",
            )
        )
    return None
