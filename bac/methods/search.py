"""Search: the schedule with the smallest error of the actions themselves, found by trying.

Ours. Every other method minimises a stand-in (similarity, reuse error, a fixed pattern); this one runs the candidates
on calibration observations and keeps what leaves the executed actions nearest to the uncached ones. It begins at the
best ``late`` schedule that the budget allows and goes on by random exchange: take some updates away, spend what that
frees on others, keep the change if it helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

import numpy as np

from bac.errors import InvalidInput, MissingArtefact, sentence
from bac.methods.base import LastStep, Parametrised
from bac.methods.late import late_steps
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule
from bac.trials import Trials

_POWERS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
_ATTEMPTS = 20
"""Proposals for what an exchange freed, and exchanges until one changes something."""

_KINDS = 3
_SHIFTS = np.array([-8, -4, -3, -2, -1, 1, 2, 3, 4, 8])


class Objective(StrEnum):
    """What is minimised over the calibration observations: the mean error, or its 90 % quantile."""

    MEAN = "mean"
    WORST = "worst"

    def of(self, errors: np.ndarray) -> float:
        """Return one number of the errors float64[N]."""
        return float(errors.mean() if self is Objective.MEAN else np.quantile(errors, 0.9))


@dataclass(frozen=True)
class Search(Parametrised):
    """Search within a budget.

    Attributes:
        gflops: what a call may compute, at batch 1.
        trials: candidates judged, those of the start included.
        objective: what is minimised.
        seed: of the exchanges; equal seeds find equal schedules.
        last_step: forced also updates at step K - 1.
    """

    gflops: float = 2.4
    trials: int = 1500
    objective: Objective = Objective.MEAN
    seed: int = 0
    last_step: LastStep = LastStep.FORCED
    name: str = "search"

    @property
    def label(self) -> str:
        """Name with the budget, and with what distinguishes two searches of one budget."""
        objective = "" if self.objective is Objective.MEAN else f"-{self.objective}"
        return f"{self.name}{objective}{f'-seed{self.seed}' if self.seed else ''}-{self.gflops:g}g"

    def with_budget(self, budget: float) -> Self:
        """Return the method with ``budget`` GFLOPs."""
        return replace(self, gflops=float(budget))

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Refuse: a profile is not enough.

        Raises:
            MissingArtefact: always; what ``find`` found is kept beside the checkpoint.
        """
        raise MissingArtefact(
            sentence(
                f"schedule {self.label}",
                expected="one found by trials",
                got="none with these parameters",
                mend=f"run scripts/calibrate.py cache=search cache.gflops={self.gflops:g}",
            )
        )

    def find(self, trials: Trials, on_trial: Callable[[float], object] = lambda best: None) -> CacheSchedule:
        """Return the best schedule of all trials.

        Args:
            trials: judges candidates.
            on_trial: called after each trial with the best objective so far.

        Raises:
            InvalidInput: the budget does not even allow one update of every block.
        """
        space = _Space(trials, self.gflops * 1e9, self.last_step)
        draw = np.random.default_rng(self.seed)
        best, best_mask, judged = np.inf, None, 0
        beginnings = list(space.beginnings())
        while judged < self.trials:
            mask = beginnings.pop(0) if beginnings or best_mask is None else space.exchanged(best_mask, draw)
            found = self.objective.of(trials.action_errors(self._schedule(trials, mask)))
            judged += 1
            if found < best:
                best, best_mask = found, mask
            on_trial(best)
        assert best_mask is not None  # there is always a beginning
        return self._schedule(trials, best_mask)

    def _schedule(self, trials: Trials, mask: np.ndarray) -> CacheSchedule:
        return CacheSchedule(mask, trials.trunk.blocks, trials.provenance, self.name, self.parameters)


class _Space:
    """Masks bool[blocks, K] within a budget, and the ways from one to another."""

    def __init__(self, trials: Trials, flops: float, last_step: LastStep) -> None:
        cost, steps = trials.trunk.cost, trials.sampler.steps
        self._cost = np.array(cost.branch, dtype=np.float64)
        self._steps = steps
        self._room = flops - cost.step * steps - cost.call
        self._fixed = np.zeros((len(self._cost), steps), dtype=bool)
        self._fixed[:, [0, steps - 1] if last_step is LastStep.FORCED else [0]] = True
        if self._spent(self._fixed) > self._room:
            least = (flops - self._room + self._spent(self._fixed)) / 1e9
            raise InvalidInput(
                sentence("cache.gflops", expected=f"at least {least:.2f}", got=flops / 1e9, mend="raise the budget")
            )

    def beginnings(self) -> Iterator[np.ndarray]:
        """Yield the ``late`` schedules of several powers that the budget just allows."""
        for power in _POWERS:
            mask = self._fixed
            for updates in range(1, self._steps + 1):
                wider = self._fixed.copy()
                wider[:, late_steps(updates, self._steps, power)] = True
                if self._spent(wider) > self._room:
                    break
                mask = wider
            yield mask

    def exchanged(self, mask: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Return a neighbour within the budget: some updates gone, others in their place; the mask if there is none."""
        for _ in range(_ATTEMPTS):
            changed = mask.copy()
            self._take_away(changed, draw)
            for _ in range(_ATTEMPTS):
                wider = changed.copy()
                wider[self._rows(draw), self._column(mask, draw)] = True
                if self._spent(wider) <= self._room:
                    changed = wider
            if self._spent(changed) <= self._room and not np.array_equal(changed, mask):
                return changed
        return mask

    def _take_away(self, mask: np.ndarray, draw: np.random.Generator) -> None:
        """Remove some blocks' updates at one step, or move them a little earlier or later."""
        columns = np.flatnonzero((mask & ~self._fixed).any(axis=0))
        if not len(columns):
            return
        rows, column = self._rows(draw), int(draw.choice(columns))
        taken = mask[rows, column]
        mask[rows, column] = self._fixed[rows, column]
        if draw.random() < 0.5:
            moved = int(np.clip(column + draw.choice(_SHIFTS), 0, self._steps - 1))
            mask[rows, moved] |= taken

    def _rows(self, draw: np.random.Generator) -> np.ndarray:
        """Choose blocks: all, all of a kind, all of some neighbouring layers, or one."""
        every = np.arange(len(self._cost))
        layers = len(every) // _KINDS
        match int(draw.integers(4)):
            case 0:
                return every
            case 1:
                return every[int(draw.integers(_KINDS)) :: _KINDS]
            case 2:
                first, last = sorted(draw.integers(layers, size=2))
                return every[first * _KINDS : (last + 1) * _KINDS]
            case _:
                return every[[int(draw.integers(len(every)))]]

    def _column(self, mask: np.ndarray, draw: np.random.Generator) -> int:
        """Choose a step: mostly one near present updates, since that is where updates pay, else any."""
        if draw.random() < 0.2:
            return int(draw.integers(1, self._steps))
        near = int(draw.choice(np.flatnonzero(mask.any(axis=0)))) + int(draw.choice([0, 0, *_SHIFTS]))
        return int(np.clip(near, 1, self._steps - 1))

    def _spent(self, mask: np.ndarray) -> float:
        return float(self._cost @ mask.sum(axis=1))
