"""What is trained: a denoiser on a low-dim observation, or encoder and denoiser as one network on images beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from policies.base import PolicySpec
from policies.diffusion_transformer import DiffusionTransformer
from policies.vision import ObservationEncoder


@dataclass(frozen=True)
class HybridObservation:
    """What an image policy sees.

    Attributes:
        low_dim: float32[B, To, L], normalised, keys in order.
        images: key -> uint8[B, To, H, W, 3], or float[B, To, 3, H, W] in [0, 1].
    """

    low_dim: Tensor
    images: Mapping[str, Tensor]


class HybridNetwork(nn.Module):
    """Encoder and denoiser under the names they have in the original's policy."""

    def __init__(self, obs_encoder: ObservationEncoder, model: DiffusionTransformer) -> None:
        super().__init__()
        self.obs_encoder = obs_encoder
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, observation: HybridObservation) -> Tensor:
        """Estimate the noise float[R B, T, Da] of R samples per observation; see ``DiffusionTransformer.forward``.

        Args:
            sample: float[R B, T, Da], R copies of a batch one after the other.
            timestep: int64[R B].
            observation: of B rows, each encoded once.
        """
        tokens = self.obs_encoder(observation.low_dim, observation.images)
        return self.model(sample, timestep, tokens.repeat(len(sample) // len(tokens), 1, 1))


PolicyNetwork = DiffusionTransformer | HybridNetwork


def build_network(spec: PolicySpec) -> PolicyNetwork:
    """Return what a policy of this specification trains, freshly initialised."""
    denoiser = DiffusionTransformer(spec.network)
    if spec.vision is None:
        return denoiser
    return HybridNetwork(ObservationEncoder(spec.observation, spec.vision), denoiser)


def network_parts(network: PolicyNetwork) -> tuple[DiffusionTransformer, ObservationEncoder | None]:
    """Return the denoiser, and the encoder if there is one."""
    return (network.model, network.obs_encoder) if isinstance(network, HybridNetwork) else (network, None)
