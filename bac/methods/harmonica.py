"""HarmoniCa (Huang et al., arXiv 2410.01723): the updates that a learned router finds worth their cost.

The router is trained once per checkpoint and sampler (``bac/router.py``) and its gates are kept in the profile, so that
here, as for every method, a schedule is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.choices import Choice
from bac.methods.base import ByUpdates, LastStep, require_updates
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule

_HALVINGS = 120
"""Enough to find a factor to the last bit, from a bound of up to one over the smallest gate."""


class Opening(Choice):
    """How gates become updates.

    ``largest``: the largest gates, as HarmoniCa's threshold has it. ``spread``, ours: a gate of 1 / n over some steps
    averages over n of them in the rollout it was trained in, which an update at every n-th step comes nearest to; the
    threshold opens all of them or none.
    """

    LARGEST = "largest"
    SPREAD = "spread"


@dataclass(frozen=True)
class HarmoniCa(ByUpdates):
    """S x blocks updates where a trained router wants them: blocks and steps compete.

    HarmoniCa opens the gates above 0.5, so that its cost follows from the penalty it was trained with, and another cost
    needs another training. Here a budget takes the place of the threshold: methods are compared at equal budgets, and
    one training serves them all. The ranking takes no account of FLOPs; the penalty did, in training.

    Attributes:
        updates: S; S x blocks updates in all, step 0 of every block included.
        opening: how gates become updates; ``spread`` errs less than the paper's ``largest`` at every budget tried.
        last_step: forced also updates every block at step K - 1, beyond the budget where it would not.
    """

    updates: int = 10
    opening: Opening = Opening.SPREAD
    last_step: LastStep = LastStep.FORCED
    name: str = "harmonica"

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule for the profile's checkpoint and sampler.

        Raises:
            InvalidInput: the profile has no gates, or K steps do not have S updates.
        """
        require_updates(self.updates, profile.steps)
        choose = largest_gates if self.opening is Opening.LARGEST else spread_gates
        mask = choose(profile.require("gates", self.name), self.updates * len(profile.blocks))
        return self.last_step.applied(self.made(profile, mask))


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


def spread_gates(gates: np.ndarray, count: int) -> np.ndarray:
    """Return bool[blocks, K] with ``count`` updates, the denser the larger the gates around them; column 0 is True.

    After step 0, a block updates whenever the sum of its gates reaches a whole number. One factor on all gates (none
    then counts as more than 1), the smallest that will do, makes it ``count`` updates; fewer where several come at once
    or gates are 0.
    """

    def mask(factor: float) -> np.ndarray:
        # Sums of tenths must not miss a whole number by rounding.
        whole = np.floor(np.cumsum(np.minimum(factor * gates[:, 1:], 1), axis=1) + 1e-9)
        later = np.diff(whole, axis=1, prepend=0) > 0
        return np.concatenate((np.ones((len(gates), 1), dtype=bool), later), axis=1)

    few, many = 0.0, 1 / min(gates[gates > 0], default=1.0)
    for _ in range(_HALVINGS):
        middle = (few + many) / 2
        if mask(middle).sum() < count:
            few = middle
        else:
            many = middle
    return mask(many) if mask(many).sum() == count else mask(few)
