"""Search: the schedule with the smallest error of the actions themselves, found by trying.

Ours. Every other method minimises a stand-in (similarity, reuse error, a fixed pattern); this one runs the candidates
on calibration observations and keeps what leaves the executed actions nearest to the uncached ones. It begins at the
best of the ``late`` and ``bac_weighted`` schedules that the budget allows and goes on by random exchange: take some
updates away, spend what that frees on others, or predict some blocks by their latest slope instead of holding them, and
keep what helps.

What is best on a few observations is best by luck: a search that keeps whatever lowers the error of the same ones fits
those. So every comparison draws its observations anew from many more, and the leader gives way only to a gain above its
standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from typing_extensions import Self

from bac.choices import Choice
from bac.errors import InvalidInput, MissingArtefact, sentence
from bac.methods.bac_weighted import SensitivityWeighted
from bac.methods.base import LastStep, Parametrised
from bac.methods.forecast import differences, forecast_of
from bac.methods.late import late_steps
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule
from bac.trials import Trials

_POWERS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
_ATTEMPTS = 20
"""Proposals for what an exchange freed, and exchanges until one changes something."""

_FIRST_HEAT, _ALL_HEATS = 16, 64
_SLACK = 1.05
"""Observations of a comparison, of its first heat and in all, and by how much a candidate may lose the first heat."""

_PREDICTIONS = 0.1
"""Share of the exchanges that change how blocks are predicted, and not when they update."""

_KINDS = 3
_SHIFTS = np.array([-8, -4, -3, -2, -1, 1, 2, 3, 4, 8])


class Objective(Choice):
    """What is minimised over the calibration observations: the mean error, or its 90 % quantile."""

    MEAN = "mean"
    WORST = "worst"

    def of(self, errors: np.ndarray) -> float:
        """Return one number of the errors float64[N]."""
        return float(errors.mean() if self is Objective.MEAN else np.quantile(errors, 0.9))

    def prefers(self, new: np.ndarray, old: np.ndarray) -> bool:
        """Return whether errors float64[N] are lower than others of the same observations, and not by chance alone."""
        gain = old - new
        if self is Objective.WORST and self.of(new) >= self.of(old):
            return False
        return bool(gain.mean() > (gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else 0))


@dataclass(frozen=True)
class Search(Parametrised):
    """Search within a budget.

    Attributes:
        gflops: what a call may compute, at batch 1; None if ``latency_ms`` is given.
        latency_ms: what a call may take on the machine that searches, by a model of its blocks' times
            (``Trials.block_times``); None if ``gflops`` is given.
        trials: candidates judged, those of the start included.
        objective: what is minimised.
        seed: of the exchanges; equal seeds find equal schedules.
        last_step: forced also updates at step K - 1.
    """

    gflops: float | None = 2.38
    latency_ms: float | None = None
    trials: int = 500
    objective: Objective = Objective.MEAN
    seed: int = 0
    last_step: LastStep = LastStep.FORCED
    name: str = "search"

    def __post_init__(self) -> None:
        """Refuse no budget, and two of them."""
        if (self.gflops is None) == (self.latency_ms is None):
            raise InvalidInput(
                sentence(
                    "cache=search",
                    expected="one of gflops and latency_ms",
                    got=f"{self.gflops} and {self.latency_ms}",
                    mend="set the other to null",
                )
            )

    @property
    def budget(self) -> str:
        """The budget as text, with what distinguishes two searches of one budget."""
        budget = f"{self.latency_ms:g}ms" if self.gflops is None else f"{self.gflops:g}g"
        objective = "" if self.objective is Objective.MEAN else f"-{self.objective}"
        return f"{budget}{objective}{f'-seed{self.seed}' if self.seed else ''}"

    def with_budget(self, budget: float) -> Self:
        """Return the method with a budget of ``budget`` GFLOPs."""
        return replace(self, gflops=float(budget), latency_ms=None)

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
                mend="run scripts/calibrate.py with the same cache=search and its values",
            )
        )

    def find(
        self,
        trials: Trials,
        profile: FeatureProfile | None = None,
        on_trial: Callable[[float], object] = lambda best: None,
    ) -> CacheSchedule:
        """Return the schedule that no other beat.

        Args:
            trials: judges candidates.
            profile: with the sensitivity of steps, gives another beginning: the ``bac_weighted`` schedule.
            on_trial: called after each trial with the leader's objective over the observations it was compared on.

        Raises:
            InvalidInput: the budget does not even allow one update of every block.
        """
        space = self._space(trials)
        draw = np.random.default_rng(self.seed)
        beginnings = space.beginnings(profile)
        leader = _Judged(next(beginnings), trials, self._schedule)
        for _ in range(self.trials):
            candidate = next(beginnings, None) or space.neighbour(leader.candidate, draw)
            challenger = _Judged(candidate, trials, self._schedule)
            rows = draw.permutation(len(trials))[:_ALL_HEATS]
            if self._wins(challenger, leader, rows):
                leader = challenger
            on_trial(self.objective.of(leader.known))
        return self._schedule(trials, leader.candidate)

    def _wins(self, challenger: _Judged, leader: _Judged, rows: np.ndarray) -> bool:
        """Compare on the first rows, and unless the challenger loses there, on all."""
        first = rows[:_FIRST_HEAT]
        if self.objective.of(challenger.errors(first)) > _SLACK * self.objective.of(leader.errors(first)):
            return False
        return self.objective.prefers(challenger.errors(rows), leader.errors(rows))

    def _space(self, trials: Trials) -> _Space:
        if self.latency_ms is not None:
            times, rest = trials.block_times()
            return _Space("latency_ms", times, trials.sampler.steps, self.latency_ms, rest, self.last_step)
        assert self.gflops is not None
        cost, steps = trials.trunk.cost, trials.sampler.steps
        gigas = np.array(cost.branch) / 1e9
        return _Space("gflops", gigas, steps, self.gflops, (cost.step * steps + cost.call) / 1e9, self.last_step)

    def _schedule(self, trials: Trials, candidate: _Candidate) -> CacheSchedule:
        blocks, forecast = trials.trunk.blocks, candidate.forecast()
        return CacheSchedule(candidate.mask, blocks, trials.provenance, self.name, self.parameters, forecast)


@dataclass(frozen=True)
class _Candidate:
    """What is searched.

    Attributes:
        mask: bool[blocks, K].
        sloped: bool[blocks], which blocks are predicted by their latest slope where they are reused.
    """

    mask: np.ndarray
    sloped: np.ndarray

    def forecast(self) -> np.ndarray | None:
        """Return the predictions of ``CacheSchedule``, None if all blocks hold."""
        if not self.sloped.any():
            return None
        held, along = (forecast_of(self.mask, 2, rule) for rule in (_hold, _along_the_slope))
        return np.where(self.sloped[:, None, None], along, held)


def _hold(seen: np.ndarray, step: int) -> np.ndarray:
    return np.eye(len(seen))[0]


def _along_the_slope(seen: np.ndarray, step: int) -> np.ndarray:
    latest, *slope = differences(seen, min(1, len(seen) - 1))
    return latest + (step - seen[0]) * slope[0] if slope else latest


class _Judged:
    """A candidate and its errors, each observation's measured when it is first asked for."""

    def __init__(
        self, candidate: _Candidate, trials: Trials, schedule: Callable[[Trials, _Candidate], CacheSchedule]
    ) -> None:
        self.candidate = candidate
        self._trials = trials
        self._schedule = schedule(trials, candidate)
        self._errors = np.full(len(trials), np.nan)

    @property
    def known(self) -> np.ndarray:
        """The errors measured so far."""
        return self._errors[~np.isnan(self._errors)]

    def errors(self, rows: np.ndarray) -> np.ndarray:
        """Return the errors of observations int64[n]."""
        missing = np.zeros(len(self._errors), dtype=bool)
        missing[rows] = np.isnan(self._errors[rows])
        if missing.any():
            self._errors[missing] = self._trials.action_errors(self._schedule, missing)
        return self._errors[rows]


