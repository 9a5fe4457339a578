"""Trials judge by the actions, and search finds what it may within its budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toys import PROVENANCE, random_inputs, random_profile, random_schedule, small_network

from bac.errors import InvalidInput, Mismatch
from bac.executors import EagerExecutor, ExecutorKind
from bac.methods import LastStep, Objective, Search, SensitivityWeighted, full_schedule
from bac.passes import optimise
from bac.plan import Plan, cost, lower
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule, Provenance
from bac.timing import Latency
from bac.trials import Trials
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, ddim, ddpm

STEPS = 12
SAMPLER = ddpm(DiffusionProcess(train_steps=STEPS))
TRUNK = DiffusionTransformerTrunk(small_network())
OBSERVED, NOISE = random_inputs(1, batch=8, steps=STEPS)
EXECUTED = slice(1, 3)
FULL = cost(lower(full_schedule(TRUNK.blocks, STEPS, PROVENANCE)), TRUNK.cost).planned


@pytest.fixture(scope="module")
def trials() -> Trials:
    return Trials(TRUNK, SAMPLER, PROVENANCE, OBSERVED, NOISE, EXECUTED, ExecutorKind.EAGER)


def search(share: float, trials: int = 100) -> Search:
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
    found = method.find(trials, on_trial=told.append)
    assert trials.flops(found) <= method.gflops * 1e9
    assert found.mask[:, 0].all()
    assert last_step is LastStep.FREE or found.mask[:, -1].all()
    assert len(told) == method.trials
    # Eight observations are all drawn each time; the same arithmetic in batches of another size.
    assert trials.action_errors(found).mean() == pytest.approx(told[-1], abs=1e-6)
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


def test_begins_at_the_weighted_schedule_of_a_profile(trials: Trials) -> None:
    profile = replace(
        random_profile(seed=0, steps=STEPS, blocks=TRUNK.blocks), sensitivity=np.geomspace(1e-3, 1, STEPS)
    )
    weighted = [SensitivityWeighted(updates).schedule(profile) for updates in range(1, STEPS + 1)]
    method = search(0.5, trials=9)  # eight late ones, and this
    widest = max((each for each in weighted if trials.flops(each) <= method.gflops * 1e9), key=trials.flops)
    late_alone = trials.action_errors(search(0.5, trials=8).find(trials)).mean()
    found = trials.action_errors(method.find(trials, profile)).mean()
    assert found == pytest.approx(min(trials.action_errors(widest).mean(), late_alone), abs=1e-6)


def test_part_of_the_observations_is_judged_alone(trials: Trials) -> None:
    schedule = random_schedule(0, STEPS, TRUNK.blocks)
    whole = trials.action_errors(schedule)
    assert len(trials) == len(whole) == 8
    assert trials.action_errors(schedule, np.arange(8) % 4 == 2) == pytest.approx(whole[[2, 6]], abs=1e-6)


def test_comparisons_draw_anew_and_stop_after_a_lost_heat() -> None:
    judged: list[list[int]] = []

    class Counting(Trials):
        def action_errors(self, schedule: CacheSchedule, rows: np.ndarray | None = None) -> np.ndarray:
            judged.append(np.flatnonzero(rows).tolist())
            return super().action_errors(schedule, rows)

    observed, noise = random_inputs(1, batch=96, steps=STEPS)
    Search(gflops=0.4 * FULL / 1e9, trials=20).find(
        Counting(TRUNK, SAMPLER, PROVENANCE, observed, noise, EXECUTED, ExecutorKind.EAGER)
    )
    heats = [rows for rows in judged if len(rows) == 16]
    assert len({tuple(rows) for rows in heats}) > 15, "each comparison draws its observations anew"
    assert max(map(len, judged)) == 48, "the rest of a comparison of 64"
    assert sum(map(len, judged)) < 2 * 20 * 64, "a lost heat ends it, and what is known is not measured again"


def test_only_a_gain_above_its_standard_error_counts() -> None:
    old = np.array([1.0, 2.0, 3.0, 4.0])
    assert Objective.MEAN.prefers(old - 0.1, old)
    assert not Objective.MEAN.prefers(old, old)
    # The mean gain of 0.25 has a standard error of 0.25.
    assert not Objective.MEAN.prefers(old - [1, 0, 0, 0], old)
    assert Objective.MEAN.prefers(old - [1, 0, 1, 0], old)
    # The quantile must fall as well.
    assert not Objective.WORST.prefers(old - [1, 1, 0, 0], old)
    assert Objective.WORST.prefers(old - [0, 0, 1, 1], old)
    assert Objective.MEAN.prefers(np.array([1.0]), np.array([2.0]))


def test_a_latency_budget_counts_measured_milliseconds(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    times = np.tile([1.0, 2.0, 4.0], len(TRUNK.blocks) // 3)
    monkeypatch.setattr(trials, "block_times", lambda: (times, 3.0))
    found = Search(gflops=None, latency_ms=60, trials=20).find(trials)
    assert 3 + times @ found.mask.sum(axis=1) <= 60
    assert found.updates > 2 * len(TRUNK.blocks)
    with pytest.raises(InvalidInput, match=r"cache\.latency_ms: expected at least 31, got 30; raise the budget"):
        Search(gflops=None, latency_ms=30).find(trials)


def test_block_times_are_differences_of_whole_calls(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    # A call in which nothing updates takes 5 ms, an update of sa 1, of ca 2, of ffn 3.
    each = {"sa": 1.0, "ca": 2.0, "ffn": 3.0}

    def told(candidates: dict[str, Any], **_: object) -> dict[str, Latency]:
        base = 5 + 2 * sum(each.values())
        taken = {kind: base + (2 * (STEPS - 1) * each[kind] if kind else 0) for kind in candidates}
        return {kind: Latency(ms, ms, ms, 0, 1) for kind, ms in taken.items()}

    monkeypatch.setattr("bac.trials.measure_interleaved", told)
    times, rest = trials.block_times()
    assert times.tolist() == [each[block.kind] for block in TRUNK.blocks]
    assert rest == 5


class OnGpu(DiffusionTransformerTrunk):
    """Says that it is on a GPU, which decides what runs it, and is not."""

    device = torch.device("cuda:0")

    def step_tables(self, timesteps: np.ndarray) -> Any:
        return DiffusionTransformerTrunk(self._network).step_tables(timesteps)


def test_on_a_gpu_trials_capture_nothing_and_block_times_do(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Plan] = []

    class Graph(EagerExecutor):
        def __init__(self, plan: Plan, trunk: DiffusionTransformerTrunk, sampler: SamplerTable) -> None:
            super().__init__(plan, trunk, sampler)
            captured.append(plan)

    def told(candidates: dict[str, Any], **_: object) -> dict[str, Latency]:
        return dict.fromkeys(candidates, Latency(1, 1, 1, 0, 1))

    monkeypatch.setattr("bac.executors.selection.CudaGraphExecutor", Graph)
    monkeypatch.setattr("bac.trials.measure_interleaved", told)
    on_gpu = Trials(OnGpu(small_network()), SAMPLER, PROVENANCE, OBSERVED, NOISE, EXECUTED)
    schedule = random_schedule(0, STEPS, TRUNK.blocks)
    assert np.array_equal(on_gpu.action_errors(schedule), trials.action_errors(schedule))
    assert captured == []
    on_gpu.block_times()
    assert len(captured) == 4


def test_a_search_has_one_budget() -> None:
    for gflops, latency_ms in ((None, None), (2.0, 40.0)):
        with pytest.raises(InvalidInput, match="cache=search: expected one of gflops and latency_ms, got"):
            Search(gflops, latency_ms)
    assert Search(None, 40).label == "search-40ms"


def test_worst_case_looks_at_the_upper_quantile() -> None:
    errors = np.arange(11.0)
    assert Objective.MEAN.of(errors) == 5
    assert Objective.WORST.of(errors) == 9


def test_refuses_a_budget_below_one_update(trials: Trials) -> None:
    with pytest.raises(InvalidInput, match=r"cache\.gflops: expected at least"):
        search(0.05).find(trials)


def test_predictions_are_searched_too() -> None:
    sampler = ddim(DiffusionProcess(train_steps=100, clip=1e9), STEPS)  # no noise between the steps to amplify
    provenance = Provenance("toy", sampler.identity)
    smooth = Trials(TRUNK, sampler, provenance, OBSERVED, NOISE, EXECUTED, ExecutorKind.EAGER)
    found = search(0.6, trials=80).find(smooth)
    assert found.forecast is not None
    sloped = {block for block in range(len(TRUNK.blocks)) if (found.forecast[block, :, 1] != 0).any()}
    held = set(range(len(TRUNK.blocks))) - sloped
    assert sloped
    for block in range(len(TRUNK.blocks)):
        for step in np.flatnonzero(~found.mask[block]):
            latest, *earlier = np.flatnonzero(found.mask[block, :step])[::-1]
            ahead = (step - latest) / (latest - earlier[0]) if earlier and block in sloped else 0
            expected = ((latest, 1 + ahead), (earlier[0], -ahead)) if ahead else ((latest, 1.0),)
            assert np.allclose(found.terms(block, int(step)), expected)
    without = replace(found, forecast=None)
    assert smooth.action_errors(found).mean() < smooth.action_errors(without).mean(), held


def test_the_least_budget_has_nothing_to_exchange(trials: Trials) -> None:
    fixed = np.zeros((len(TRUNK.blocks), STEPS), dtype=bool)
    fixed[:, [0, -1]] = True
    least = cost(lower(replace(random_schedule(0, STEPS, TRUNK.blocks), mask=fixed)), TRUNK.cost).planned
    found = Search(gflops=least / 1e9, trials=12).find(trials)
    assert np.array_equal(found.mask, fixed)
