"""Adaptive Caching Scheduler: the S update steps of one block, by exact dynamic programming (BAC, arXiv 2506.13456)."""

from __future__ import annotations

import numpy as np

from bac.choices import Choice
from bac.methods.base import require_updates


class IntervalScore(Choice):
    """How well the feature of step a stands in for the steps a..b.

    ``anchor``: the sum of sim(a, t) over the interval, as in the authors' code; the default.
    ``adjacent``: the sum of sim(t - 1, t) inside the interval, as printed in the paper. It telescopes: the optimum
    is the S - 1 steps of lowest adjacent similarity.
    """

    ANCHOR = "anchor"
    ADJACENT = "adjacent"


def adaptive_update_steps(similarity: np.ndarray, updates: int, score: IntervalScore) -> tuple[int, ...]:
    """Choose the update steps that maximise the summed score of the intervals between them. O(S K^2).

    Args:
        similarity: float[K, K], larger is more alike.
        updates: S in [1, K], step 0 included.
        score: how an interval counts.

    Returns:
        S increasing steps, the first of them 0.
    """
    steps = len(similarity)
    require_updates(updates, steps)
    interval = interval_scores(similarity, score)
    # best[e]: the best score of covering steps 0..e-1 with the intervals so far; first[s][e]: where the last begins.
    best = np.concatenate(([-np.inf], interval[0]))
    first: list[np.ndarray] = []
    for _ in range(1, updates):
        candidates = best[:-1, None] + interval
        begin = candidates.argmax(axis=0)
        first.append(begin)
        best = np.concatenate(([-np.inf], candidates[begin, np.arange(steps)]))
    chosen = []
    end = steps
    for begin in reversed(first):
        end = int(begin[end - 1])
        chosen.append(end)
    return (0, *reversed(chosen))


def interval_scores(similarity: np.ndarray, score: IntervalScore) -> np.ndarray:
    """Return float64[K, K]: entry (a, b) is the score of updating at a and reusing up to b; -inf where b < a."""
    steps = len(similarity)
    if score is IntervalScore.ANCHOR:
        reused = np.triu(similarity.astype(np.float64))
    else:
        adjacent = np.concatenate(([0.0], np.diagonal(similarity, offset=1).astype(np.float64)))
        reused = np.triu(np.broadcast_to(adjacent, (steps, steps)), k=1)
    sums = np.cumsum(reused, axis=1)
    sums[np.tril_indices(steps, k=-1)] = -np.inf
    return sums
