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


@dataclass(frozen=True)
class PolicySpec:
    """Everything about a policy but its weights.

    Attributes:
        task: name of the task it was trained for.
        observation: key -> number of channels, in the order in which they are concatenated.
        action_steps: actions of a chunk that are executed (Ta), at most T - To + 1.
        network: sizes of the denoiser.
        process: the diffusion process it was trained on.
    """

    task: str
    observation: Mapping[str, int]
    action_steps: int
    network: DiffusionTransformerConfig
    process: DiffusionProcess

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

    def concatenate(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Join an observation's keys in order.

        Args:
            observation: key -> float[B, To, channels] or float[To, channels], task units.

        Returns:
            float32[B, To, Do].

        Raises:
            InvalidInput: a key is missing or unknown, or a value has another shape, no float dtype, or NaN.
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
        parts = [self._part(key, np.asarray(observation[key])) for key in self.observation]
        if len({part.shape[0] for part in parts}) != 1:
            raise InvalidInput(
                sentence(
                    "observation",
                    expected="one batch size for all keys",
                    got={key: part.shape for key, part in zip(self.observation, parts, strict=True)},
                    mend="stack the same environments under every key",
                )
            )
        return np.concatenate(parts, axis=-1)

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
