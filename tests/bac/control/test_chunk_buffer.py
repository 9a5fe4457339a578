import math
import random

import numpy as np
import pytest
from reference import ReferencePlan

from bac.control import ActionChunk, ChunkBuffer, Seam
from bac.control.chunk_buffer import Taken
from bac.errors import InvalidInput


def chunk(first: int, values: list[float], number: int, committed: int = 0) -> ActionChunk:
    return ActionChunk(np.array(values)[:, None], first, number, number * 1000, committed)


def taken(buffer: ChunkBuffer, ticks: range) -> list[float | None]:
    return [None if (due := buffer.take(tick)) is None else float(due.action[0]) for tick in ticks]


def test_the_three_seams_of_the_picture() -> None:
    old, new = [0.0, 1, 2, 3, 4], [10.0, 11, 12, 13, 14, 15, 16]
    expected = {
        Seam.REPLACE: [12, 13, 14, 15, 16],
        Seam.BLEND: [(3 + 12) / 2, (4 + 13) / 2, 14, 15, 16],
        Seam.INPAINT: [3, 13, 14, 15, 16],
    }
    for seam, values in expected.items():
        buffer = ChunkBuffer(64, seam, decay=0.0)
        buffer.put(chunk(10, old, 0), 10)
        assert taken(buffer, range(10, 13)) == [0, 1, 2]
        committed = 3 if seam is Seam.INPAINT else 0
        result = buffer.put(chunk(11, new, 1, committed), 13)
        kept = 1 if seam is Seam.INPAINT else 0
        assert result == Taken(due=5 - kept, late=2, kept=kept, cut=0, replaced=2 - kept)
        assert taken(buffer, range(13, 19)) == [*values, None]


def test_blending_is_temporal_ensembling_over_all_chunks() -> None:
    buffer = ChunkBuffer(64, Seam.BLEND, decay=0.5)
    for number, value in enumerate([1.0, 5.0, 11.0]):
        buffer.put(chunk(0, [value] * 4, number), 0)
    weights = [1, math.exp(-0.5), math.exp(-1)]
    expected = sum(w * v for w, v in zip(weights, [1, 5, 11], strict=True)) / sum(weights)
    due = buffer.take(2)
    assert due is not None
    assert float(due.action[0]) == pytest.approx(expected, abs=1e-12)
    assert (due.chunk, due.observed_ns) == (2, 2000)


def test_a_chunk_that_is_late_altogether_changes_nothing() -> None:
    buffer = ChunkBuffer(64)
    buffer.put(chunk(0, [0.0, 1, 2, 3], 0), 0)
    assert taken(buffer, range(3)) == [0, 1, 2]
    assert buffer.put(chunk(0, [10.0, 11, 12], 1), 3) == Taken(due=0, late=3, kept=0, cut=0, replaced=0)
    assert taken(buffer, range(3, 5)) == [3, None]


def test_what_is_due_before_a_new_chunk_stays() -> None:
    buffer = ChunkBuffer(64)
    buffer.put(chunk(0, [0.0, 1, 2, 3], 0), 0)
    buffer.put(chunk(2, [12.0, 13], 1), 0)
    assert taken(buffer, range(5)) == [0, 1, 12, 13, None]


def test_a_replaced_chunk_leaves_no_tail_behind_a_shorter_one() -> None:
    buffer = ChunkBuffer(64)
    buffer.put(chunk(0, [0.0, 1, 2, 3], 0), 0)
    assert buffer.put(chunk(0, [10.0, 11], 1), 0).replaced == 4
    assert taken(buffer, range(4)) == [10, 11, None, None]


def test_capacity_cuts_what_is_far_ahead() -> None:
    buffer = ChunkBuffer(3)
    assert buffer.put(chunk(1, [1.0, 2, 3, 4, 5], 0), 0) == Taken(due=2, late=0, kept=0, cut=3, replaced=0)
    assert len(buffer) == 2


def test_missed_ticks_are_forgotten_not_made_up_for() -> None:
    buffer = ChunkBuffer(64)
    buffer.put(chunk(0, [0.0, 1, 2, 3], 0), 0)
    assert taken(buffer, range(2, 4)) == [2, 3]
    assert len(buffer) == 0


