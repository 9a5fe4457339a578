"""The contract of every method, and what each of them chooses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toys import BLOCKS, PROVENANCE, random_profile

from bac.errors import InvalidInput
from bac.methods import BlockAdaptive, Downstream, IntervalScore, Method, NoCache, Uniform, adaptive_update_steps
from bac.profile import Metric
from bac.schedule import CacheSchedule

STEPS = 20
PROFILE = random_profile(seed=5, steps=STEPS)
METHODS = [NoCache(), Uniform(updates=4), BlockAdaptive(updates=4, upstream_blocks=2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_contract(method: Method) -> None:
    schedule = method.schedule(PROFILE)
    assert (schedule.blocks, schedule.provenance, schedule.method) == (BLOCKS, PROVENANCE, method.name)
    assert schedule.steps == STEPS
    assert schedule.mask[:, 0].all()
    # Enum-valued parameters come back from the text as their names.
    read = CacheSchedule.from_json(json.loads(json.dumps(schedule.to_json())))
    assert np.array_equal(read.mask, schedule.mask)
    assert read.parameters == schedule.parameters


def test_no_cache_updates_all() -> None:
    assert NoCache().schedule(PROFILE).updates == len(BLOCKS) * STEPS


@pytest.mark.parametrize(
    ("updates", "forced", "steps"),
    [
        (1, False, [0]),
        (1, True, [0, 19]),
        (4, False, [0, 5, 10, 15]),
        (4, True, [0, 5, 10, 15, 19]),
        (3, False, [0, 6, 13]),
        (20, False, list(range(20))),
        (20, True, list(range(20))),
    ],
)
def test_uniform_steps(updates: int, forced: bool, steps: list[int]) -> None:
    schedule = Uniform(updates, force_last_step=forced).schedule(PROFILE)
    assert all(np.flatnonzero(row).tolist() == steps for row in schedule.mask)
    assert schedule.parameters == {"updates": updates, "force_last_step": forced}


@pytest.mark.parametrize("score", list(IntervalScore))
@pytest.mark.parametrize("metric", list(Metric))
def test_block_adaptive_without_union_is_the_scheduler_per_block(metric: Metric, score: IntervalScore) -> None:
    method = BlockAdaptive(4, upstream_blocks=0, metric=metric, score=score, force_last_step=False)
    chosen = [tuple(np.flatnonzero(row).tolist()) for row in method.schedule(PROFILE).mask]
    assert chosen == [adaptive_update_steps(block, 4, score) for block in PROFILE.similarity(metric)]


def test_block_adaptive_widens_the_blocks_that_err_most() -> None:
    plain = BlockAdaptive(4, upstream_blocks=0, force_last_step=False).schedule(PROFILE).mask
    worst = int(PROFILE.values[Metric.L1].mean(axis=(1, 2)).argmax())
    assert worst < 3, "the toy profile should make a block of layer 0 the worst, so that strict and inclusive differ"
    for downstream, ffns in ((Downstream.INCLUSIVE, [2, 5]), (Downstream.STRICT, [5])):
        method = BlockAdaptive(4, upstream_blocks=1, downstream=downstream, force_last_step=False)
        expected = plain.copy()
        expected[worst] |= plain[ffns].any(axis=0)
        assert np.array_equal(method.schedule(PROFILE).mask, expected)


def test_block_adaptive_last_step() -> None:
    free = BlockAdaptive(4, upstream_blocks=2, force_last_step=False).schedule(PROFILE)
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
        "force_last_step": True,
    }


@pytest.mark.parametrize("method", [Uniform, BlockAdaptive])
@pytest.mark.parametrize("updates", [0, STEPS + 1])
def test_refuses_numbers_of_updates_a_call_cannot_have(method: type[Uniform | BlockAdaptive], updates: int) -> None:
    with pytest.raises(InvalidInput, match=rf"cache.updates: expected 1 to 20, got {updates}"):
        method(updates=updates).schedule(PROFILE)
