"""The hybrid observation encoder: camera images to features, joined with the low-dim observation.

Per camera, as robomimic's ``VisualCore`` under diffusion_policy's hybrid image policies (Mandlekar et al., arXiv
2108.03298; Chi et al., arXiv 2303.04137)::

    image [3, H, W] in [-1, 1] -> crop (random in training, central otherwise) -> ResNet-18, GroupNorm for BatchNorm
      -> 32 keypoints by spatial softmax -> linear -> 64 features -> ReLU

Parameter names are those of ``robomimic.models.obs_nets.ObservationEncoder``, so original checkpoints load strictly.
It is not that class itself: robomimic would bring its simulators onto the robot, and imports torchvision, which fails
beside any torch of another build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bac.errors import InvalidInput, sentence

IMAGE_FEATURES = 64
"""Channels that one image contributes to an observation token."""

_KEYPOINTS = 32
_LAYERS = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
"""ResNet-18's four layers: channels in, channels out, stride of the first of two blocks."""
_TOTAL_STRIDE = 32


@dataclass(frozen=True)
class VisionConfig:
    """What the cameras give and what of it the network sees.

    Attributes:
        images: observation key -> (height, width), pixels.
        crop: (height, width), pixels, smaller than every image and above 32: of less the network keeps one place, and
            where in the image something is seen is all that its spatial softmax tells.
    """

    images: Mapping[str, tuple[int, int]]
    crop: tuple[int, int]

    def __post_init__(self) -> None:
        height, width = self.crop
        smaller = all(height < h and width < w for h, w in self.images.values())
        if not self.images or not smaller or min(self.crop) <= _TOTAL_STRIDE:
            raise InvalidInput(
                sentence(
                    "task.crop",
                    expected=f"height and width from 33 to below those of every image in {dict(self.images)}",
                    got=list(self.crop),
                    mend="correct task.crop or task.images",
                )
            )


class ObservationEncoder(nn.Module):
    """Turns images and the low-dim observation into observation tokens.

    Args:
        observation: key -> channels of the token, in their order; ``IMAGE_FEATURES`` for an image.
        vision: which keys are images, and their sizes.
    """

    def __init__(self, observation: Mapping[str, int], vision: VisionConfig) -> None:
        super().__init__()
        self.vision = vision
        self._channels = dict(observation)
        self.obs_nets = nn.ModuleDict({key: _VisualCore(vision.crop) for key in observation if key in vision.images})

    def forward(self, low_dim: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        """Encode.

        Args:
            low_dim: float[B, To, L], normalised, keys in order.
            images: key -> uint8[B, To, H, W, 3], or float[B, To, 3, H, W] in [0, 1].

        Returns:
            float[B, To, Do].
        """
        sizes = [size for key, size in self._channels.items() if key not in self.obs_nets]
        rest = iter(torch.split(low_dim, sizes, dim=-1))
        return torch.cat(
            [self._features(key, images[key]) if key in self.obs_nets else next(rest) for key in self._channels], dim=-1
        )

    def _features(self, key: str, images: Tensor) -> Tensor:
        flat = signed_images(images).flatten(0, 1)
        cropped = random_crop(flat, self.vision.crop) if self.training else central_crop(flat, self.vision.crop)
        # robomimic's encoder applies this one to what each of its networks gives.
        return F.relu(self.obs_nets[key](cropped)).reshape(*images.shape[:2], IMAGE_FEATURES)


def signed_images(images: Tensor) -> Tensor:
    """Return float[..., 3, H, W] in [-1, 1], as the original normalises images.

    Args:
        images: uint8[..., H, W, 3], or float[..., 3, H, W] in [0, 1].
    """
    if images.dtype == torch.uint8:
        images = images.movedim(-1, -3).float() / 255
    return images * 2 - 1


def random_crop(images: Tensor, crop: tuple[int, int]) -> Tensor:
    """Cut a piece of size ``crop`` out of each of float[N, 3, H, W], each at a place of its own.

    As in the original, the last row and column of places is never drawn.
    """
    (height, width), (rows, columns) = images.shape[-2:], crop
    # Drawn on the CPU, so that a seed means the same places on every device.
    place = (torch.rand(2, len(images)) * torch.tensor([[height - rows], [width - columns]])).long().to(images.device)
    row = place[0, :, None] + torch.arange(rows, device=images.device)
    column = place[1, :, None] + torch.arange(columns, device=images.device)
    which = torch.arange(len(images), device=images.device)
    return images[which[:, None, None], :, row[:, :, None], column[:, None, :]].movedim(-1, 1)


def central_crop(images: Tensor, crop: tuple[int, int]) -> Tensor:
    """Cut the middle of size ``crop`` out of each of float[N, 3, H, W]; of odd margins as torchvision rounds them."""
    top, left = (round((size - kept) / 2) for size, kept in zip(images.shape[-2:], crop, strict=True))
    return images[..., top : top + crop[0], left : left + crop[1]]


class _VisualCore(nn.Module):
    def __init__(self, crop: tuple[int, int]) -> None:
        super().__init__()
        height, width = (-(-size // _TOTAL_STRIDE) for size in crop)
        self.backbone = _ResNet18()
        self.pool = _SpatialSoftmax(_LAYERS[-1][1], height, width)
        # The original's state dict has backbone and pool twice: by name and by number.
        self.nets = nn.Sequential(self.backbone, self.pool, nn.Flatten(), nn.Linear(2 * _KEYPOINTS, IMAGE_FEATURES))

    def forward(self, images: Tensor) -> Tensor:
        return self.nets(images)


class _ResNet18(nn.Module):
    """He et al., arXiv 1512.03385, without pooling and classifier; initialised as torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            _norm(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
            *(
                nn.Sequential(_ResidualBlock(before, after, stride), _ResidualBlock(after, after, 1))
                for before, after, stride in _LAYERS
            ),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.nets(images)


class _ResidualBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.bn1 = _norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = _norm(after)
        self.downsample: nn.Module | None = None
        if (before, stride) != (after, 1):
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), _norm(after))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + shortcut)


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 16, channels)


class _SpatialSoftmax(nn.Module):
    """The expected place, in [-1, 1], of each of 32 learned features (Finn et al., arXiv 1509.06113)."""

    temperature: Tensor
    pos_x: Tensor
    pos_y: Tensor

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(channels, _KEYPOINTS, 1)
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        self.register_buffer("temperature", torch.ones(1))
        self.register_buffer("pos_x", columns.repeat(height)[None])
        self.register_buffer("pos_y", rows.repeat_interleave(width)[None])

    def forward(self, features: Tensor) -> Tensor:
        attention = (self.nets(features).flatten(2) / self.temperature).softmax(dim=-1)
        return torch.stack([(self.pos_x * attention).sum(-1), (self.pos_y * attention).sum(-1)], dim=-1)
