"""Plans: lowering, the text form, the simulator and the cost, by hand-checked texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from toys import BLOCKS, COST, latest_update, random_schedule, schedule_of

from bac.errors import CorruptArtefact, InvalidInput
from bac.passes import optimise
from bac.plan import Plan, PlanCost, cost, lower, schedule_cost, simulate, verify
from bac.schedule import CacheSchedule
from bac.trunk import TrunkCost

SCHEDULE = schedule_of("#..#", "#.#.", "##..")
LOWERED = """
000: L0.sa>0 L0.ca>1 L0.ffn>2
001: +0 +1 L0.ffn>2
002: +0 L0.ca>1 +2
003: L0.sa>0 +1 +2
""".strip()


def test_lowers_to_one_slot_per_block() -> None:
    plan = lower(SCHEDULE)
    assert str(plan) == LOWERED
    assert plan.slots == 3


def test_step_numbers_widen_with_the_plan() -> None:
    lines = str(lower(schedule_of("#" + "." * 1000))).splitlines()
    assert (lines[0], lines[1000]) == ("0000: L0.sa>0", "1000: +0")


@pytest.mark.parametrize("seed", range(3))
def test_parses_back(seed: int) -> None:
    plan = lower(random_schedule(seed))
    assert Plan.parse(str(plan), BLOCKS) == plan


def test_parses_what_passes_may_write() -> None:
    # A branch whose feature nobody keeps, a sum, a step without operations, slots with gaps between them.
    text = "000: L0.sa L0.ca>4 L0.ffn>1\n001: 3=4+1 +3\n002:"
    plan = Plan.parse(text, BLOCKS[:3])
    assert str(plan) == text
    assert plan.slots == 5, "an executor indexes its slots by these numbers"


@pytest.mark.parametrize("word", ["L9.sa", "L0.sa>x", "+", "+x", "1=2+", "x=1", "compute"])
def test_refuses_other_words(word: str) -> None:
    with pytest.raises(CorruptArtefact, match=r"plan text: expected operations on known blocks, got '.*'; correct"):
        Plan.parse(f"000: {word}", BLOCKS)


@pytest.mark.parametrize("seed", range(3))
def test_simulates_the_definition_of_caching(seed: int) -> None:
    schedule = random_schedule(seed)
    expected = tuple(
        tuple((block, latest_update(row, step)) for block, row in enumerate(schedule.mask))
        for step in range(schedule.steps)
    )
    assert simulate(lower(schedule)) == expected
    verify(lower(schedule), schedule)


@pytest.mark.parametrize(
    ("line", "tampered", "sentence"),
    [
        ("001: +0 +1 L0.ffn>2", "001: +0 L0.ffn>2", "plan at step 1: expected L0.ffn to see all 2 blocks above it"),
        ("001: +0 +1 L0.ffn>2", "001: +1 +0 L0.ffn>2", "plan at step 1: expected L0.ffn to see all 2 blocks"),
        ("001: +0 +1 L0.ffn>2", "001: +0 +1 +2", "plan at step 1: expected features .*got .*2, 0"),
        ("002: +0 L0.ca>1 +2", "002: +0 L0.ca>1", "plan at step 2: expected features"),
        ("002: +0 L0.ca>1 +2", "002: +0 L0.ca>1 +2 +2", "plan at step 2: expected features"),
        ("002: +0 L0.ca>1 +2", "002: +0 L0.ca +2", r"plan at step 3: expected features .*\(1, 2\).*got .*\(1, 0\)"),
        ("003: L0.sa>0 +1 +2", "003: +0 +1 +2", r"plan at step 3: expected features \(\(0, 3\)"),
        ("003: L0.sa>0 +1 +2", "003: L0.sa>0 +2 +1", "plan at step 3: expected features"),
        ("003: L0.sa>0 +1 +2", "003: L0.sa>0 +1 +1", "plan at step 3: expected features"),
        ("003: L0.sa>0 +1 +2", "003: L0.sa>0 +1 +5", "plan at step 3: expected slot 5 to hold a feature, got nothing"),
        ("003: L0.sa>0 +1 +2", "003: L0.sa>0 4=1+6 +4", "plan at step 3: expected slot 6 to hold a feature"),
        ("\n003: L0.sa>0 +1 +2", "", "plan at step 3: expected 4 steps, got 3 steps"),
        ("003: L0.sa>0 +1 +2", "003: L0.sa>0 +1 +2\n004: +0 +1 +2", "expected 4 steps, got 5 steps; mend the pass"),
    ],
)
def test_verify_refuses_a_tampered_plan(line: str, tampered: str, sentence: str) -> None:
    assert line in LOWERED
    with pytest.raises(InvalidInput, match=sentence):
        verify(Plan.parse(LOWERED.replace(line, tampered), BLOCKS[:3]), SCHEDULE)


def test_block_calls() -> None:
    sa, ca, ffn = BLOCKS[:3]
    assert lower(SCHEDULE).block_calls() == Counter({sa: 2, ca: 2, ffn: 2})
    assert lower(schedule_of("#...", "#.#.", "####")).block_calls() == Counter({sa: 1, ca: 2, ffn: 4})


@pytest.mark.parametrize(
    "count", [schedule_cost, lambda schedule, trunk: cost(optimise(lower(schedule)), trunk)], ids=["schedule", "plan"]
)
def test_cost(count: Callable[[CacheSchedule, TrunkCost], PlanCost]) -> None:
    counted = count(schedule_of("#...", "#.#.", "####"), COST)
    # 1 x 1 + 2 x 10 + 4 x 100 in branches; four steps of 10**6 and one call of 10**7; the original pays twice and 5x.
    assert counted.branches == 421
    assert counted.planned == 14_000_421
    assert counted.original == 20_000_842
    assert counted.hoisted == 6_000_421
