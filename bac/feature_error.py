"""Feature error: how far what a schedule reuses or predicts is from the feature that it stands for, step by step.

Measured on the features of uncached calls, so that the error is the method's alone: in a cached call the errors of
earlier steps come on top.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bac.predictions import Weight
from bac.schedule import CacheSchedule


def feature_errors(schedule: CacheSchedule, features: Sequence[Tensor]) -> np.ndarray:
    """Return float64[K]: per step the relative L2 error of the features in use, mean over blocks and rows.

    A block that updates errs by 0, a partial update by its tokens that are not computed.

    Args:
        schedule: what reuses and predicts.
        features: per block float[K, B, T, d], of uncached calls (``bac.profiler.record_features``).

    Raises:
        Unavailable: the schedule recalls features of the chunk before, which these are not.
    """
    if schedule.recall is not None:
        schedule.require_plain("feature error")
    errors = np.zeros(schedule.steps)
    for block, true in enumerate(features):
        held = true if schedule.tokens is None else _assembled(schedule.tokens[block], true)
        # What is computed whole is held as it is, and errs by nothing.
        for step in np.flatnonzero(schedule.share[block] < 1):
            used = torch.zeros_like(true[step])
            for source, weight in schedule.terms(block, int(step)):
                used += _by_channel(weight, schedule, block).to(true) * held[source]
            error = (used - true[step]).flatten(1).norm(dim=1) / true[step].flatten(1).norm(dim=1)
            errors[step] += float(error.mean())
    return errors / len(features)


def _assembled(tokens: np.ndarray, true: Tensor) -> Tensor:
    """Return what a block of token maps int8[K, T] holds after each step, float[K, B, T, d]."""
    held = true.clone()
    for step in range(1, len(held)):
        kept = torch.from_numpy(tokens[step] == -1).to(true.device)
        taken = torch.from_numpy(np.maximum(tokens[step], 0).astype(np.int64)).to(true.device)
        held[step] = torch.where(kept[:, None], held[step - 1], true[step][:, taken])
    return held


def _by_channel(weight: Weight, schedule: CacheSchedule, block: int) -> Tensor:
    """Return the weight of every channel, float[d], or the one of all of them."""
    weights = torch.tensor(weight)
    if schedule.groups is None or weights.ndim == 0:
        return weights
    return weights[torch.tensor(schedule.groups[block].tolist())]
