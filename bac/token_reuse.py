"""Token-wise reuse: a trunk whose updates compute some action tokens, and take the others from what is there already.

The token maps of a schedule (``CacheSchedule.tokens``) are followed inside ``branch``, so that plans and executors know
nothing of them: to these a partial update is an update like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bac.errors import Mismatch, Unavailable, sentence
from bac.trunk import Block, ResidualTrunk, TokenTrunk, TrunkCost

_Step = tuple[Any, tuple["_Update | None", ...]]
_Call = tuple[Any, dict[int, Tensor]]


@dataclass(frozen=True)
class _Update:
    """An update of some tokens.

    Attributes:
        computed: int64[R], the tokens that are computed.
        source: int64[T], per token its place in the R fresh features and the T kept ones after them.
        reads_kept: whether any token takes a kept one.
    """

    computed: Tensor
    source: Tensor
    reads_kept: bool

    @classmethod
    def of(cls, tokens: np.ndarray, device: torch.device) -> _Update | None:
        """Read a token map int8[T]; None where all tokens are computed, or none (an update that is never made)."""
        own = np.arange(len(tokens))
        computed, kept = np.flatnonzero(tokens == own), tokens == -1
        if len(computed) in {0, len(own)}:
            return None
        source = np.where(kept, len(computed) + own, np.searchsorted(computed, tokens))
        return cls(torch.tensor(computed, device=device), torch.tensor(source, device=device), bool(kept.any()))


class TokenReuseTrunk:
    """A ``ResidualTrunk`` whose branches follow token maps.

    A step table is the trunk's with the step's token maps. A condition is the trunk's with the latest feature of each
    block, kept for one call: neither threads nor interleaved calls meet there.

    Args:
        trunk: computes the branches.
        tokens: int8[blocks, K, T], the maps of ``CacheSchedule.tokens``.

    Raises:
        Unavailable: the trunk cannot compute single tokens.
        Mismatch: the maps are for another number of blocks or tokens.
    """

    def __init__(self, trunk: ResidualTrunk, tokens: np.ndarray) -> None:
        if not isinstance(trunk, TokenTrunk):
            raise Unavailable(
                sentence(
                    "schedule of tokens",
                    expected="a trunk that computes single tokens (bac.trunk.TokenTrunk)",
                    got=type(trunk).__name__,
                    mend="use a method that updates whole blocks",
                )
            )
        if (tokens.shape[0], tokens.shape[2]) != (len(trunk.blocks), trunk.horizon):
            raise Mismatch(
                sentence(
                    "schedule of tokens",
                    expected=f"{trunk.horizon} tokens of {len(trunk.blocks)} blocks",
                    got=f"{tokens.shape[2]} tokens of {tokens.shape[0]} blocks",
                    mend="run scripts/calibrate.py for this policy",
                )
            )
        self._trunk = trunk
        self._steps = [tuple(_Update.of(each, trunk.device) for each in step) for step in tokens.transpose(1, 0, 2)]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The residual branches in the order of the stream."""
        return self._trunk.blocks

    @property
    def cost(self) -> TrunkCost:
        """FLOPs of the parts, an update of all tokens for each block; ``CacheSchedule.share`` says how much of it."""
        return self._trunk.cost

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._trunk.device

    def step_tables(self, timesteps: np.ndarray) -> Sequence[_Step]:
        """Return per time step int64[K] the trunk's table and the updates of the step."""
        return list(zip(self._trunk.step_tables(timesteps), self._steps, strict=True))

    def condition(self, observation: Tensor) -> _Call:
        """Return the trunk's condition for float[B, To, Do] and an empty place for the features of this call."""
        return self._trunk.condition(observation), {}

    def embed(self, sample: Tensor) -> Tensor:
        """Return the residual stream float[B, T, d] of a noisy chunk float[B, T, Da]."""
        return self._trunk.embed(sample)

    def branch(self, block: int, stream: Tensor, table: _Step, condition: _Call) -> Tensor:
        """Return the feature float[B, T, d] of block number ``block``, computed as far as the step's map says."""
        (inner_table, updates), (inner_condition, kept) = table, condition
        update = updates[block]
        if update is None:
            feature = self._trunk.branch(block, stream, inner_table, inner_condition)
        else:
            fresh = self._trunk.branch_tokens(block, stream, inner_table, inner_condition, update.computed)
            known = torch.cat((fresh, kept[block]), dim=1) if update.reads_kept else fresh
            feature = known.index_select(1, update.source)
        kept[block] = feature
        return feature

    def head(self, stream: Tensor) -> Tensor:
        """Return the noise estimate float[B, T, Da]."""
        return self._trunk.head(stream)
