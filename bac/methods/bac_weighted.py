"""Sensitivity-weighted BAC: the same dynamic programme on what reuse costs the chunk, not on how alike features look.

Ours. The paper scores an interval by similarity alone, as if all steps counted alike; the measured gain of an early
error is two orders of magnitude below that of a late one (``bac/sensitivity.py``). Errors of different steps are nearly
uncorrelated, so their squares add: reusing the feature of step a at step t costs sensitivity(t)^2 * mse(a, t).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.choices import Choice
from bac.methods.acs import IntervalScore, adaptive_update_steps
from bac.methods.base import ByUpdates, LastStep
from bac.methods.bubbling_union import Downstream, bubbling_union
from bac.profile import FeatureProfile, Metric
from bac.schedule import CacheSchedule

_SMOOTHING = 9
"""Steps over which the measured gains are averaged, in the logarithm: they are a few random errors each."""


class Sharing(Choice):
    """Whether each block has update steps of its own (and the Bubbling Union repairs them), or all have the same."""

    NONE = "none"
    ALL = "all"


@dataclass(frozen=True)
class SensitivityWeighted(ByUpdates):
    """BAC with sensitivity-weighted costs.

    Attributes:
        updates: S, update steps per block, step 0 included.
        sharing: one schedule for all blocks, from their summed costs, or one per block.
        upstream_blocks: n, blocks widened by the Bubbling Union; nothing to do where all share.
        downstream: which FFNs the union looks at.
        last_step: forced also updates at step K - 1.
    """

    updates: int = 10
    sharing: Sharing = Sharing.ALL
    upstream_blocks: int = 5
    downstream: Downstream = Downstream.INCLUSIVE
    last_step: LastStep = LastStep.FORCED
    name: str = "bac_weighted"

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule for the profile's checkpoint and sampler.

        Raises:
            InvalidInput: the profile has no sensitivity, or K steps do not have S updates.
        """
        sensitivity = profile.require("sensitivity", self.name)
        costs = profile.values[Metric.MSE] * smoothed(sensitivity) ** 2
        if self.sharing is Sharing.ALL:
            costs = np.broadcast_to(costs.sum(axis=0), costs.shape)
        mask = np.zeros((len(profile.blocks), profile.steps), dtype=bool)
        for row, cost in zip(mask, costs, strict=True):
            row[list(adaptive_update_steps(-cost, self.updates, IntervalScore.ANCHOR))] = True
        mask = bubbling_union(mask, profile.blocks, profile.reuse_error(), self.upstream_blocks, self.downstream)
        return self.last_step.applied(self.made(profile, mask))


def smoothed(sensitivity: np.ndarray) -> np.ndarray:
    """Return the moving geometric mean, float64[K]; the ends count on as they are, gains of 0 as a millionth."""
    reach = _SMOOTHING // 2
    gains = np.maximum(sensitivity.astype(np.float64), 1e-6 * sensitivity.max())
    logarithms = np.pad(np.log(gains), reach, mode="edge")
    return np.exp(np.convolve(logarithms, np.full(_SMOOTHING, 1 / _SMOOTHING), mode="valid"))
