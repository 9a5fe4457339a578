"""Uniform caching (FORA, arXiv 2407.01425): all blocks update together at evenly spaced steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.methods.base import ByUpdates, LastStep, require_updates
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


@dataclass(frozen=True)
class Uniform(ByUpdates):
    """Evenly spaced updates.

    Attributes:
        updates: S, steps at which all blocks update, from step 0 on at distances of about K / S.
        last_step: forced also updates at step K - 1; S + 1 updates then, unless S already reaches it.
    """

    updates: int = 10
    last_step: LastStep = LastStep.FORCED
    name: str = "uniform"

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule; the profile gives only blocks, steps and provenance."""
        require_updates(self.updates, profile.steps)
        mask = np.isin(np.arange(profile.steps), np.arange(self.updates) * profile.steps // self.updates)
        return self.last_step.applied(self.made(profile, mask))
