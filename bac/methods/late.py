"""Late caching: one schedule for all blocks, its updates crowded toward the end, where the chunk is decided.

Ours, and the simplest thing that follows from a measured fact (``bac/sensitivity.py``): an error made early is mostly
denoised away, an error made late stays in the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.errors import InvalidInput, sentence
from bac.methods.base import ByUpdates, LastStep, require_updates
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


@dataclass(frozen=True)
class Late(ByUpdates):
    """Updates at steps (K - 1) (1 - (1 - u)^power), u = 0, 1/S, 2/S, ...

    Attributes:
        updates: S, steps at which all blocks update, step 0 included.
        power: 1 spaces evenly; the larger, the later. At least 1.
        last_step: forced also updates at step K - 1, the step of u = 1.
    """

    updates: int = 10
    power: float = 2.8
    last_step: LastStep = LastStep.FORCED
    name: str = "late"

    def __post_init__(self) -> None:
        """Refuse a power below 1."""
        if not self.power >= 1:
            raise InvalidInput(sentence("cache.power", expected="at least 1", got=self.power, mend="1 is uniform"))

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule; the profile gives only blocks, steps and provenance.

        Raises:
            InvalidInput: a number of updates that K steps do not have.
        """
        require_updates(self.updates, profile.steps)
        mask = np.isin(np.arange(profile.steps), late_steps(self.updates, profile.steps, self.power))
        return self.last_step.applied(self.made(profile, mask))


def late_steps(updates: int, steps: int, power: float) -> np.ndarray:
    """Return ``updates`` increasing steps of 0..steps - 1, the first of them 0."""
    ideal = np.round((steps - 1) * (1 - (1 - np.arange(updates) / updates) ** power)).astype(np.int64)
    # Where rounding crowds two updates onto one step, the earlier of them moves to an earlier step.
    latest = steps - updates + np.arange(updates)
    distinct = np.minimum(ideal, latest)
    for place in range(updates - 2, -1, -1):
        distinct[place] = min(distinct[place], distinct[place + 1] - 1)
    return np.maximum(distinct, np.arange(updates))
