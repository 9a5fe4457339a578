"""The Bubbling Union against a definition in sets."""

from __future__ import annotations

import numpy as np
import pytest

from bac.errors import InvalidInput
from bac.methods import Downstream, bubbling_union
from bac.trunk import Block, BlockKind

BLOCKS = tuple(Block(layer, kind) for layer in range(8) for kind in BlockKind)
STEPS = 20


def random_mask(seed: int) -> np.ndarray:
    mask = np.random.default_rng(seed).random((len(BLOCKS), STEPS)) < 0.15
    mask[:, 0] = True
    return mask


def by_sets(given: list[set[int]], error: np.ndarray, count: int, downstream: Downstream) -> list[set[int]]:
    widened = [set(steps) for steps in given]
    for block in sorted(range(len(BLOCKS)), key=lambda block: (-error[block], block))[:count]:
        for layer in range(8):
            below = layer > block // 3 or (layer == block // 3 and downstream is Downstream.INCLUSIVE)
            if below:
                widened[block] |= given[3 * layer + 2]
    return widened


def as_sets(mask: np.ndarray) -> list[set[int]]:
    return [set(np.flatnonzero(row).tolist()) for row in mask]


@pytest.mark.parametrize("downstream", list(Downstream))
@pytest.mark.parametrize("count", [0, 1, 5, 24])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_definition_in_sets(seed: int, count: int, downstream: Downstream) -> None:
    mask, error = random_mask(seed), np.random.default_rng(seed + 100).random(len(BLOCKS))
    given = mask.copy()
    widened = bubbling_union(mask, BLOCKS, error, count, downstream)
    assert as_sets(widened) == by_sets(as_sets(given), error, count, downstream)
    assert np.array_equal(mask, given)


def test_ties_go_to_the_earlier_block() -> None:
    mask = random_mask(0)
    # The middle layers tie; an unstable sort takes them from the wrong end, and would leave 24 equal values alone.
    error = (np.arange(len(BLOCKS)) // 8 == 1).astype(float)
    widened = bubbling_union(mask, BLOCKS, error, 2, Downstream.INCLUSIVE)
    assert np.flatnonzero((widened != mask).any(axis=1)).tolist() == [8, 9]


@pytest.mark.parametrize(("downstream", "updates"), [(Downstream.INCLUSIVE, {0, 9}), (Downstream.STRICT, {0})])
def test_the_last_layers_blocks_see_their_own_ffn_at_most(downstream: Downstream, updates: set[int]) -> None:
    mask = np.zeros((len(BLOCKS), STEPS), dtype=bool)
    mask[:, 0] = True
    mask[23, 9] = True
    error = np.arange(len(BLOCKS)) == 21  # L7.sa
    assert as_sets(bubbling_union(mask, BLOCKS, error.astype(float), 1, downstream))[21] == updates


@pytest.mark.parametrize("count", [-1, 25])
def test_refuses_counts_out_of_range(count: int) -> None:
    with pytest.raises(InvalidInput, match=rf"cache.upstream_blocks: expected 0 to 24, got {count}; choose"):
        bubbling_union(random_mask(0), BLOCKS, np.ones(len(BLOCKS)), count, Downstream.INCLUSIVE)
