"""The transformer of Diffusion Policy, state-dict compatible with the original ``TransformerForDiffusion``.

A decoder over the noisy action chunk, cross-attending to condition tokens (Chi et al., arXiv 2303.04137)::

    condition tokens   [time, obs_0 .. obs_{To-1}] --- MLP encoder ---> memory
    action tokens      [a_0 .. a_{T-1}] --- 8 x (SA, CA, FFN), pre-norm, causal ---> noise estimate
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bac.errors import InvalidInput, sentence


@dataclass(frozen=True)
class DiffusionTransformerConfig:
    """Sizes of the network; defaults are the Push-T low-dim configuration.

    Attributes:
        action_dim: channels of one action Da.
        observation_dim: channels of one observation Do.
        horizon: action tokens T.
        observation_steps: observation tokens To.
        layers: decoder layers.
        heads: attention heads; divides ``width``.
        width: embedding size d.
        attention_dropout: probability inside attention and feed-forward, training only.
    """

    action_dim: int
    observation_dim: int
    horizon: int = 16
    observation_steps: int = 2
    layers: int = 8
    heads: int = 4
    width: int = 256
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = (self.action_dim, self.observation_dim, self.horizon, self.observation_steps, self.layers, self.heads)
        if min(sizes) < 1 or self.width % (2 * self.heads):
            raise InvalidInput(
                sentence(
                    "network sizes",
                    expected="positive sizes and an even width per head",
                    got=self,
                    mend="correct the policy configuration",
                )
            )

    @property
    def condition_tokens(self) -> int:
        """Condition tokens S: the time token and one per observation step."""
        return 1 + self.observation_steps


class SinusoidalEmbedding(nn.Module):
    """Sine and cosine features of the diffusion time step: int64[B] -> float32[B, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timestep: Tensor) -> Tensor:
        """Return float32[B, width] for time steps [B]."""
        half = self.width // 2
        rate = torch.exp(torch.arange(half, device=timestep.device) * -(math.log(10000) / (half - 1)))
        angle = timestep[:, None] * rate
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


class DiffusionTransformer(nn.Module):
    """Predicts the noise in a noisy action chunk.

    Parameter and buffer names follow the original, so its checkpoints load strictly
    (``real-stanford/diffusion_policy``, ``n_cond_layers=0``, time and observation as condition, causal attention).
    """

    mask: Tensor
    memory_mask: Tensor

    def __init__(self, config: DiffusionTransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.input_emb = nn.Linear(config.action_dim, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.horizon, width))
        self.time_emb = SinusoidalEmbedding(width)
        self.cond_obs_emb = nn.Linear(config.observation_dim, width)
        self.cond_pos_emb = nn.Parameter(torch.zeros(1, config.condition_tokens, width))
        self.encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        layer = nn.TransformerDecoderLayer(
            width,
            config.heads,
            4 * width,
            config.attention_dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.decoder = nn.TransformerDecoder(layer, config.layers)
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.action_dim)
        # The original's ModuleAttrMixin adds this empty parameter; strict loading needs the name.
        self._dummy_variable = nn.Parameter()
        token = torch.arange(config.horizon)[:, None]
        self.register_buffer("mask", _additive(token >= torch.arange(config.horizon)))
        # Action t sees the time token and the observations up to t: condition token s holds observation s - 1.
        self.register_buffer("memory_mask", _additive(token >= torch.arange(config.condition_tokens) - 1))
        self.apply(_initialise)
        nn.init.normal_(self.pos_emb, std=0.02)
        nn.init.normal_(self.cond_pos_emb, std=0.02)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Estimate the noise.

        Args:
            sample: float[B, T, Da], the noisy action chunk.
            timestep: int64[] or int64[B], the diffusion time step in [0, train steps).
            condition: float[B, To, Do], normalised observations.

        Returns:
            float[B, T, Da], the estimated noise.
        """
        time = self.time_emb(timestep.reshape(-1).expand(sample.shape[0]))[:, None]
        tokens = torch.cat((time, self.cond_obs_emb(condition)), dim=1)
        memory = self.encoder(tokens + self.cond_pos_emb)
        stream = self.input_emb(sample) + self.pos_emb
        stream = self.decoder(
            stream, memory, tgt_mask=self.mask, memory_mask=self.memory_mask, tgt_is_causal=True, memory_is_causal=False
        )
        return self.head(self.ln_f(stream))

    def scale_condition(self) -> None:
        """Draw the weights between observations and memory anew, at the scale that keeps their size.

        The original's 0.02 leaves so little of an observation that the encoder's Mish begins all but linear: out of
        reach of products of observed numbers, on which a direction on a quaternion depends. (LeCun et al., Efficient
        BackProp, 1998, section 4.6.)
        """
        layers = [each for each in (self.cond_obs_emb, *self.encoder) if isinstance(each, nn.Linear)]
        # Normalised observations lie in [-1, 1], about half of unit size.
        for layer, size in zip(layers, (0.5, 1.0, 1.0), strict=True):
            nn.init.normal_(layer.weight, std=1 / (size * layer.in_features**0.5))


def _additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))


def _initialise(module: nn.Module) -> None:
    """Normal(0, 0.02) weights and zero biases, as in the original (and GPT-2)."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.normal_(module.in_proj_weight, std=0.02)
        nn.init.zeros_(module.in_proj_bias)