class _Space:
    """Candidates within a budget, and the ways from one to another."""

    def __init__(
        self, unit: str, costs: np.ndarray, steps: int, budget: float, rest: float, last_step: LastStep
    ) -> None:
        self._costs = costs
        self._steps = steps
        self._room = budget - rest
        self._fixed = np.zeros((len(costs), steps), dtype=bool)
        self._fixed[:, [0, steps - 1] if last_step is LastStep.FORCED else [0]] = True
        if not self._fits(self._fixed):
            least = rest + self._spent(self._fixed)
            raise InvalidInput(
                sentence(f"cache.{unit}", expected=f"at least {least:.4g}", got=budget, mend="raise the budget")
            )

    def beginnings(self, profile: FeatureProfile | None) -> Iterator[_Candidate]:
        """Yield the ``late`` schedules of several powers that the budget just allows, and the ``bac_weighted`` one."""
        makers: list[Callable[[int], np.ndarray]] = [partial(self._late, power) for power in _POWERS]
        if profile is not None and profile.sensitivity is not None:
            makers.append(lambda updates: SensitivityWeighted(updates).schedule(profile).mask)
        for mask_of in makers:
            yield _Candidate(self._widest(mask_of), np.zeros(len(self._costs), dtype=bool))

    def neighbour(self, candidate: _Candidate, draw: np.random.Generator) -> _Candidate:
        """Return a candidate with other updates or, now and then, with other predictions."""
        if draw.random() < _PREDICTIONS:
            sloped = candidate.sloped.copy()
            rows = self._rows(draw)
            sloped[rows] = ~sloped[rows]
            return replace(candidate, sloped=sloped)
        return replace(candidate, mask=self._exchanged(candidate.mask, draw))

    def _late(self, power: float, updates: int) -> np.ndarray:
        return np.isin(np.arange(self._steps), late_steps(updates, self._steps, power))

    def _widest(self, mask_of: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return the mask of as many updates as the budget allows."""
        widest = self._fixed
        for updates in range(1, self._steps + 1):
            mask = self._fixed | mask_of(updates)
            if not self._fits(mask):
                break
            widest = mask
        return widest

    def _exchanged(self, mask: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Return a mask within the budget: some updates gone, others in their place; the same one if there is none."""
        for _ in range(_ATTEMPTS):
            changed = mask.copy()
            self._take_away(changed, draw)
            for _ in range(_ATTEMPTS):
                wider = changed.copy()
                wider[self._rows(draw), self._column(mask, draw)] = True
                if self._fits(wider):
                    changed = wider
            if self._fits(changed) and not np.array_equal(changed, mask):
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
        """Choose blocks: all, all of a kind, or all of some neighbouring layers.

        All together most often: the coarser the choice, the less it can fit the observations alone.
        """
        every = np.arange(len(self._costs))
        layers = len(every) // _KINDS
        match int(draw.integers(4)):
            case 0:
                return every[int(draw.integers(_KINDS)) :: _KINDS]
            case 1:
                first, last = sorted(draw.integers(layers, size=2))
                return every[first * _KINDS : (last + 1) * _KINDS]
            case _:
                return every

    def _column(self, mask: np.ndarray, draw: np.random.Generator) -> int:
        """Choose a step: mostly one near present updates, since that is where updates pay, else any."""
        if draw.random() < 0.2:
            return int(draw.integers(1, self._steps))
        near = int(draw.choice(np.flatnonzero(mask.any(axis=0)))) + int(draw.choice([0, 0, *_SHIFTS]))
        return int(np.clip(near, 1, self._steps - 1))

    def _fits(self, mask: np.ndarray) -> bool:
        return self._spent(mask) <= self._room

    def _spent(self, mask: np.ndarray) -> float:
        return float(self._costs @ mask.sum(axis=1))
