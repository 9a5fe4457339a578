"""The image part of an original checkpoint: ``shape_meta``, crop and encoder weights of a hybrid image policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bac.errors import InvalidInput, Mismatch, sentence
from policies.original_config import OriginalConfig
from policies.restricted_archive import TensorRef, TorchArchive, corrupt
from policies.vision import IMAGE_FEATURES, ObservationEncoder, VisionConfig

ENCODER = "obs_encoder."

_SWITCHES = ("policy.obs_encoder_group_norm", "policy.eval_fixed_crop")
"""What must be true, as in all published configurations: our encoder is that variant. Left out they are false."""

_IMAGE_UNITS = {"scale": 2.0, "offset": -1.0}
"""The original's normaliser of images: [0, 1] to [-1, 1]."""


@dataclass(frozen=True)
class OriginalVision:
    """What an image policy has beside its denoiser.

    Attributes:
        observation: key -> channels of the observation token, in the payload's order.
        config: which keys are images, and their sizes.
        encoder: state dict on the CPU; loads strictly into ``ObservationEncoder(observation, config)``.
    """

    observation: Mapping[str, int]
    config: VisionConfig
    encoder: dict[str, Tensor]

    @property
    def low_dim(self) -> Mapping[str, int]:
        """The keys that are no images, in order, with their channels."""
        return {key: size for key, size in self.observation.items() if key not in self.config.images}

    def renamed(self, task: Mapping[str, int], images: Mapping[str, tuple[int, int]]) -> OriginalVision:
        """Return the same under the keys of a task.

        Equal keys stay in the payload's order, which the weights know; others are matched one by one, in order.

        Args:
            task: key -> channels of the task's observation token.
            images: key -> (height, width) of the task's images.

        Raises:
            Mismatch: the task observes something else.
        """
        same_keys = task.keys() == self.observation.keys()
        names = dict(zip(self.observation, self.observation if same_keys else task, strict=False))
        theirs = {name: (self.observation[key], self.config.images.get(key)) for key, name in names.items()}
        ours = {key: (size, images.get(key)) for key, size in task.items()}
        if theirs != ours or len(names) != len(self.observation):
            raise Mismatch(
                sentence(
                    "observation of the original checkpoint",
                    expected=f"as the task: {dict(task)} with images {dict(images)}",
                    got=f"{dict(self.observation)} with images {dict(self.config.images)}",
                    mend="choose the task that it was trained for, or correct task.observation and task.images",
                )
            )
        return OriginalVision(
            {names[key]: size for key, size in self.observation.items()},
            VisionConfig({names[key]: size for key, size in self.config.images.items()}, self.config.crop),
            {_renamed(name, names): value for name, value in self.encoder.items()},
        )


def read_vision(archive: TorchArchive, config: OriginalConfig, policy: Mapping[str, TensorRef]) -> OriginalVision:
    """Read what the configuration and the policy's state dict say of images.

    Raises:
        CorruptArtefact: the configuration lacks a value, or weights are not finite.
        Mismatch: the encoder is another than ours.
    """
    for switch in _SWITCHES:
        if config.stated(switch) is not True:
            raise config.foreign(f"cfg.{switch}=True", config.stated(switch))
    observation, vision = _sizes(config)
    with torch.device("meta"):
        expected = ObservationEncoder(observation, vision).state_dict()
    held = {name.removeprefix(ENCODER): ref for name, ref in policy.items() if name.startswith(ENCODER)}
    if held.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - held.keys()), sorted(held.keys() - expected.keys())
        raise config.foreign("the weight names of our encoder", f"missing {missing[:3]}, extra {extra[:3]}")
    for name, value in expected.items():
        if held[name].size != tuple(value.shape):
            raise config.foreign(f"{ENCODER}{name} {list(value.shape)}", list(held[name].size))
    weights = {name: archive.tensor(ENCODER + name, ref).float() for name, ref in held.items()}
    damaged = sorted(name for name, value in weights.items() if not torch.isfinite(value).all())
    if damaged:
        raise corrupt(config.path, "finite encoder weights", f"NaN or infinity in {damaged[:3]}")
    # Built only now, so that no more is allocated than the file holds.
    with torch.random.fork_rng(devices=[]):
        fresh = ObservationEncoder(observation, vision)
    for name, buffer in fresh.named_buffers():
        if not torch.allclose(weights[name], buffer):
            raise config.foreign(f"{ENCODER}{name} as robomimic makes it", "other values")
    # Most weights are there under two names; what was loaded last must be what the first one said.
    fresh.load_state_dict(weights)
    differing = sorted(name for name, value in fresh.state_dict().items() if not torch.equal(value, weights[name]))
    if differing:
        raise corrupt(config.path, "equal weights under both names of a layer", f"others in {differing[:3]}")
    for key in vision.images:
        _require_image_units(archive, config, policy, key)
    return OriginalVision(observation, vision, weights)


def _sizes(config: OriginalConfig) -> tuple[dict[str, int], VisionConfig]:
    """Read ``shape_meta`` and ``crop_shape``."""
    observation: dict[str, int] = {}
    images: dict[str, tuple[int, int]] = {}
    try:
        for key, entry in config.stated("policy.shape_meta")["obs"].items():
            shape, kind = [int(size) for size in entry["shape"]], entry.get("type", "low_dim")
            if kind == "rgb" and len(shape) == 3 and shape[0] == 3:
                observation[key], images[key] = IMAGE_FEATURES, (shape[1], shape[2])
            elif kind == "low_dim" and len(shape) == 1:
                observation[key] = shape[0]
            else:
                raise config.foreign(f"shape_meta.obs.{key} of type rgb [3, H, W] or low_dim [n]", f"{kind} {shape}")
        height, width = config.stated("policy.crop_shape")
        return observation, VisionConfig(images, (int(height), int(width)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, Mismatch):
            raise
        if isinstance(error, InvalidInput):
            raise config.foreign("images that are larger than crop_shape", f"{images}") from error
        raise corrupt(config.path, "cfg.policy.shape_meta and crop_shape", f"{type(error).__name__} {error}") from error


def _require_image_units(
    archive: TorchArchive, config: OriginalConfig, policy: Mapping[str, TensorRef], key: str
) -> None:
    for part, ours in _IMAGE_UNITS.items():
        name = f"normalizer.params_dict.{key}.{part}"
        if name not in policy:
            raise config.foreign(f"a tensor {name}", "none")
        value = archive.tensor(name, policy[name])
        if not (value == ours).all():
            raise config.foreign(f"{name} = {ours}", value.flatten()[:3].tolist())


def _renamed(name: str, names: Mapping[str, str]) -> str:
    nets, key, rest = name.split(".", 2)
    return ".".join((nets, names[key], rest))
