"""Trials judge by the actions, and search finds what it may within its budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toys import PROVENANCE, random_inputs, random_schedule, small_network

from bac.errors import InvalidInput, Mismatch
from bac.executors import EagerExecutor, ExecutorKind
from bac.methods import LastStep, Objective, Search, full_schedule
from bac.passes import optimise
from bac.plan import cost, lower
from bac.schedule import Provenance
from bac.trials import Trials
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, ddpm

STEPS = 12
SAMPLER = ddpm(DiffusionProcess(train_steps=STEPS))
TRUNK = DiffusionTransformerTrunk(small_network())
OBSERVED, NOISE = random_inputs(1, batch=3, steps=STEPS)
EXECUTED = slice(1, 3)
FULL = cost(lower(full_schedule(TRUNK.blocks, STEPS, PROVENANCE)), TRUNK.cost).planned


@pytest.fixture(scope="module")
def trials() -> Trials:
    return Trials(TRUNK, SAMPLER, PROVENANCE, OBSERVED, NOISE, EXECUTED, ExecutorKind.EAGER)


def search(share: float, trials: int = 40) -> Search:
    return Search(gflops=share * FULL / 1e9, trials=trials)


def test_error_is_of_the_executed_actions(trials: Trials) -> None:
    schedule = random_schedule(0, STEPS, TRUNK.blocks)
    chunk, uncached = (
        EagerExecutor(optimise(lower(each)), TRUNK, SAMPLER)(OBSERVED, NOISE)
        for each in (schedule, full_schedule(TRUNK.blocks, STEPS, PROVENANCE))
    )
    expected = (chunk - uncached)[:, 1:3].abs().mean(dim=(1, 2))
    assert trials.action_errors(schedule) == pytest.approx(expected.numpy(), abs=1e-6)
    assert (trials.action_errors(full_schedule(TRUNK.blocks, STEPS, PROVENANCE)) == 0).all()


def test_trials_refuse_a_schedule_of_another_policy(trials: Trials) -> None:
    foreign = replace(random_schedule(0, STEPS, TRUNK.blocks), provenance=Provenance("beef", {}))
    with pytest.raises(Mismatch):
        trials.action_errors(foreign)


@pytest.mark.parametrize("last_step", list(LastStep))
def test_finds_within_the_budget_what_no_beginning_was(trials: Trials, last_step: LastStep) -> None:
    method = replace(search(0.4), last_step=last_step)
    told: list[float] = []
    found = method.find(trials, told.append)
    assert trials.flops(found) <= method.gflops * 1e9
    assert found.mask[:, 0].all()
    assert last_step is LastStep.FREE or found.mask[:, -1].all()
    assert len(told) == method.trials
    assert told == sorted(told, reverse=True)
    assert trials.action_errors(found).mean() == told[-1]
    # The first eight are the late schedules; random exchange must have found better.
    assert told[-1] < told[7]
    assert found.parameters == method.parameters


def test_equal_seeds_find_equal_schedules(trials: Trials) -> None:
    first, second, other = (replace(search(0.4), seed=seed).find(trials) for seed in (3, 3, 4))
    assert np.array_equal(first.mask, second.mask)
    assert not np.array_equal(first.mask, other.mask)


def test_more_budget_errs_less(trials: Trials) -> None:
    little, much = (trials.action_errors(search(share).find(trials)).mean() for share in (0.3, 0.7))
    assert much < little


def test_worst_case_looks_at_the_upper_quantile() -> None:
    errors = np.arange(11.0)
    assert Objective.MEAN.of(errors) == 5
    assert Objective.WORST.of(errors) == 9


def test_refuses_a_budget_below_one_update(trials: Trials) -> None:
    with pytest.raises(InvalidInput, match=r"cache\.gflops: expected at least"):
        search(0.05).find(trials)


def test_the_least_budget_has_nothing_to_exchange(trials: Trials) -> None:
    fixed = np.zeros((len(TRUNK.blocks), STEPS), dtype=bool)
    fixed[:, [0, -1]] = True
    least = cost(lower(replace(random_schedule(0, STEPS, TRUNK.blocks), mask=fixed)), TRUNK.cost).planned
    found = Search(gflops=least / 1e9, trials=12).find(trials)
    assert np.array_equal(found.mask, fixed)
