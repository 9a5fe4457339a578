"""The dynamic programme against brute force over all update steps."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from toys import BLOCKS, PROVENANCE, latest_update, random_profile

from bac.errors import InvalidInput
from bac.methods import IntervalScore, adaptive_update_steps
from bac.profile import FeatureProfile, Metric

STEPS = 7


def total(similarity: np.ndarray, chosen: tuple[int, ...], score: IntervalScore) -> float:
    """Add up, step by step, how well the cached feature stands in; METHODS.md section 1 in plain words."""
    updates = [step in chosen for step in range(STEPS)]
    if score is IntervalScore.ANCHOR:
        return sum(similarity[latest_update(updates, step), step] for step in range(STEPS))
    return sum(similarity[step - 1, step] for step in range(STEPS) if not updates[step])


@pytest.mark.parametrize("score", list(IntervalScore))
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("updates", range(1, STEPS + 1))
def test_equals_brute_force(metric: Metric, score: IntervalScore, updates: int) -> None:
    for similarity in random_profile(seed=3, steps=STEPS).similarity(metric):
        every = [(0, *later) for later in combinations(range(1, STEPS), updates - 1)]
        # Random values have one best subset, so the steps themselves are compared and not only their score.
        best = max(every, key=lambda chosen: total(similarity, chosen, score))
        assert adaptive_update_steps(similarity, updates, score) == best


@pytest.mark.parametrize("updates", range(1, STEPS + 1))
def test_adjacent_score_takes_the_steps_least_like_the_one_before(updates: int) -> None:
    for similarity in random_profile(seed=4, steps=STEPS).similarity(Metric.COSINE):
        change = sorted(range(1, STEPS), key=lambda step: similarity[step - 1, step])
        chosen = adaptive_update_steps(similarity, updates, IntervalScore.ADJACENT)
        assert chosen == (0, *sorted(change[: updates - 1]))


@pytest.mark.parametrize("score", list(IntervalScore))
@pytest.mark.parametrize("metric", list(Metric))
def test_updates_where_features_jump(metric: Metric, score: IntervalScore) -> None:
    # Two plateaus, equal inside, far apart: distances must be minimised, the similarity maximised.
    plateau = np.arange(STEPS) >= 4
    differs = (plateau[:, None] != plateau).astype(np.float32)
    values = {other: np.stack([1 - differs if other is Metric.COSINE else differs] * 6) for other in Metric}
    profile = FeatureProfile(values, BLOCKS, 1, PROVENANCE)
    assert adaptive_update_steps(profile.similarity(metric)[0], 2, score) == (0, 4)


def test_scores_differ() -> None:
    # A drift with one jump at the end: the adjacent form spends its update there, the anchor halves the drift.
    value = np.array([0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0])
    similarity = -np.abs(value[:, None] - value)
    assert adaptive_update_steps(similarity, 2, IntervalScore.ADJACENT) == (0, 6)
    assert adaptive_update_steps(similarity, 2, IntervalScore.ANCHOR) == (0, 3)


@pytest.mark.parametrize("updates", [-1, 0, STEPS + 1])
def test_refuses_numbers_of_updates_a_call_cannot_have(updates: int) -> None:
    with pytest.raises(InvalidInput, match=rf"cache.updates: expected 1 to 7, got {updates}; choose a number"):
        adaptive_update_steps(np.eye(STEPS), updates, IntervalScore.ANCHOR)
