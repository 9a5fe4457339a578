"""A pre-norm transformer decoder laid open, for executors that compile the arithmetic themselves.

A ``ResidualTrunk`` hides its arithmetic behind ``branch``; an executor that generates code or a graph must see the
weights. A trunk that has the plain form below says so by a method ``decoder``; any other runs on the eager executor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bac.errors import InvalidInput, sentence

Affine = tuple[Tensor, Tensor]
"""(weight [out, in], bias [out]) of a linear map, or (scale [d], shift [d]) of a layer norm."""


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: three residual branches, each behind its layer norm.

    Attributes:
        norm1, self_in, self_out: self-attention; ``self_in`` gives q, k and v stacked, [3 d, d].
        norm2, cross_in, cross_out: cross-attention; ``cross_in`` gives q, [d, d].
        norm3, hidden, out: feed-forward, [4 d, d] and [d, 4 d], exact GELU between.
    """

    norm1: Affine
    self_in: Affine
    self_out: Affine
    norm2: Affine
    cross_in: Affine
    cross_out: Affine
    norm3: Affine
    hidden: Affine
    out: Affine


@dataclass(frozen=True)
class ConditionEncoder:
    """From observations to the keys and values of every layer's cross-attention.

    Attributes:
        embed: observation channels to width, [d, Do].
        positions: [To, d], added to the embedding.
        hidden, out: the encoder, [4 d, d] and [d, 4 d], Mish between.
        key_value: per layer, [2 d, d].
    """

    embed: Affine
    positions: Tensor
    hidden: Affine
    out: Affine
    key_value: tuple[Affine, ...]


@dataclass(frozen=True)
class PreNormDecoder:
    """A whole denoiser; what depends on the step alone is in the trunk's step tables.

    Attributes:
        condition: from observations to keys and values.
        heads: attention heads.
        embed: action channels to width, [d, Da].
        positions: [T, d], added to the embedding.
        layers: in the order of the stream.
        norm: the last layer norm.
        head: width to action channels, [Da, d].
        condition_tokens: S, the time token and the observation tokens.
        self_visible: per action token, how many action tokens it sees, counted from the first.
        cross_visible: per action token, how many condition tokens it sees, counted from the first (the time token).
    """

    condition: ConditionEncoder
    heads: int
    embed: Affine
    positions: Tensor
    layers: tuple[DecoderLayer, ...]
    norm: Affine
    head: Affine
    condition_tokens: int
    self_visible: tuple[int, ...]
    cross_visible: tuple[int, ...]

    @property
    def width(self) -> int:
        """Channels d of the residual stream."""
        return self.positions.shape[1]

    @property
    def horizon(self) -> int:
        """Action tokens T."""
        return self.positions.shape[0]

    @property
    def action_dim(self) -> int:
        """Channels Da of an action."""
        return self.head[0].shape[0]


@runtime_checkable
class DecoderTrunk(Protocol):
    """A ``ResidualTrunk`` of the plain form: blocks are SA, CA, FFN of each layer in turn.

    Its step tables are float[layers, 2 d], K and V of the time token; its condition is a sequence over layers of
    float[B, To, 2 d], K and V of the observation tokens.
    """

    def decoder(self) -> PreNormDecoder:
        """Return the weights, shared with the network."""


def visible_prefix(mask: Tensor) -> tuple[int, ...]:
    """Return how many keys each query sees, for an additive mask float[queries, keys] that shows a first stretch.

    Raises:
        InvalidInput: the mask is not 0 on a first stretch of at least one key and minus infinity after it.
    """
    mask = mask.cpu()
    counts = (mask == 0).sum(dim=1)
    expected = torch.zeros_like(mask).masked_fill(torch.arange(mask.shape[1]) >= counts[:, None], -torch.inf)
    if int(counts.min()) < 1 or not torch.equal(mask, expected):
        raise InvalidInput(
            sentence(
                "attention mask",
                expected="0 on the first keys of each query, minus infinity after them",
                got=mask.tolist(),
                mend="use executor=eager, which takes any mask",
            )
        )
    return tuple(counts.tolist())
