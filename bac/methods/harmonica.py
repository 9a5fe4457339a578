"""HarmoniCa (Huang et al., arXiv 2410.01723): the updates that a learned router finds worth their cost.

The router is trained once per checkpoint and sampler (``bac/router.py``) and its gates are kept in the profile, so that
here, as for every method, a schedule is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.methods.base import ByUpdates, LastStep, require_updates
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


@dataclass(frozen=True)
class HarmoniCa(ByUpdates):
    """The S x blocks updates with the largest gates, wherever they lie: blocks and steps compete.

    HarmoniCa opens the gates above 0.5, so that its cost follows from the penalty it was trained with, and another cost
    needs another training. Here a budget takes the place of the threshold: methods are compared at equal budgets, and
    one training serves them all. The ranking takes no account of FLOPs; the penalty did, in training.

    Attributes:
        updates: S; S x blocks updates in all, step 0 of every block included.
        last_step: forced also updates every block at step K - 1, beyond the budget where its gate is not among them.
    """

    updates: int = 10
    last_step: LastStep = LastStep.FORCED
    name: str = "harmonica"

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule for the profile's checkpoint and sampler.

        Raises:
            InvalidInput: the profile has no gates, or K steps do not have S updates.
        """
        require_updates(self.updates, profile.steps)
        mask = largest_gates(profile.require("gates", self.name), self.updates * len(profile.blocks))
        parameters = {"updates": self.updates, "last_step": self.last_step}
        return self.last_step.applied(CacheSchedule(mask, profile.blocks, profile.provenance, self.name, parameters))


def largest_gates(gates: np.ndarray, count: int) -> np.ndarray:
    """Return bool[blocks, K], True at the ``count`` largest of float[blocks, K] gates; column 0 comes first.

    Of equal gates those of later steps win, since a late error stays in the actions; then those of earlier blocks.
    """
    block, step = np.indices(gates.shape)
    worth = np.where(step == 0, np.inf, gates)
    order = np.lexsort((block.ravel(), -step.ravel(), -worth.ravel()))
    mask = np.zeros(gates.size, dtype=bool)
    mask[order[:count]] = True
    return mask.reshape(gates.shape)
