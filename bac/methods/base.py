"""What every caching method is: a feature profile in, a cache schedule out."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
from typing_extensions import Self

from bac.choices import Choice
from bac.errors import InvalidInput, sentence
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule


class LastStep(Choice):
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

    @property
    def parameters(self) -> dict[str, Any]:
        """What a schedule says it was made with."""

    def with_budget(self, budget: float) -> Self:
        """Return the method with another budget: updates S, or GFLOPs.

        Raises:
            InvalidInput: a budget that the method cannot have.
        """

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Choose the update steps of every block."""


class Parametrised:
    """A method that is a dataclass: its attributes are its parameters."""

    name: str
    last_step: LastStep

    @property
    def label(self) -> str:
        """Name with the budget, and ``free`` if the last step is."""
        return f"{self.name}-{self.budget}{'-free' if self.last_step is LastStep.FREE else ''}"

    @property
    def budget(self) -> str:
        """The budget as text, for instance ``s10``."""
        raise NotImplementedError

    @property
    def parameters(self) -> dict[str, Any]:
        """What a schedule says it was made with."""
        return {name: value for name, value in asdict(self).items() if name != "name"}  # type: ignore[call-overload]

    def made(
        self, profile: FeatureProfile, mask: np.ndarray, forecast: np.ndarray | None = None, **more: np.ndarray
    ) -> CacheSchedule:
        """Return the schedule of a mask bool[blocks, K], or bool[K] for all blocks, made from ``profile``.

        ``more`` are other arrays of the schedule, by their names there.
        """
        mask = np.broadcast_to(mask, (len(profile.blocks), profile.steps))
        return CacheSchedule(mask, profile.blocks, profile.provenance, self.name, self.parameters, forecast, **more)


class ByUpdates(Parametrised):
    """What methods have in common whose budget is S, the number of updates."""

    updates: int

    @property
    def budget(self) -> str:
        """The budget as text."""
        return f"s{self.updates}"

    def with_budget(self, budget: float) -> Self:
        """Return the method with S = ``budget``.

        Raises:
            InvalidInput: S is not a whole number.
        """
        if not float(budget).is_integer():
            raise InvalidInput(
                sentence("cache.updates", expected="a whole number", got=budget, mend="choose one beside it")
            )
        return replace(self, updates=int(budget))  # type: ignore[type-var]


class ByThreshold(Parametrised):
    """What methods have in common whose budget is a threshold: the larger, the fewer updates."""

    threshold: float

    def __post_init__(self) -> None:
        """Refuse a threshold that is not a number above 0."""
        if not 0 < self.threshold < float("inf"):
            raise InvalidInput(
                sentence("cache.threshold", expected="above 0", got=self.threshold, mend="choose a larger one")
            )

    @property
    def budget(self) -> str:
        """The budget as text."""
        return f"t{self.threshold:g}"

    def with_budget(self, budget: float) -> Self:
        """Return the method with threshold ``budget``."""
        return replace(self, threshold=float(budget))  # type: ignore[type-var]


def require_updates(updates: int, steps: int) -> None:
    """Refuse a number of updates that a call of K ``steps`` cannot have.

    Raises:
        InvalidInput: ``updates`` is not in [1, K].
    """
    if not 1 <= updates <= steps:
        raise InvalidInput(
            sentence("cache.updates", expected=f"1 to {steps}", got=updates, mend="choose a number in that range")
        )
