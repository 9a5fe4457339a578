"""The contract of every method, and what each of them chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from toys import BLOCKS, PROVENANCE, random_profile

from bac.errors import InvalidInput, MissingArtefact
from bac.methods import (
    AdamsBashforth,
    AsymRnR,
    BlockAdaptive,
    BwCache,
    CrossChunk,
    Downstream,
    ErtaCache,
    FoCa,
    HarmoniCa,
    HyCa,
    IntervalScore,
    LastStep,
    Late,
    Method,
    NoCache,
    Objective,
    Opening,
    ProfilingDit,
    Search,
    SensitivityWeighted,
    Sharing,
    SkipCache,
    TaylorSeer,
    TeaCache,
    ToCa,
    Uniform,
    adaptive_update_steps,
)
from bac.methods.bac_weighted import smoothed
from bac.methods.base import ByUpdates
from bac.methods.harmonica import spread_gates
from bac.methods.late import late_steps
from bac.profile import Metric
from bac.schedule import CacheSchedule
from bac.trunk import Block, BlockKind

STEPS = 20
DRAW = np.random.default_rng(0)
PROFILE = replace(
    random_profile(seed=5, steps=STEPS),
    sensitivity=np.geomspace(1e-3, 1, STEPS),
    stream_change=DRAW.random((len(BLOCKS) + 1, STEPS)),
    residual_change=DRAW.random((STEPS, STEPS)),
    residual_slope=DRAW.random((STEPS, STEPS)),
    gates=DRAW.random((len(BLOCKS), STEPS)),
    attention=DRAW.random((2, STEPS, 5)),
    token_likeness=DRAW.random((len(BLOCKS), STEPS, 4)),
    solver_mse=DRAW.random((3, 5, len(BLOCKS), 16)),
    channel_dynamics=DRAW.random((3, len(BLOCKS), 16)),
)
METHODS = [
    NoCache(),
    Uniform(updates=4),
    BlockAdaptive(updates=4, upstream_blocks=2),
    Late(updates=4),
    SensitivityWeighted(updates=4),
    SensitivityWeighted(updates=4, sharing=Sharing.NONE),
    TaylorSeer(updates=4),
    AdamsBashforth(updates=4),
    FoCa(updates=4),
    HyCa(updates=4),
    SkipCache(updates=4),
    ProfilingDit(updates=4, cached_layers=1),
    BwCache(threshold=0.5),
    TeaCache(threshold=0.5),
    ErtaCache(threshold=0.5),
    HarmoniCa(updates=4, opening=Opening.LARGEST),
    ToCa(updates=4),
    AsymRnR(updates=4),
    CrossChunk(updates=4),
    HarmoniCa(updates=4, opening=Opening.SPREAD),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_contract(method: Method) -> None:
    schedule = method.schedule(PROFILE)
    assert (schedule.blocks, schedule.provenance, schedule.method) == (BLOCKS, PROVENANCE, method.name)
    assert schedule.steps == STEPS
    assert schedule.mask[:, 0].all()
    # Enum-valued parameters come back from the text as their names.
    read = CacheSchedule.from_json(json.loads(json.dumps(schedule.to_json())))
    assert np.array_equal(read.mask, schedule.mask)
    assert read.digest == schedule.digest
    assert read.parameters == schedule.parameters


def test_no_cache_updates_all() -> None:
    assert NoCache().schedule(PROFILE).updates == len(BLOCKS) * STEPS


@pytest.mark.parametrize(
    ("updates", "last_step", "steps"),
    [
        (1, LastStep.FREE, [0]),
        (1, LastStep.FORCED, [0, 19]),
        (4, LastStep.FREE, [0, 5, 10, 15]),
        (4, LastStep.FORCED, [0, 5, 10, 15, 19]),
        (3, LastStep.FREE, [0, 6, 13]),
        (20, LastStep.FREE, list(range(20))),
        (20, LastStep.FORCED, list(range(20))),
    ],
)
def test_uniform_steps(updates: int, last_step: LastStep, steps: list[int]) -> None:
    schedule = Uniform(updates, last_step=last_step).schedule(PROFILE)
    assert all(np.flatnonzero(row).tolist() == steps for row in schedule.mask)
    assert schedule.parameters == {"updates": updates, "last_step": last_step}


@pytest.mark.parametrize("score", list(IntervalScore))
@pytest.mark.parametrize("metric", list(Metric))
def test_block_adaptive_without_union_is_the_scheduler_per_block(metric: Metric, score: IntervalScore) -> None:
    method = BlockAdaptive(4, upstream_blocks=0, metric=metric, score=score, last_step=LastStep.FREE)
    chosen = [tuple(np.flatnonzero(row).tolist()) for row in method.schedule(PROFILE).mask]
    assert chosen == [adaptive_update_steps(block, 4, score) for block in PROFILE.similarity(metric)]


def test_block_adaptive_widens_the_blocks_that_err_most() -> None:
    plain = BlockAdaptive(4, upstream_blocks=0, last_step=LastStep.FREE).schedule(PROFILE).mask
    worst = int(PROFILE.values[Metric.L1].mean(axis=(1, 2)).argmax())
    assert worst < 3, "the toy profile should make a block of layer 0 the worst, so that strict and inclusive differ"
    for downstream, ffns in ((Downstream.INCLUSIVE, [2, 5]), (Downstream.STRICT, [5])):
        method = BlockAdaptive(4, upstream_blocks=1, downstream=downstream, last_step=LastStep.FREE)
        expected = plain.copy()
        expected[worst] |= plain[ffns].any(axis=0)
        assert np.array_equal(method.schedule(PROFILE).mask, expected)


def test_block_adaptive_last_step() -> None:
    free = BlockAdaptive(4, upstream_blocks=2, last_step=LastStep.FREE).schedule(PROFILE)
    forced = BlockAdaptive(4, upstream_blocks=2).schedule(PROFILE)
    assert not free.mask[:, -1].all()
    assert forced.mask[:, -1].all()
    assert np.array_equal(forced.mask[:, :-1], free.mask[:, :-1])


def test_block_adaptive_records_its_parameters() -> None:
    assert BlockAdaptive(4, 2, Metric.L1).schedule(PROFILE).parameters == {
        "updates": 4,
        "upstream_blocks": 2,
        "metric": "l1",
        "score": "anchor",
        "downstream": "inclusive",
        "last_step": "forced",
    }


@pytest.mark.parametrize(
    ("updates", "power", "steps"),
    [
        (5, 1, [0, 4, 8, 12, 16]),
        # 20 (1 - (1 - u)^2) at u = 0, .2, .4, .6, .8: 0, 7.2, 12.8, 16.8, 19.2.
        (5, 2, [0, 7, 13, 17, 19]),
        # 0, 17.5, 19.8, 20, 20, 20: the last ones make room for each other.
        (6, 11, [0, 16, 17, 18, 19, 20]),
        (21, 3, list(range(21))),
    ],
)
def test_late_steps(updates: int, power: float, steps: list[int]) -> None:
    assert late_steps(updates, 21, power).tolist() == steps


def test_late_steps_are_always_as_many_distinct_steps() -> None:
    for seed in range(200):
        draw = np.random.default_rng(seed)
        steps = int(draw.integers(1, 60))
        updates, power = int(draw.integers(1, steps + 1)), float(draw.uniform(1, 9))
        chosen = late_steps(updates, steps, power)
        assert chosen[0] == 0
        assert len(chosen) == updates
        assert (np.diff(chosen) > 0).all()
        assert chosen[-1] < steps


def test_late_is_one_schedule_for_all_and_forces_the_last_step() -> None:
    free = Late(5, 2, LastStep.FREE).schedule(PROFILE).mask
    assert (free == free[0]).all()
    assert np.flatnonzero(free[0]).tolist() == late_steps(5, STEPS, 2).tolist()
    assert np.flatnonzero(Late(5, 2).schedule(PROFILE).mask.all(axis=0)).tolist() == [0, 7, 12, 16, 18, 19]


def test_late_refuses_powers_that_crowd_the_beginning() -> None:
    for power in (0.5, float("nan")):
        with pytest.raises(InvalidInput, match=r"cache\.power: expected at least 1"):
            Late(4, power)


def test_weighted_minimises_squared_gain_times_squared_error() -> None:
    toy = random_profile(seed=2, steps=8)
    gains = np.random.default_rng(0).uniform(0.1, 2, 8)
    profile = replace(toy, sensitivity=gains)
    total = toy.values[Metric.MSE].astype(float).sum(axis=0) * smoothed(gains) ** 2

    def cost(steps: tuple[int, ...]) -> float:
        return sum(total[max(s for s in steps if s <= step), step] for step in range(8))

    method = SensitivityWeighted(3, upstream_blocks=0, last_step=LastStep.FREE)
    best = min(((0, *others) for others in combinations(range(1, 8), 2)), key=cost)
    assert [tuple(np.flatnonzero(row).tolist()) for row in method.schedule(profile).mask] == [best] * len(BLOCKS)
    own = replace(method, sharing=Sharing.NONE).schedule(profile)
    for row, block in zip(own.mask, toy.values[Metric.MSE], strict=True):
        total = block.astype(float) * smoothed(gains) ** 2
        best = min(((0, *others) for others in combinations(range(1, 8), 2)), key=cost)
        assert tuple(np.flatnonzero(row).tolist()) == best


def test_gains_are_smoothed_in_the_logarithm() -> None:
    assert smoothed(np.full(12, 0.25)) == pytest.approx(np.full(12, 0.25))
    spike = np.ones(20)
    spike[10] = 2.0**9
    assert smoothed(spike) == pytest.approx(np.where(abs(np.arange(20) - 10) <= 4, 2.0, 1.0))


def test_a_gain_of_zero_counts_as_very_little() -> None:
    gains = np.ones(20)
    gains[10] = 0
    assert smoothed(gains) == pytest.approx(np.where(abs(np.arange(20) - 10) <= 4, 1e-6 ** (1 / 9), 1.0))


def test_weighted_without_sensitivity_refuses() -> None:
    with pytest.raises(
        InvalidInput,
        match=r"cache=bac_weighted: expected a profile with sensitivity, got one without; run .* with sensitivity_obs",
    ):
        SensitivityWeighted().schedule(random_profile(seed=0))


DEEP = tuple(Block(layer, kind) for layer in range(4) for kind in BlockKind)


def test_skip_cache_keeps_the_outer_layers_live() -> None:
    mask = SkipCache(4).schedule(random_profile(seed=1, steps=STEPS, blocks=DEEP)).mask
    assert mask[[0, 1, 2, 9, 10, 11]].all()
    assert all(np.flatnonzero(row).tolist() == [0, 5, 10, 15, 19] for row in mask[3:9])


def test_profilingdit_caches_the_contiguous_layers_that_err_least() -> None:
    profile = random_profile(seed=1, steps=STEPS, blocks=DEEP)
    scale = np.repeat([5.0, 1.0, 2.0, 3.0], 3)[:, None, None]
    scaled = {**profile.values, Metric.L1: profile.values[Metric.L1] * scale}
    mask = ProfilingDit(4, cached_layers=2).schedule(replace(profile, values=scaled)).mask
    assert np.flatnonzero(mask.all(axis=1)).tolist() == [0, 1, 2, 9, 10, 11]
    assert all(np.flatnonzero(row).tolist() == [0, 5, 10, 15, 19] for row in mask[3:9])
    for layers in (0, 5):
        with pytest.raises(InvalidInput, match=rf"cache\.cached_layers: expected 1 to 4, got {layers}"):
            ProfilingDit(4, cached_layers=layers).schedule(profile)


def test_harmonica_opens_the_largest_gates() -> None:
    gates = np.array(
        [
            [1.0, 0.2, 0.9, 0.4, 0.3],
            [1.0, 0.4, 0.1, 0.0, 0.4],
            [1.0, 0.8, 0.4, 0.0, 0.1],
        ]
    )
    profile = replace(random_profile(seed=0, steps=5, blocks=BLOCKS[:3]), gates=gates)

    def rows(updates: int, last_step: LastStep = LastStep.FREE) -> list[str]:
        mask = HarmoniCa(updates, Opening.LARGEST, last_step=last_step).schedule(profile).mask
        return ["".join("#" if update else "." for update in row) for row in mask]

    assert rows(1) == ["#....", "#....", "#...."]
    # 0.9, 0.8 and one of four gates of 0.4: the latest step's.
    assert rows(2) == ["#.#..", "#...#", "##..."]
    assert rows(2, LastStep.FORCED) == ["#.#.#", "#...#", "##..#"]
    # The others of 0.4, latest first: L0.sa at 3, L0.ffn at 2, L0.ca at 1.
    assert rows(3) == ["#.##.", "##..#", "###.."]
    assert rows(5) == ["#####"] * 3


def test_of_equal_gates_the_upper_block_wins_within_a_step() -> None:
    gates = np.full((len(BLOCKS), STEPS), 0.5)
    gates[:, 0] = 1
    gates[:2, 4] = 0.6
    mask = HarmoniCa(2, Opening.LARGEST, last_step=LastStep.FREE).schedule(replace(PROFILE, gates=gates)).mask
    assert np.flatnonzero(mask[:, 4]).tolist() == [0, 1]
    assert np.flatnonzero(mask[:, -1]).tolist() == [0, 1, 2, 3]
    assert mask.sum() == 2 * len(BLOCKS)


def test_spread_gates_are_the_density_of_updates() -> None:
    # At 4/3 times 0.25 the sums pass a whole number at every third step.
    assert np.flatnonzero(spread_gates(np.full((1, 10), 0.25), 4)[0]).tolist() == [0, 3, 6, 9]
    gates = np.array([[1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0, 0, 0, 0, 0.9, 0.9]])
    # At factors from 10/9 on: 0.11 x 4 + 0.56 = 1, then 1.56 and 2.1; the other block is open wherever it is not 0.
    assert ["".join("#" if on else "." for on in row) for row in spread_gates(gates, 6)] == ["#....#.#.", "#......##"]
    assert spread_gates(gates, 2).tolist() == [[True] + 8 * [False]] * 2
    assert np.array_equal(spread_gates(gates, 18), gates > 0)


def test_spread_gates_keep_the_budget() -> None:
    for seed in range(40):
        draw = np.random.default_rng(seed)
        gates = draw.random((int(draw.integers(1, 7)), int(draw.integers(2, 30)))) ** 3
        count = int(draw.integers(len(gates), gates.size + 1))
        mask = spread_gates(gates, count)
        assert mask.sum() == count
        assert mask[:, 0].all()


def test_harmonica_without_gates_names_the_command() -> None:
    told = r"cache=harmonica: expected a profile with gates, .* run scripts/calibrate\.py task=\.\.\. cache=harmonica"
    with pytest.raises(InvalidInput, match=told):
        HarmoniCa().schedule(random_profile(seed=0, steps=STEPS))


def test_labels_name_the_budget() -> None:
    named = [Uniform(4), Late(5), ErtaCache(0.5)]
    assert [method.label for method in named] == ["uniform-s4", "late-s5", "ertacache-t0.5"]
    assert [replace(method, last_step=LastStep.FREE).label for method in named] == [
        "uniform-s4-free",
        "late-s5-free",
        "ertacache-t0.5-free",
    ]
    assert [method.with_budget(7).label for method in (*named[:2], NoCache())] == ["uniform-s7", "late-s7", "none"]
    assert Search().with_budget(1.25).label == "search-1.25g"
    assert Search(2, objective=Objective.WORST, seed=3).label == "search-2g-worst-seed3"
    assert ErtaCache().with_budget(0.125).label == "ertacache-t0.125"


@pytest.mark.parametrize("budget", [7.9, 0.5, float("nan"), float("inf")])
def test_refuses_a_part_of_an_update(budget: float) -> None:
    with pytest.raises(InvalidInput, match=rf"cache\.updates: expected a whole number, got {budget}; choose one"):
        Uniform().with_budget(budget)


def test_search_is_not_made_from_a_profile() -> None:
    with pytest.raises(MissingArtefact, match=r"schedule search-2\.38g: .*calibrate.py with the same cache=search"):
        Search().schedule(PROFILE)


@pytest.mark.parametrize(
    "method", [each for each in METHODS if isinstance(each, ByUpdates)], ids=lambda each: each.name
)
@pytest.mark.parametrize("updates", [0, STEPS + 1])
def test_refuses_numbers_of_updates_a_call_cannot_have(method: ByUpdates, updates: int) -> None:
    with pytest.raises(InvalidInput, match=rf"cache.updates: expected 1 to 20, got {updates}"):
        method.with_budget(updates).schedule(PROFILE)
