"""Diffusion policies: network, normaliser, samplers, checkpoints, training."""

from policies.diffusion_policy import DiffusionPolicy
from policies.loading import load_policy

__all__ = ["DiffusionPolicy", "load_policy"]
