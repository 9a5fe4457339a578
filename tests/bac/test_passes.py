"""Passes: hand-checked texts before and after, and properties that hold for any schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from toys import BLOCKS, random_schedule, schedule_of

from bac.passes import DEFAULT, EXACT, Pass, drop_dead_stores, fold_reused_runs, optimise, pack_slots
from bac.plan import Add, Compute, Fold, Plan, lower, verify

SCHEDULE = schedule_of("#..#", "#.#.", "##..")
LOWERED = """
000: L0.sa>0 L0.ca>1 L0.ffn>2
001: +0 +1 L0.ffn>2
002: +0 L0.ca>1 +2
003: L0.sa>0 +1 +2
""".strip()
FOLDED = """
000: L0.sa>0 L0.ca>1 L0.ffn>2
001: 3=0+1 +3 L0.ffn>2
002: +0 L0.ca>1 +2
003: L0.sa>0 4=1+2 +4
""".strip()
DROPPED = """
000: L0.sa>0 L0.ca>1 L0.ffn
001: 3=0+1 +3 L0.ffn>2
002: +0 L0.ca>1 +2
003: L0.sa 4=1+2 +4
""".strip()
# Step 1 ends the life of L0.ca's first feature (slot 1); step 2 that of L0.sa's (slot 0), after L0.ca took slot 1.
PACKED = """
000: L0.sa>0 L0.ca>1 L0.ffn
001: 2=0+1 +2 L0.ffn>2
002: +0 L0.ca>0 +2
003: L0.sa 1=0+2 +1
""".strip()

SEEDS = range(3)
SEQUENCES = [sequence for length in range(4) for sequence in product(DEFAULT, repeat=length)]


def names(passes: tuple[Pass, ...]) -> str:
    return " ".join(apply.__name__ for apply in passes) or "none"


def touches(plan: Plan) -> Iterator[tuple[tuple[int, ...], int | None]]:
    """Yield per operation the slots it reads and the slot it writes."""
    for op in plan.operations():
        match op:
            case Add(slot):
                yield (slot,), None
            case Fold(slots, into):
                yield slots, into
            case Compute(_, slot):
                yield (), slot


def lives(plan: Plan) -> list[tuple[int, int | None]]:
    """Return per kept feature the position of its write and of its last read, None if nobody reads it."""
    current: dict[int, int] = {}
    last: dict[int, int | None] = {}
    for position, (reads, write) in enumerate(touches(plan)):
        for slot in reads:
            last[current[slot]] = position
        if write is not None:
            current[write] = position
            last[position] = None
    return list(last.items())


@pytest.mark.parametrize(
    ("apply", "before", "after"),
    [
        (fold_reused_runs, LOWERED, FOLDED),
        (drop_dead_stores, FOLDED, DROPPED),
        (pack_slots, DROPPED, PACKED),
    ],
)
def test_golden(apply: Pass, before: str, after: str) -> None:
    assert str(apply(Plan.parse(before, BLOCKS[:3]))) == after


def test_default_is_the_three_in_this_order() -> None:
    assert str(optimise(lower(SCHEDULE))) == PACKED
    assert (fold_reused_runs, *EXACT) == DEFAULT


def test_a_sum_serves_until_one_of_its_features_updates() -> None:
    schedule = schedule_of("#....", "#..#.", "#####")
    assert str(fold_reused_runs(lower(schedule))).splitlines()[1:] == [
        "001: 3=0+1 +3 L0.ffn>2",
        "002: +3 L0.ffn>2",
        "003: +0 L0.ca>1 L0.ffn>2",
        "004: 4=0+1 +4 L0.ffn>2",
    ]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("passes", SEQUENCES, ids=names)
def test_any_combination_keeps_what_reaches_the_head(passes: tuple[Pass, ...], seed: int) -> None:
    schedule = random_schedule(seed, steps=8)
    plan = optimise(lower(schedule), passes)
    verify(plan, schedule)
    assert Plan.parse(str(plan), BLOCKS).steps == plan.steps
    assert sum(plan.block_calls().values()) == schedule.updates
    written = {write for _, write in touches(plan)} - {None}
    assert written <= set(range(plan.slots))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "passes",
    [
        (),
        (fold_reused_runs,),
        DEFAULT,
        EXACT,
        (drop_dead_stores,),
    ],
)
def test_optimised_plans_parse_back(passes: tuple[Pass, ...], seed: int) -> None:
    schedule = random_schedule(seed, steps=8)
    mask = schedule.mask.copy()
    mask[-1] = True  # the last block never reuses, so the highest slot is dead
    plan = optimise(lower(replace(schedule, mask=mask)), passes)
    assert Plan.parse(str(plan), BLOCKS) == plan


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("before", [(), (fold_reused_runs,)])
def test_drop_keeps_what_is_read_and_only_that(before: tuple[Pass, ...], seed: int) -> None:
    plan = optimise(lower(random_schedule(seed)), before)
    read = [life for life in lives(plan) if life[1] is not None]
    assert len(read) < len(lives(plan)), "a schedule with nothing to drop tests nothing"
    assert lives(drop_dead_stores(plan)) == read


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("before", SEQUENCES[:13], ids=names)
def test_pack_never_needs_more_slots(before: tuple[Pass, ...], seed: int) -> None:
    plan = optimise(lower(random_schedule(seed)), before)
    packed = pack_slots(plan)
    assert packed.slots <= plan.slots
    assert all(write not in reads for reads, write in touches(packed))


@pytest.mark.parametrize("seed", SEEDS)
def test_pack_needs_as_few_slots_as_there_are_live_features(seed: int) -> None:
    plan = drop_dead_stores(fold_reused_runs(lower(random_schedule(seed))))
    # A sum and the features it is made of are alive together: no operation writes a slot that it reads.
    spans = [range(write, read + 1) for write, read in lives(plan) if read is not None]
    alive = max(sum(position in span for span in spans) for position in range(sum(map(len, plan.steps))))
    assert pack_slots(plan).slots == alive
