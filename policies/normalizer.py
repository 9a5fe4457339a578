"""Limits normaliser: each channel's demonstration range maps into [-1, 1] (diffusion_policy, mode ``limits``)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from bac.errors import InvalidInput, sentence

_CONSTANT_RANGE = 1e-4
"""A channel that moves less than this in the demonstrations is constant (the original's ``range_eps``)."""


@dataclass(frozen=True)
class LimitsNormalizer:
    """``normalize`` and ``unnormalize`` are exact inverses of each other: ``y = x * scale + offset``.

    Attributes:
        scale: float32[C], output units per input unit, finite and not zero.
        offset: float32[C], output units.
    """

    scale: Tensor
    offset: Tensor

    def __post_init__(self) -> None:
        same_shape = self.scale.ndim == 1 and self.scale.shape == self.offset.shape
        if not same_shape:
            raise InvalidInput(
                sentence(
                    "normaliser statistics",
                    expected="scale and offset as two vectors of one length",
                    got=f"{tuple(self.scale.shape)} and {tuple(self.offset.shape)}",
                    mend="fit the normaliser again or use another checkpoint",
                )
            )
        finite = torch.isfinite(self.scale).all() and torch.isfinite(self.offset).all()
        if not finite or (self.scale == 0).any():
            raise InvalidInput(
                sentence(
                    "normaliser statistics",
                    expected="finite values and scales other than zero",
                    got=f"scale {self.scale.tolist()}, offset {self.offset.tolist()}",
                    mend="remove NaN and infinite frames from the demonstrations and fit again",
                )
            )

    @classmethod
    def fit(cls, values: np.ndarray, name: str, least_range: float = 0.0) -> Self:
        """Fit on ``values`` float[N, C].

        Args:
            values: all demonstration frames of one modality.
            name: what the channels are; used in the error text.
            least_range: what a channel's range counts at least, as a share of the widest channel's, in [0, 1]. A hand
                that points down hardly turns about two axes: stretched to [-1, 1], its noise would be all a network
                sees of them. 0 is the original's mode ``limits``; 1 scales all alike, as its robomimic normaliser does.

        Raises:
            InvalidInput: a value is not finite, or a channel is constant. The original maps constant channels to 0,
                which silently hides a dead sensor; a robot's owner wants to know.
        """
        if not np.isfinite(values).all():
            raise InvalidInput(
                sentence(
                    f"demonstration {name}",
                    expected="finite values",
                    got=f"{int((~np.isfinite(values)).sum())} that are NaN or infinite",
                    mend="clean the demonstrations",
                )
            )
        lowest, highest = values.min(axis=0).astype(np.float32), values.max(axis=0).astype(np.float32)
        constant = np.flatnonzero(highest - lowest < _CONSTANT_RANGE)
        if constant.size:
            raise InvalidInput(
                sentence(
                    f"demonstration {name}",
                    expected=f"every channel to move by at least {_CONSTANT_RANGE}",
                    got=f"constant channels {constant.tolist()}",
                    mend="drop them from the task's observation keys",
                )
            )
        ranges = np.maximum(highest - lowest, np.float32(least_range) * (highest - lowest).max(initial=0))
        scale = torch.from_numpy(2.0 / ranges)
        # A widened range reaches as far below the demonstrations as above them.
        begin = lowest - (ranges - (highest - lowest)) / 2
        return cls(scale, -1.0 - scale * torch.from_numpy(begin))

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self.scale.shape[0]

    def normalize(self, values: Tensor) -> Tensor:
        """Map float[..., C] in task units to float[..., C] in about [-1, 1]."""
        return values * self.scale + self.offset

    def unnormalize(self, values: Tensor) -> Tensor:
        """Map float[..., C] in normalised units back to task units."""
        return (values - self.offset) / self.scale

    def to(self, device: torch.device | str) -> LimitsNormalizer:
        """Return the same normaliser with its statistics on ``device``."""
        return LimitsNormalizer(self.scale.to(device), self.offset.to(device))
