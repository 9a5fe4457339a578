"""What every executor is: one call, one action chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bac.errors import InvalidInput, Mismatch, sentence
from bac.plan import Plan
from bac.sampler_table import SamplerTable
from bac.trunk import ResidualTrunk

if TYPE_CHECKING:
    from bac.executors.committed import Committed


@dataclass(frozen=True)
class ChunkNoise:
    """All randomness of a call, drawn before its loop.

    Attributes:
        initial: float32[B, T, Da], unit normal, the sample that step 0 denoises.
        steps: float32[K, B, T, Da], unit normal, added after each step by stochastic samplers.
        keys: per row (episode, number of the chunk in it), where they are known.
    """

    initial: Tensor
    steps: Tensor
    keys: tuple[tuple[int, int], ...] | None = None

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
        if self.keys is not None and len(self.keys) != batch:
            raise InvalidInput(
                sentence("chunk noise", expected=f"{batch} keys", got=len(self.keys), mend="draw it for this batch")
            )

    def rows(self, rows: list[int]) -> ChunkNoise:
        """Return the noise of some rows of the batch."""
        keys = None if self.keys is None else tuple(self.keys[row] for row in rows)
        return ChunkNoise(self.initial[rows], self.steps[:, rows], keys)

    def require_float32(self, horizon: int, action_dim: int) -> None:
        """Refuse what an executor that reads memory itself would take for something else.

        Raises:
            InvalidInput: another type, or chunks of another shape.
        """
        if self.initial.shape[1:] != (horizon, action_dim) or {self.initial.dtype, self.steps.dtype} != {torch.float32}:
            raise InvalidInput(
                sentence(
                    "chunk noise",
                    expected=f"float32 of chunks {[horizon, action_dim]}",
                    got=f"{self.initial.dtype} and {self.steps.dtype} of chunks {list(self.initial.shape[1:])}",
                    mend="draw it for this policy",
                )
            )


class Executor(Protocol):
    """Turns observations into action chunks. No state survives a call, except in ``CrossChunkExecutor``."""

    @property
    def plan(self) -> Plan:
        """What a call does; its cost can be counted without running it."""

    def __call__(self, observation: Tensor, noise: ChunkNoise, committed: Committed | None = None) -> Tensor:
        """Return the normalised action chunk float32[B, T, Da] for normalised observations float32[B, To, Do].

        With ``committed`` actions, these come out as they are and the others are denoised around them.
        """


def require_together(plan: Plan, trunk: ResidualTrunk, sampler: SamplerTable) -> None:
    """Refuse a plan for other blocks or another number of steps.

    Raises:
        Mismatch: plan, trunk and sampler do not belong together.
    """
    if plan.blocks != trunk.blocks or len(plan.steps) != sampler.steps:
        raise Mismatch(
            sentence(
                "plan",
                expected=f"{sampler.steps} steps of {len(trunk.blocks)} blocks",
                got=f"{len(plan.steps)} steps of {len(plan.blocks)} blocks",
                mend="lower the schedule of this policy and sampler",
            )
        )


def require_width(plan: Plan, width: int) -> None:
    """Refuse a plan whose groups are of other channels than the stream's d = ``width``.

    Raises:
        Mismatch: another number of channels.
    """
    if plan.groups is not None and len(plan.groups[0]) != width:
        raise Mismatch(
            sentence(
                "plan",
                expected=f"groups of {width} channels",
                got=f"{len(plan.groups[0])} channels",
                mend="lower the schedule of this policy",
            )
        )
