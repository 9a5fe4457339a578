"""What every caching method is: a feature profile in, a cache schedule out."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Protocol, Self

from bac.errors import InvalidInput, sentence
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


class LastStep(StrEnum):
    """Whether every block also updates at step K - 1, the one that decides the chunk.

    BAC's code forces it and its baselines leave it free, so that a part of its margin may be this one update; here
    every method can be run both ways. Forced is the default of all.
    """

    FORCED = "forced"
    FREE = "free"

    def applied(self, schedule: CacheSchedule) -> CacheSchedule:
        """Return the schedule, its last step updated if forced."""
        return schedule.with_last_step() if self is LastStep.FORCED else schedule


class Method(Protocol):
    """A way to choose update steps offline."""

    @property
    def name(self) -> str:
        """Short name, as in ``cache=<name>``."""

    @property
    def label(self) -> str:
        """Name with the budget, for instance ``bac-s10``; schedule files are called so."""

    def with_budget(self, budget: float) -> Self:
        """Return the method with another budget: updates S, or GFLOPs."""

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Choose the update steps of every block."""


class ByUpdates:
    """What methods have in common whose budget is S, the number of updates: a dataclass with these two attributes."""

    name: str
    updates: int

    @property
    def label(self) -> str:
        """Name with the budget."""
        return f"{self.name}-s{self.updates}"

    def with_budget(self, budget: float) -> Self:
        """Return the method with S = ``budget``."""
        return replace(self, updates=int(budget))  # type: ignore[type-var]


def require_updates(updates: int, steps: int) -> None:
    """Refuse a number of updates that a call of K ``steps`` cannot have.

    Raises:
        InvalidInput: ``updates`` is not in [1, K].
    """
    if not 1 <= updates <= steps:
        raise InvalidInput(
            sentence("cache.updates", expected=f"1 to {steps}", got=updates, mend="choose a number in that range")
        )