def test_ahead_stops_at_the_first_gap() -> None:
    buffer = ChunkBuffer(64)
    buffer.put(chunk(1, [1.0, 2, 3], 0), 0)
    assert buffer.ahead(0, 3).shape == (0, 0)
    assert buffer.ahead(2, 5).tolist() == [[2], [3]]
    assert buffer.ahead(2, 1).tolist() == [[2]]
    assert buffer.clear() == 3


def test_actions_are_copies_that_cannot_be_changed() -> None:
    values = np.ones((2, 1), np.float32)
    buffer = ChunkBuffer(64)
    buffer.put(ActionChunk(values, 0, 0, 0), 0)
    values[:] = 7
    due = buffer.take(0)
    assert due is not None
    assert due.action.dtype == np.float32
    assert due.action.tolist() == [1]
    with pytest.raises(ValueError, match="read-only"):
        due.action[0] = 3


def test_refusals() -> None:
    buffer = ChunkBuffer(64)
    buffer.put(chunk(0, [0.0], 3), 0)
    with pytest.raises(InvalidInput, match=r"^action chunk: expected a number above 3, got 3; drop it\.$"):
        buffer.put(chunk(0, [0.0], 3), 0)
    buffer.take(5)
    with pytest.raises(InvalidInput, match=r"^chunk buffer: expected tick 6 or later, got 5; let ticks pass\.$"):
        buffer.take(5)
    with pytest.raises(InvalidInput, match=r"^chunk buffer: expected tick 6 or later, got 2"):
        buffer.put(chunk(0, [0.0], 4), 2)
    with pytest.raises(InvalidInput, match=r"^chunk buffer: expected a capacity of at least 1 tick and a decay"):
        ChunkBuffer(0)
    with pytest.raises(InvalidInput, match=r"^action chunk: expected float\[N, Da\] with at least one action"):
        ActionChunk(np.zeros((0, 2)), 0, 0, 0)


def test_what_was_overslept_takes_no_room_when_a_chunk_comes() -> None:
    buffer = ChunkBuffer(4)
    buffer.put(chunk(0, [0.0, 1, 2, 3], 0), 0)
    # Nobody took 0 to 2; with 3 the new actions are four.
    assert buffer.put(chunk(4, [14.0, 15, 16, 17], 1), 3) == Taken(due=3, late=0, kept=0, cut=1, replaced=0)
    assert len(buffer) == 4
    assert taken(buffer, range(3, 8)) == [3, 14, 15, 16, None]


def test_what_is_forgotten_is_counted() -> None:
    buffer = ChunkBuffer(64)
    buffer.put(chunk(1, [1.0, 2, 3], 0), 0)
    assert [buffer.forget_before(tick) for tick in (1, 3, 3, 9)] == [0, 2, 0, 1]


@pytest.mark.parametrize("seam", Seam)
@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_chunks_and_ticks_gives_what_the_reference_gives(seam: Seam, seed: int) -> None:
    """Every action at its tick and at no other, from the chunk that should give it, in bounded memory, all told."""
    draw = random.Random(seed)
    capacity, decay = draw.randint(1, 12), draw.choice([0.0, 0.5])
    buffer, plan = ChunkBuffer(capacity, seam, decay), ReferencePlan(capacity, seam, decay)
    tick, given = 0, 0
    for number in range(400):
        if draw.random() < 0.4:
            first, values = tick + draw.randint(-8, 6), [draw.random() for _ in range(draw.randint(1, 10))]
            committed = draw.randint(0, 4) if seam is Seam.INPAINT else 0
            result = buffer.put(chunk(first, values, number, committed), tick)
            assert result == plan.put(number, first, values, tick, committed)
            assert result.due + result.late + result.kept + result.cut == len(values)
            assert len(buffer) == len(plan.ticks) <= capacity
        else:
            tick += draw.choice([0, 0, 0, 1, 3])
            due, expected = buffer.take(tick), plan.take(tick)
            assert (due is None) == (expected is None)
            if due is not None and expected is not None:
                assert (due.tick, due.chunk) == (tick, expected[0])
                assert float(due.action[0]) == pytest.approx(expected[1], abs=1e-12)
                given += 1
            tick += 1
    assert given > 20
