"""What a denoiser must show of itself to be cached: an ordered list of residual branches.

One denoising step of a pre-norm transformer is::

    stream = embed(sample)
    for block in blocks:
        stream = stream + branch(block, stream, step table, condition)
    noise estimate = head(stream)

A *block* is one residual branch; its *feature* is the branch's output just before it is added. Caching replaces the
branch call by the feature of an earlier step. Whatever depends on the step alone goes into step tables, built once;
whatever depends on the observation alone goes into the condition, built once per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from bac.choices import Choice
from bac.errors import InvalidInput, sentence


class BlockKind(Choice):
    """The three residual branches of a transformer decoder layer."""

    SELF_ATTENTION = "sa"
    CROSS_ATTENTION = "ca"
    FEED_FORWARD = "ffn"


@dataclass(frozen=True)
class Block:
    """One residual branch, named ``L<layer>.<kind>``, for instance ``L3.ffn``."""

    layer: int
    kind: BlockKind

    def __str__(self) -> str:
        return f"L{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, name: str) -> Block:
        """Read back what ``str`` gives.

        Raises:
            InvalidInput: ``name`` has another form.
        """
        layer, _, kind = name.partition(".")
        if not (layer.startswith("L") and layer[1:].isdigit() and kind in set(BlockKind)):
            raise InvalidInput(
                sentence("block name", expected="L<layer>.<sa|ca|ffn>", got=repr(name), mend="correct the name")
            )
        return cls(int(layer[1:]), BlockKind(kind))


@dataclass(frozen=True)
class TrunkCost:
    """FLOPs (one multiply-add = 2) of a call at batch 1, matrix products only.

    Attributes:
        branch: per block, one update inside a plan.
        step: embed and head, once per denoising step.
        call: condition, once per call.
        original_branch: per block, one update in the original network, which recomputes the condition's K and V.
        original_step: embed, head and condition, which the original network computes at every step.
    """

    branch: tuple[int, ...]
    step: int
    call: int
    original_branch: tuple[int, ...]
    original_step: int


class ResidualTrunk(Protocol):
    """A denoiser as an ordered list of residual branches. Step tables and conditions are opaque to callers."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The residual branches in the order of the stream."""

    @property
    def cost(self) -> TrunkCost:
        """FLOPs of the parts."""

    @property
    def device(self) -> Any:
        """The torch device of the weights."""

    def step_tables(self, timesteps: np.ndarray) -> Sequence[Any]:
        """Return one table per time step int64[K]: all that depends on the step alone."""

    def condition(self, observation: Tensor) -> Any:
        """Return all that depends on the observation float[B, To, Do] alone."""

    def embed(self, sample: Tensor) -> Tensor:
        """Return the residual stream float[B, T, d] of a noisy chunk float[B, T, Da]."""

    def branch(self, block: int, stream: Tensor, table: Any, condition: Any) -> Tensor:
        """Return the feature float[B, T, d] of block number ``block``."""

    def head(self, stream: Tensor) -> Tensor:
        """Return the noise estimate float[B, T, Da]."""


@runtime_checkable
class TokenTrunk(ResidualTrunk, Protocol):
    """A trunk that can also compute a branch for some of its action tokens, for ``bac.token_reuse``."""

    @property
    def horizon(self) -> int:
        """Action tokens T of a chunk."""

    def branch_tokens(self, block: int, stream: Tensor, table: Any, condition: Any, tokens: Tensor) -> Tensor:
        """Return the feature float[B, R, d] of block number ``block`` at the tokens int64[R] alone.

        The stream is of all tokens: a self-attention's queries are the chosen tokens, its keys and values all of them.
        """

    def attention_received(self, layer: int, stream: Tensor) -> Tensor:
        """Return float[B, T]: per token, its self-attention weights summed over all queries and heads of a layer.

        The stream is the input of the layer's self-attention branch.
        """
