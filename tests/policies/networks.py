"""Small policies with random weights, for tests that need any policy at all."""

from functools import cache

import numpy as np
import torch

from policies.base import PolicySpec
from policies.checkpoint import PolicyCheckpoint
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.normalizer import LimitsNormalizer
from policies.samplers import DiffusionProcess
from policies.vision import IMAGE_FEATURES, ObservationEncoder, VisionConfig

KEYS = {"keypoints": 3, "agent_position": 2}

CAMERA = VisionConfig({"camera": (40, 48)}, (33, 36))
IMAGE_KEYS = {"hand": 2, "camera": IMAGE_FEATURES, "gripper": 1}
"""An image between two low-dim keys, so that a wrong order shows."""


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


def image_encoder(seed: int = 0) -> ObservationEncoder:
    return _image_encoder(seed)


@cache
def _image_encoder(seed: int) -> ObservationEncoder:
    torch.manual_seed(seed)
    return ObservationEncoder(IMAGE_KEYS, CAMERA).eval().requires_grad_(False)


def small_image_checkpoint(seed: int = 0) -> PolicyCheckpoint:
    torch.manual_seed(seed)
    config = DiffusionTransformerConfig(
        action_dim=2, observation_dim=67, horizon=6, observation_steps=2, layers=1, heads=2, width=16
    )
    spec = PolicySpec("push_t_image", IMAGE_KEYS, 4, config, DiffusionProcess(10), CAMERA)
    network = DiffusionTransformer(config).eval().requires_grad_(False)
    low_dim = LimitsNormalizer(torch.tensor([2.0, 2.0, 0.5]), torch.tensor([-1.0, -1.0, 0.0]))
    actions = LimitsNormalizer(torch.ones(2), torch.zeros(2))
    return PolicyCheckpoint(spec, network, low_dim, actions, {}, image_encoder(seed))


def image_observation(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The image as bytes, as a camera gives it."""
    draw = np.random.default_rng(seed)
    low_dim = {key: draw.uniform(0, 1, (batch, 2, IMAGE_KEYS[key])).astype(np.float32) for key in ("hand", "gripper")}
    return low_dim | {"camera": draw.integers(0, 256, (batch, 2, 40, 48, 3), dtype=np.uint8)}
