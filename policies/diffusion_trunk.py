"""The diffusion transformer shown to ``bac``: as a residual trunk for plans, and as a table of sites for hooks.

What leaves the denoising loop here is exact: the time token, its row of the condition encoder and its cross-attention
K and V depend on the step alone; the observation tokens' rows and K, V depend on the observation alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bac.decoder import Affine, ConditionEncoder, DecoderLayer, PreNormDecoder, visible_prefix
from bac.executors.hooks import SiteTable
from bac.trunk import Block, BlockKind, TrunkCost
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig

_KINDS = tuple(BlockKind)
_BRANCH_METHODS = {
    BlockKind.SELF_ATTENTION: "_sa_block",
    BlockKind.CROSS_ATTENTION: "_mha_block",
    BlockKind.FEED_FORWARD: "_ff_block",
}


@dataclass(frozen=True)
class _Attention:
    """Views of an ``nn.MultiheadAttention``'s packed weights, as (weight, bias) pairs for ``F.linear``."""

    query: tuple[Tensor, Tensor]
    key_value: tuple[Tensor, Tensor]
    query_key_value: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> _Attention:
        weight, bias, width = module.in_proj_weight, module.in_proj_bias, module.embed_dim
        return cls(
            query=(weight[:width], bias[:width]),
            key_value=(weight[width:], bias[width:]),
            query_key_value=(weight, bias),
            out=(module.out_proj.weight, module.out_proj.bias),
        )


