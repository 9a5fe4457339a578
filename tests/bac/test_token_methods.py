"""What the methods of partial and recalled updates choose, on hand-made profiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toys import random_profile

from bac.errors import InvalidInput
from bac.methods import AsymRnR, CrossChunk, LastStep, Late, ToCa

STEPS = 20
PROFILE = random_profile(seed=5, steps=STEPS)


def test_toca_recomputes_the_tokens_that_receive_most_attention() -> None:
    attention = np.broadcast_to([[[4.0, 3, 2, 1]], [[1.0, 1, 3, 2]]], (2, 9, 4))
    profile = replace(random_profile(seed=1, steps=9), attention=attention)
    method = ToCa(3, ratio=0.5, partial_every=2, age_bonus=0, last_step=LastStep.FREE)
    schedule = method.schedule(profile)
    # Full at 0, 3, 6; the second step after each is partial.
    assert schedule.tokens is not None
    for row, tokens in zip(schedule.mask, schedule.tokens, strict=True):
        assert np.flatnonzero(row).tolist() == [0, 2, 3, 5, 6, 8]
        assert (tokens[[0, 3, 6]] == np.arange(4)).all()
    assert (schedule.tokens[:3, [2, 5, 8]] == [0, 1, -1, -1]).all()
    assert (schedule.tokens[3:, [2, 5, 8]] == [-1, -1, 2, 3]).all()
    forced = replace(method, last_step=LastStep.FORCED).schedule(profile)
    assert (forced.tokens[:, 8] == np.arange(4)).all()
    one = replace(method, ratio=0.1).schedule(profile)
    assert (one.tokens[:3, 2] == [0, -1, -1, -1]).all(), "at least one token"
    assert replace(method, ratio=1.0).schedule(profile).tokens is None


def test_toca_gives_old_tokens_a_turn() -> None:
    attention = np.broadcast_to([4.0, 3, 2, 1], (2, 6, 4))
    profile = replace(random_profile(seed=1, steps=6), attention=attention)
    method = ToCa(1, ratio=0.25, partial_every=1, age_bonus=10, last_step=LastStep.FREE)
    chosen = method.schedule(profile).tokens[0, 1:].max(axis=1)
    # A step of age is worth 10 / 6, more than all differences of attention (at most 1.2).
    assert chosen.tolist() == [0, 1, 2, 3, 0]


def test_asymrnr_merges_the_most_alike_neighbours_at_updates() -> None:
    likeness = np.zeros((6, 4, 3))
    likeness[0, 0] = 0.9, 0.8, 0
    likeness[4, 2] = 0, 0, 0.7
    likeness[2, 2] = 0, 0.6, 0
    likeness[0, 1] = 1  # not an update
    profile = replace(random_profile(seed=1, steps=4), token_likeness=likeness)
    # 6 blocks x 2 updates x 3 neighbours are 36 places.
    schedule = AsymRnR(2, merge_ratio=3 / 36, last_step=LastStep.FREE).schedule(profile)
    expected = np.broadcast_to(np.arange(4), (6, 4, 4)).copy()
    expected[0, 0] = 0, 0, 0, 3
    expected[4, 2] = 0, 1, 2, 2
    expected[:, [1, 3]] = -1
    assert np.array_equal(schedule.tokens, expected)
    every = AsymRnR(2, merge_ratio=1, last_step=LastStep.FREE).schedule(profile)
    assert (every.tokens[:, [0, 2]] == 0).all()
    assert AsymRnR(2, merge_ratio=0).schedule(profile).tokens is None


def test_cross_chunk_takes_turns_at_the_steps_of_late() -> None:
    forced = CrossChunk(5, power=2).schedule(PROFILE)
    assert np.array_equal(forced.mask, Late(5, 2).schedule(PROFILE).mask)
    # Updates at 0, 7, 12, 16, 18, 19: even chunks recall 7 and 16, odd ones 12 and 18.
    assert forced.recall is not None
    for even, odd in zip(*forced.recall, strict=True):
        assert np.flatnonzero(even).tolist() == [7, 16]
        assert np.flatnonzero(odd).tolist() == [12, 18]
    free = CrossChunk(5, power=2, last_step=LastStep.FREE).schedule(PROFILE)
    assert np.array_equal(free.mask, Late(5, 2, LastStep.FREE).schedule(PROFILE).mask)
    assert CrossChunk(1).schedule(PROFILE).recall is None
    with pytest.raises(InvalidInput, match=r"cache\.power: expected at least 1, got 0\.5"):
        CrossChunk(power=0.5)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"ratio": 0.0}, r"cache\.ratio: expected above 0 to 1, got 0"),
        ({"ratio": 1.1}, r"cache\.ratio: expected above 0 to 1, got 1\.1"),
        ({"partial_every": 0}, r"cache\.partial_every: expected at least 1, got 0"),
        ({"age_bonus": float("nan")}, r"cache\.age_bonus: expected at least 0, got nan"),
    ],
)
def test_toca_refuses_values_out_of_range(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        ToCa(**values)


def test_asymrnr_refuses_ratios_out_of_range() -> None:
    for ratio in (-0.1, 1.1):
        with pytest.raises(InvalidInput, match=rf"cache\.merge_ratio: expected 0 to 1, got {ratio}"):
            AsymRnR(merge_ratio=ratio)


def test_token_methods_need_a_profile_of_tokens() -> None:
    for method, what in ((ToCa(), "cache=toca: .* attention"), (AsymRnR(), "cache=asymrnr: .* token_likeness")):
        with pytest.raises(InvalidInput, match=what + ", got one without; run scripts/calibrate.py"):
            method.schedule(random_profile(seed=0, steps=STEPS))
