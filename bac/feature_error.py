"""Feature error: how far what a schedule reuses or predicts is from the feature that it stands for, step by step.

Measured on the features of uncached calls, so that the error is the method's alone: in a cached call the errors of
earlier steps come on top.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bac.schedule import CacheSchedule, Weight


def feature_errors(schedule: CacheSchedule, features: Sequence[Tensor]) -> np.ndarray:
    """Return float64[K]: per step the relative L2 error of the features in use, mean over blocks and rows.

    A block that updates errs by 0.

    Args:
        schedule: what reuses and predicts.
        features: per block float[K, B, T, d], of uncached calls (``bac.profiler.record_features``).
    """
    errors = np.zeros(schedule.steps)
    for block, true in enumerate(features):
        for step in np.flatnonzero(~schedule.mask[block]):
            used = torch.zeros_like(true[step])
            for source, weight in schedule.terms(block, int(step)):
                used += _by_channel(weight, schedule, block).to(true) * true[source]
            error = (used - true[step]).flatten(1).norm(dim=1) / true[step].flatten(1).norm(dim=1)
            errors[step] += float(error.mean())
    return errors / len(features)


def _by_channel(weight: Weight, schedule: CacheSchedule, block: int) -> Tensor:
    """Return the weight of every channel, float[d], or the one of all of them."""
    weights = torch.tensor(weight)
    if schedule.groups is None or weights.ndim == 0:
        return weights
    return weights[torch.tensor(schedule.groups[block].tolist())]
