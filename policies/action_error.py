"""How far one policy's action chunks are from another's on the same observations and noise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from policies.diffusion_policy import DiffusionPolicy


def action_errors(
    policy: DiffusionPolicy, reference: DiffusionPolicy, observation: Mapping[str, np.ndarray], batch: int = 32
) -> np.ndarray:
    """Return float64[N]: per observation, the mean absolute difference of the executed actions, normalised units.

    Normalised actions span [-1, 1] over the demonstrations. Both policies get noise of the same keys; samplers with
    the same number of steps then get the very same noise, others the same initial sample.

    Args:
        policy: what is judged.
        reference: what it is compared to.
        observation: key -> float32[N, To, channels], task units.
        batch: observations in one call.
    """
    joined = policy.spec.concatenate(observation)
    errors = []
    for start in range(0, len(joined), batch):
        rows = joined[start : start + batch]
        keys = [(start + row, 0) for row in range(len(rows))]
        chunks = [each.denoise(rows, each.draw_noise(len(rows), keys)) for each in (policy, reference)]
        executed = [chunk[:, policy.spec.executed].double() for chunk in chunks]
        errors.append((executed[0] - executed[1]).abs().mean(dim=(1, 2)).cpu().numpy())
    return np.concatenate(errors)
