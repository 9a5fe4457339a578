"""What every executor is: one call, one action chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bac.errors import InvalidInput, sentence
from bac.plan import Plan


@dataclass(frozen=True)
class ChunkNoise:
    """All randomness of a call, drawn before its loop.

    Attributes:
        initial: float32[B, T, Da], unit normal, the sample that step 0 denoises.
        steps: float32[K, B, T, Da], unit normal, added after each step by stochastic samplers.
    """

    initial: Tensor
    steps: Tensor

    def require(self, batch: int, steps: int) -> None:
        """Refuse noise for another batch size or step count.

        Raises:
            InvalidInput: a shape does not fit.
        """
        if self.initial.shape[0] != batch or self.steps.shape != (steps, *self.initial.shape):
            raise InvalidInput(
                sentence(
                    "chunk noise",
                    expected=f"[{batch}, T, Da] and [{steps}, {batch}, T, Da]",
                    got=f"{tuple(self.initial.shape)} and {tuple(self.steps.shape)}",
                    mend="draw it for this batch and sampler",
                )
            )


class Executor(Protocol):
    """Turns observations into action chunks. No state survives a call."""

    @property
    def plan(self) -> Plan:
        """What a call does; its cost can be counted without running it."""

    def __call__(self, observation: Tensor, noise: ChunkNoise) -> Tensor:
        """Return the normalised action chunk float32[B, T, Da] for normalised observations float32[B, To, Do]."""
