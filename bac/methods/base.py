"""What every caching method is: a feature profile in, a cache schedule out."""

from __future__ import annotations

from typing import Protocol

from bac.errors import InvalidInput, sentence
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


class Method(Protocol):
    """A way to choose update steps offline."""

    @property
    def name(self) -> str:
        """Short name, as in ``cache=<name>``."""

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Choose the update steps of every block."""


def require_updates(updates: int, steps: int) -> None:
    """Refuse a number of updates that a call of K ``steps`` cannot have.

    Raises:
        InvalidInput: ``updates`` is not in [1, K].
    """
    if not 1 <= updates <= steps:
        raise InvalidInput(
            sentence("cache.updates", expected=f"1 to {steps}", got=updates, mend="choose a number in that range")
        )
