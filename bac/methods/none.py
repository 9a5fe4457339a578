"""No caching: every block at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import Self

from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule, Provenance
from bac.trunk import Block


@dataclass(frozen=True)
class NoCache:
    """Update all; the reference that every other method is judged against."""

    name: str = "none"

    @property
    def label(self) -> str:
        """The name; there is no budget."""
        return self.name

    @property
    def parameters(self) -> dict[str, Any]:
        """None."""
        return {}

    def with_budget(self, budget: float) -> Self:
        """Return the method as it is."""
        return self

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the full schedule."""
        return full_schedule(profile.blocks, profile.steps, profile.provenance)


def full_schedule(blocks: tuple[Block, ...], steps: int, provenance: Provenance) -> CacheSchedule:
    """Return the schedule that updates every block at every step; it needs no profile."""
    return CacheSchedule(np.ones((len(blocks), steps), dtype=bool), blocks, provenance, "none")
