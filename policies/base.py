"""What a policy takes and gives: an observation dict in, an action chunk out.

Index semantics, drawn once (observation steps To = 2, action steps Ta = 8, horizon T = 16; the robot is at step t)::

    step               t-1    t   t+1  ...  t+7  t+8 ... t+14
    observation         o     o
    predicted chunk     a0    a1   a2  ...   a8   a9 ...  a15      float[B, T, Da]
    executed chunk            a1   a2  ...   a8                    float[B, Ta, Da]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bac.errors import InvalidInput, sentence
from policies.diffusion_transformer import DiffusionTransformerConfig
from policies.samplers import DiffusionProcess
from policies.vision import IMAGE_FEATURES, VisionConfig

_BRIGHTEST = 1 + 1e-3
"""Of a float image: resizing overshoots 1 by a rounding error, forgetting to divide by 255 by far more."""


@dataclass(frozen=True)
class PolicySpec:
    """Everything about a policy but its weights.

    Attributes:
        task: name of the task it was trained for.
        observation: key -> number of channels of the observation token, in the order in which they are concatenated;
            an image counts with the ``IMAGE_FEATURES`` that the encoder makes of it.
        action_steps: actions of a chunk that are executed (Ta), at most T - To + 1.
        network: sizes of the denoiser.
        process: the diffusion process it was trained on.
        vision: which keys are images, and their sizes; None for a low-dim policy.
    """

    task: str
    observation: Mapping[str, int]
    action_steps: int
    network: DiffusionTransformerConfig
    process: DiffusionProcess
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        channels = sum(self.observation.values())
        if channels != self.network.observation_dim:
            raise InvalidInput(
                sentence(
                    "observation keys",
                    expected=f"{self.network.observation_dim} channels as the network",
                    got=f"{dict(self.observation)}, {channels} in all",
                    mend="correct the task's observation",
                )
            )
        strange = {
            key: self.observation.get(key) for key in self._images if self.observation.get(key) != IMAGE_FEATURES
        }
        if strange:
            raise InvalidInput(
                sentence(
                    "task.images",
                    expected=f"keys of task.observation with {IMAGE_FEATURES} channels each",
                    got=strange,
                    mend="name every image in both",
                )
            )
        longest = self.network.horizon - self.network.observation_steps + 1
        if not 1 <= self.action_steps <= longest:
            raise InvalidInput(
                sentence(
                    "action_steps", expected=f"1 to {longest}", got=self.action_steps, mend="choose one in that range"
                )
            )

    @property
    def executed(self) -> slice:
        """The part of a predicted chunk that is executed; it starts at the newest observation's step."""
        first = self.network.observation_steps - 1
        return slice(first, first + self.action_steps)

    @property
    def low_dim(self) -> Mapping[str, int]:
        """The keys that are no images, in order, with their channels."""
        return {key: size for key, size in self.observation.items() if key not in self._images}

    @property
    def _images(self) -> Mapping[str, tuple[int, int]]:
        return {} if self.vision is None else self.vision.images

    def blank_observation(self) -> dict[str, np.ndarray]:
        """Return an observation of zeros without B, for ``separate``: to warm up and to time with."""
        steps = self.network.observation_steps
        low_dim = {key: np.zeros((steps, size), np.float32) for key, size in self.low_dim.items()}
        return low_dim | {key: np.zeros((steps, *size, 3), np.uint8) for key, size in self._images.items()}

    def is_batched(self, observation: Mapping[str, np.ndarray]) -> bool:
        """Return whether an observation that ``separate`` takes has the dimension B."""
        key = next(iter(self.observation))
        return np.ndim(observation[key]) == (5 if key in self._images else 3)

    def concatenate(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the low-dim part of ``separate``: for a low-dim policy, float32[B, To, Do]."""
        return self.separate(observation)[0]

    def separate(self, observation: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Join an observation's low-dim keys in order, and give its images apart.

        Args:
            observation: key -> float[B, To, channels] in task units; images uint8[B, To, H, W, 3] or
                float[B, To, 3, H, W] in [0, 1]. Either all of them have B or none.

        Returns:
            float32[B, To, L], and key -> image uint8[B, To, H, W, 3] or float32[B, To, 3, H, W].

        Raises:
            InvalidInput: a key is missing or unknown, or a value has another shape or dtype, NaN, or is out of range.
        """
        if set(observation) != set(self.observation):
            raise InvalidInput(
                sentence(
                    "observation keys",
                    expected=sorted(self.observation),
                    got=sorted(observation),
                    mend="give exactly these",
                )
            )
        parts = {
            key: (self._image if key in self._images else self._part)(key, np.asarray(observation[key]))
            for key in self.observation
        }
        if len({part.shape[0] for part in parts.values()}) != 1:
            raise InvalidInput(
                sentence(
                    "observation",
                    expected="one batch size for all keys",
                    got={key: part.shape for key, part in parts.items()},
                    mend="stack the same environments under every key",
                )
            )
        images = {key: parts.pop(key) for key in self._images}
        if not parts:
            return np.empty((*next(iter(images.values())).shape[:2], 0), np.float32), images
        return np.concatenate(list(parts.values()), axis=-1), images

    def _part(self, key: str, values: np.ndarray) -> np.ndarray:
        tail = (self.network.observation_steps, self.observation[key])
        shaped = values.ndim in {2, 3} and values.shape[-2:] == tail
        if not shaped or not np.issubdtype(values.dtype, np.floating) or not np.isfinite(values).all():
            finite = "finite" if values.dtype.kind in "biuf" and np.isfinite(values).all() else "with NaN or infinite"
            raise InvalidInput(
                sentence(
                    f"observation '{key}'",
                    expected=f"finite float[B, {tail[0]}, {tail[1]}] (or without B)",
                    got=f"{values.dtype}{list(values.shape)} {finite}",
                    mend="stack the last observation steps, oldest first, and check the sensor",
                )
            )
        return values.reshape(-1, *tail).astype(np.float32)

    def _image(self, key: str, values: np.ndarray) -> np.ndarray:
        steps, (height, width) = self.network.observation_steps, self._images[key]
        is_bytes = values.dtype == np.uint8
        tail = (steps, height, width, 3) if is_bytes else (steps, 3, height, width)
        shaped = values.ndim in {4, 5} and values.shape[-4:] == tail
        if not (shaped and (is_bytes or (np.issubdtype(values.dtype, np.floating) and _in_range(values)))):
            span = f" from {values.min()} to {values.max()}" if values.size and values.dtype.kind in "biuf" else ""
            raise InvalidInput(
                sentence(
                    f"image '{key}'",
                    expected=f"uint8[B, {steps}, {height}, {width}, 3] or float[B, {steps}, 3, {height}, {width}] in "
                    "[0, 1] (or without B)",
                    got=f"{values.dtype}{list(values.shape)}{span}",
                    mend="stack the last observation steps, oldest first, of the size that the policy was trained on",
                )
            )
        values = values.reshape(-1, *tail)
        # A mirrored image has negative strides, which torch does not take.
        return np.ascontiguousarray(values) if is_bytes else values.astype(np.float32)


def _in_range(values: np.ndarray) -> bool:
    return bool(values.min() >= 0 and values.max() <= _BRIGHTEST)
