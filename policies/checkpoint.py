"""Our checkpoints: one safetensors file with weights, normaliser statistics and the policy's specification."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from bac.errors import BacError, CorruptArtefact, MissingArtefact, sentence
from bac.files import write_whole
from policies.base import PolicySpec
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.normalizer import LimitsNormalizer
from policies.samplers import DiffusionProcess
from policies.vision import ObservationEncoder, VisionConfig

_FORMAT = "bac-policy-1"
_NETWORK = "network."
_ENCODER = "encoder."
_MASKS = {"mask", "memory_mask"}
"""Buffers the configuration gives; -inf in them is no sign of damage, so they are not stored."""


@dataclass(frozen=True)
class PolicyCheckpoint:
    """A trained policy.

    Attributes:
        spec: what it takes and gives.
        network: the denoiser, float32, in evaluation mode, frozen.
        observation_normalizer: of the concatenated low-dim observation, Do channels without images.
        action_normalizer: of one action, Da channels.
        training: how it came about (free-form, for people).
        encoder: of an image policy, float32, in evaluation mode, frozen; else None.
    """

    spec: PolicySpec
    network: DiffusionTransformer
    observation_normalizer: LimitsNormalizer
    action_normalizer: LimitsNormalizer
    training: Mapping[str, Any]
    encoder: ObservationEncoder | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the weights as float32, the encoder's included; schedules and profiles name it."""
        total = hashlib.sha256()
        encoder = _encoder_weights(self)
        for name, tensor in [*sorted(self.network.state_dict().items()), *sorted(encoder.items())]:
            total.update(name.encode())
            total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()


def save_checkpoint(checkpoint: PolicyCheckpoint, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint.

    Args:
        checkpoint: what to write.
        path: the ``.safetensors`` file.
        dtype: storage of the weights; float16 halves the file. Calibrate what is loaded from the file, not what was
            trained: the digest is of the rounded weights.
    """
    tensors = {
        _NETWORK + name: tensor.to(dtype).contiguous()
        for name, tensor in checkpoint.network.state_dict().items()
        if name not in _MASKS
    }
    tensors |= {name: tensor.to(dtype).contiguous() for name, tensor in _encoder_weights(checkpoint).items()}
    for part, normalizer in _normalizers(checkpoint).items():
        tensors |= {f"{part}.scale": normalizer.scale, f"{part}.offset": normalizer.offset}
    metadata = {
        "format": _FORMAT,
        "spec": json.dumps(asdict(checkpoint.spec)),
        "training": json.dumps(dict(checkpoint.training)),
    }
    write_whole(path, lambda partial: save_file(tensors, partial, metadata))


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu") -> PolicyCheckpoint:
    """Read a checkpoint written by ``save_checkpoint``. Nothing in the file is executed.

    Raises:
        MissingArtefact: no such file.
        CorruptArtefact: truncated, foreign, a tensor missing or too many, of another shape, or with NaN.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingArtefact(
            sentence("checkpoint", expected=f"a file {path}", got="none", mend="check the path or run scripts/train.py")
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("format") != _FORMAT:
            raise KeyError(f"format {metadata.get('format')!r}")
        spec = _spec(json.loads(metadata["spec"]))
        network = _network(spec.network, tensors)
        encoder = _encoder(spec, tensors)
        parts = {part: _normalizer(part, tensors) for part in _PARTS}
        training = json.loads(metadata["training"])
    except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError, BacError) as error:
        raise CorruptArtefact(
            sentence(
                f"checkpoint {path}",
                expected=f"a whole {_FORMAT} file",
                got=f"{type(error).__name__} {' '.join(str(error).split())}",
                mend="copy or train it again",
            )
        ) from error
    normalizers = {part: normalizer.to(device) for part, normalizer in parts.items()}
    return PolicyCheckpoint(
        spec,
        network.to(device),
        normalizers["observation"],
        normalizers["action"],
        training,
        None if encoder is None else encoder.to(device),
    )


_PARTS = ("observation", "action")


def _normalizers(checkpoint: PolicyCheckpoint) -> dict[str, LimitsNormalizer]:
    return dict(zip(_PARTS, (checkpoint.observation_normalizer, checkpoint.action_normalizer), strict=True))


def _normalizer(part: str, tensors: dict[str, Tensor]) -> LimitsNormalizer:
    # Copies, for a tensor of the file's own memory keeps the whole file mapped.
    scale, offset = (tensors[f"{part}.{name}"].to(torch.float32, copy=True) for name in ("scale", "offset"))
    return LimitsNormalizer(scale, offset)


def _spec(document: dict[str, Any]) -> PolicySpec:
    network = DiffusionTransformerConfig(**document.pop("network"))
    stored = document.pop("vision", None)
    vision = None
    if stored is not None:
        images = {key: (height, width) for key, (height, width) in stored["images"].items()}
        vision = VisionConfig(images, tuple(stored["crop"]))
    return PolicySpec(network=network, process=DiffusionProcess(**document.pop("process")), vision=vision, **document)


def _network(config: DiffusionTransformerConfig, tensors: dict[str, Tensor]) -> DiffusionTransformer:
    network = DiffusionTransformer(config)
    weights = _finite(tensors, _NETWORK)
    masks = {name: buffer for name, buffer in network.named_buffers() if name in _MASKS}
    network.load_state_dict(weights | masks)
    return network.eval().requires_grad_(False)


def _encoder_weights(checkpoint: PolicyCheckpoint) -> dict[str, Tensor]:
    # Parameters, each once: the state dict has most of them under two names, and buffers that the sizes give.
    parameters = {} if checkpoint.encoder is None else dict(checkpoint.encoder.named_parameters())
    return {_ENCODER + name: parameter.detach() for name, parameter in parameters.items()}


def _encoder(spec: PolicySpec, tensors: dict[str, Tensor]) -> ObservationEncoder | None:
    weights = _finite(tensors, _ENCODER)
    if spec.vision is None and not weights:
        return None
    if spec.vision is None:
        raise KeyError("encoder weights of a low-dim policy")
    encoder = ObservationEncoder(spec.observation, spec.vision)
    differing = weights.keys() ^ dict(encoder.named_parameters()).keys()
    if differing:
        raise KeyError(f"encoder weights missing or too many: {sorted(differing)[:3]}")
    encoder.load_state_dict(weights, strict=False)
    return encoder.eval().requires_grad_(False)


def _finite(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    damaged = sorted(name for name, tensor in weights.items() if not torch.isfinite(tensor).all())
    if damaged:
        raise KeyError(f"NaN or infinite weights in {damaged}")
    return weights
