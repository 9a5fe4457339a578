"""A small policy with random weights, for tests that need any policy at all."""

import numpy as np
import torch

from policies.base import PolicySpec
from policies.checkpoint import PolicyCheckpoint
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.normalizer import LimitsNormalizer
from policies.samplers import DiffusionProcess

KEYS = {"keypoints": 3, "agent_position": 2}


def small_checkpoint(seed: int = 0, train_steps: int = 10) -> PolicyCheckpoint:
    torch.manual_seed(seed)
    config = DiffusionTransformerConfig(
        action_dim=2, observation_dim=5, horizon=6, observation_steps=2, layers=2, heads=2, width=16
    )
    network = DiffusionTransformer(config).eval().requires_grad_(False)
    # At the initial 0.02 every branch is nearly dead and no error would show.
    for parameter in network.parameters():
        parameter.mul_(3)
    spec = PolicySpec("push_t", KEYS, 4, config, DiffusionProcess(train_steps))
    data = np.random.default_rng(seed).uniform(0, 512, (50, 5)).astype(np.float32)
    normalizers = LimitsNormalizer.fit(data, "observation"), LimitsNormalizer.fit(data[:, :2], "action")
    return PolicyCheckpoint(spec, network, *normalizers, training={})


def small_policy(seed: int = 0, train_steps: int = 10) -> DiffusionPolicy:
    return DiffusionPolicy(small_checkpoint(seed, train_steps))


def observation(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {key: draw.uniform(0, 512, (batch, 2, size)).astype(np.float32) for key, size in KEYS.items()}