class DiffusionTransformerTrunk:
    """A ``TokenTrunk`` over the weights of a ``DiffusionTransformer``; it shares them and never changes them.

    A step table is float[layers, 2 d]: K and V of the time token. A condition is float[layers, B, To, 2 d].
    """

    def __init__(self, network: DiffusionTransformer) -> None:
        self._network = network.eval()
        self._config = network.config
        self._layers = [layer for layer in network.decoder.layers if isinstance(layer, nn.TransformerDecoderLayer)]
        self._self_attention = [_Attention.of(layer.self_attn) for layer in self._layers]
        self._cross_attention = [_Attention.of(layer.multihead_attn) for layer in self._layers]
        self.blocks = diffusion_transformer_blocks(network.config)

    @property
    def cost(self) -> TrunkCost:
        """FLOPs of the parts."""
        return diffusion_transformer_cost(self._config)

    @property
    def horizon(self) -> int:
        """Action tokens T of a chunk."""
        return self._config.horizon

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._network.pos_emb.device

    def step_tables(self, timesteps: np.ndarray) -> Sequence[Tensor]:
        """Return per time step int64[K] the time token's K and V in every layer, float[layers, 2 d]."""
        network = self._network
        time = network.time_emb(torch.as_tensor(timesteps, device=self.device))
        memory = network.encoder(time + network.cond_pos_emb[0, 0])
        tables = torch.stack([F.linear(memory, *attention.key_value) for attention in self._cross_attention], dim=1)
        return list(tables)

    def condition(self, observation: Tensor) -> list[Tensor]:
        """Return K and V of the observation tokens float[B, To, Do] in every layer, float[B, To, 2 d] each."""
        network = self._network
        memory = network.encoder(network.cond_obs_emb(observation) + network.cond_pos_emb[:, 1:])
        return [F.linear(memory, *attention.key_value) for attention in self._cross_attention]

    def embed(self, sample: Tensor) -> Tensor:
        """Return the residual stream float[B, T, d] of a noisy chunk float[B, T, Da]."""
        return self._network.input_emb(sample) + self._network.pos_emb

    def branch(self, block: int, stream: Tensor, table: Tensor, condition: list[Tensor]) -> Tensor:
        """Return the feature float[B, T, d] of block number ``block``."""
        number, kind = divmod(block, len(_KINDS))
        match _KINDS[kind]:
            case BlockKind.SELF_ATTENTION:
                attention = self._self_attention[number]
                normed = self._layers[number].norm1(stream)
                q, k, v = F.linear(normed, *attention.query_key_value).chunk(3, dim=-1)
                return F.linear(self._attend(q, k, v, self._network.mask), *attention.out)
            case BlockKind.CROSS_ATTENTION:
                return self._cross_attended(number, stream, table, condition, self._network.memory_mask)
            case BlockKind.FEED_FORWARD:
                return self._fed_forward(number, stream)

    def branch_tokens(
        self, block: int, stream: Tensor, table: Tensor, condition: list[Tensor], tokens: Tensor
    ) -> Tensor:
        """Return the feature float[B, R, d] of block number ``block`` at the tokens int64[R] alone."""
        number, kind = divmod(block, len(_KINDS))
        match _KINDS[kind]:
            case BlockKind.SELF_ATTENTION:
                attention, normed = self._self_attention[number], self._layers[number].norm1(stream)
                q = F.linear(normed[:, tokens], *attention.query)
                k, v = F.linear(normed, *attention.key_value).chunk(2, dim=-1)
                return F.linear(self._attend(q, k, v, self._network.mask[tokens]), *attention.out)
            case BlockKind.CROSS_ATTENTION:
                mask = self._network.memory_mask[tokens]
                return self._cross_attended(number, stream[:, tokens], table, condition, mask)
            case BlockKind.FEED_FORWARD:
                return self._fed_forward(number, stream[:, tokens])

    def attention_received(self, layer: int, stream: Tensor) -> Tensor:
        """Return float[B, T]: per token, its self-attention weights summed over all queries and heads of a layer."""
        normed = self._layers[layer].norm1(stream)
        q, k, _ = map(self._split, F.linear(normed, *self._self_attention[layer].query_key_value).chunk(3, dim=-1))
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + self._network.mask
        return scores.softmax(dim=3).sum(dim=(1, 2))

    def head(self, stream: Tensor) -> Tensor:
        """Return the noise estimate float[B, T, Da]."""
        return self._network.head(self._network.ln_f(stream))

    def decoder(self) -> PreNormDecoder:
        """Return the weights in the plain form that compiled executors take, shared with the network."""
        network = self._network
        return PreNormDecoder(
            condition=ConditionEncoder(
                embed=_affine(network.cond_obs_emb),
                positions=network.cond_pos_emb[0, 1:],
                hidden=_affine(network.encoder[0]),
                out=_affine(network.encoder[2]),
                key_value=tuple(attention.key_value for attention in self._cross_attention),
            ),
            heads=self._config.heads,
            embed=_affine(network.input_emb),
            positions=network.pos_emb[0],
            layers=tuple(self._layer(number) for number in range(len(self._layers))),
            norm=_affine(network.ln_f),
            head=_affine(network.head),
            condition_tokens=self._config.condition_tokens,
            self_visible=visible_prefix(network.mask),
            cross_visible=visible_prefix(network.memory_mask),
        )

    def _layer(self, number: int) -> DecoderLayer:
        layer, self_attention = self._layers[number], self._self_attention[number]
        cross_attention = self._cross_attention[number]
        return DecoderLayer(
            norm1=_affine(layer.norm1),
            self_in=self_attention.query_key_value,
            self_out=self_attention.out,
            norm2=_affine(layer.norm2),
            cross_in=cross_attention.query,
            cross_out=cross_attention.out,
            norm3=_affine(layer.norm3),
            hidden=_affine(layer.linear1),
            out=_affine(layer.linear2),
        )

    def _cross_attended(
        self, number: int, stream: Tensor, table: Tensor, condition: list[Tensor], mask: Tensor
    ) -> Tensor:
        attention = self._cross_attention[number]
        q = F.linear(self._layers[number].norm2(stream), *attention.query)
        time = table[number].expand(stream.shape[0], 1, -1)
        k, v = torch.cat((time, condition[number]), dim=1).chunk(2, dim=-1)
        return F.linear(self._attend(q, k, v, mask), *attention.out)

    def _fed_forward(self, number: int, stream: Tensor) -> Tensor:
        layer = self._layers[number]
        return layer.linear2(F.gelu(layer.linear1(layer.norm3(stream))))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = map(self._split, (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def _split(self, part: Tensor) -> Tensor:
        """Return float[B, heads, tokens, d / heads] of float[B, tokens, d]."""
        return part.view(*part.shape[:2], self._config.heads, -1).transpose(1, 2)


def diffusion_transformer_blocks(config: DiffusionTransformerConfig) -> tuple[Block, ...]:
    """Return the residual branches in the order of the stream: SA, CA, FFN of each layer."""
    return tuple(Block(layer, kind) for layer in range(config.layers) for kind in _KINDS)


def diffusion_transformer_cost(config: DiffusionTransformerConfig) -> TrunkCost:
    """Count the matrix products at batch 1 (a multiply-add is 2 FLOPs), both products of attention included."""
    d, tokens, memory = config.width, config.horizon, config.condition_tokens
    linear = 2 * d * d
    key_value = 2 * linear * memory
    branch = {
        BlockKind.SELF_ATTENTION: 4 * linear * tokens + 4 * tokens * tokens * d,
        BlockKind.CROSS_ATTENTION: 2 * linear * tokens + 4 * tokens * memory * d,
        BlockKind.FEED_FORWARD: 8 * linear * tokens,
    }
    blocks = diffusion_transformer_blocks(config)
    embed_and_head = 2 * 2 * config.action_dim * d * tokens
    observation = config.observation_steps * 2 * config.observation_dim * d
    encoder_row = 8 * linear
    return TrunkCost(
        branch=tuple(branch[block.kind] for block in blocks),
        step=embed_and_head,
        call=observation + config.observation_steps * (encoder_row + config.layers * 2 * linear),
        original_branch=tuple(
            branch[block.kind] + (key_value if block.kind is BlockKind.CROSS_ATTENTION else 0) for block in blocks
        ),
        original_step=embed_and_head + observation + memory * encoder_row,
    )


def diffusion_transformer_sites(network: DiffusionTransformer) -> SiteTable:
    """Return where the network, used as it is, computes its blocks; for ``bac.attach``."""
    blocks = diffusion_transformer_blocks(network.config)
    branches = {block: (network.decoder.layers[block.layer], _BRANCH_METHODS[block.kind]) for block in blocks}
    return SiteTable(network, _timestep_of, branches)


def _affine(module: nn.Module) -> Affine:
    return module.get_parameter("weight"), module.get_parameter("bias")


def _timestep_of(sample: Tensor, timestep: Tensor | int, condition: Tensor) -> int:
    """Read the time step of a ``DiffusionTransformer.forward`` call."""
    return int(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else timestep
