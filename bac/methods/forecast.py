"""Predictions as weights: what several methods add to a mask, unrolled to linear forms of the computed features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bac.errors import InvalidInput, sentence

Rule = Callable[[np.ndarray, int], np.ndarray]
"""(update steps so far, the latest first; the step to predict) -> weights of the features computed at them."""


def forecast_of(mask: np.ndarray, history: int, rule: Rule) -> np.ndarray:
    """Return float64[blocks, K, history]: the rule's weights wherever a block is reused.

    Args:
        mask: bool[blocks, K], column 0 True.
        history: how many of the latest updates the rule may see.
        rule: gives one weight per update that it sees.
    """
    forecast = np.zeros((*mask.shape, history))
    for row, weights in zip(mask, forecast, strict=True):
        for step in np.flatnonzero(~row):
            seen = np.flatnonzero(row[:step])[::-1][:history]
            weights[step, : len(seen)] = rule(seen, int(step))
    return forecast


def require_history(what: str, wanted: int, mask: np.ndarray) -> None:
    """Refuse a prediction from more features than a call ever has.

    Args:
        what: the parameter that asks for them, whose value is one less.
        wanted: how many features it reads.
        mask: bool[blocks, K].

    Raises:
        InvalidInput: no step is predicted from so many.
    """
    seen = int((np.cumsum(mask, axis=1) * ~mask).max())
    if 0 < seen < wanted:
        raise InvalidInput(
            sentence(
                f"cache.{what}",
                expected=f"at most {seen - 1}, one less than the features computed before the last prediction",
                got=wanted - 1,
                mend="raise cache.updates",
            )
        )


def differences(seen: np.ndarray, order: int) -> list[np.ndarray]:
    """Return the backward finite differences of orders 0 to ``order`` at the latest update, as weights.

    D_0 is the feature; D_{i+1} = (D_i now - D_i at the update before) / (steps between these two updates), as in
    TaylorSeer (arXiv 2503.06923, eq. 6), whose interval is constant; here each gap counts as long as it is.

    Args:
        seen: update steps, the latest first.
        order: at most one less than their number.
    """
    rows = np.eye(len(seen))
    result = [rows[0]]
    for _ in range(order):
        gaps = (seen[: len(rows) - 1] - seen[1 : len(rows)])[:, None]
        rows = (rows[:-1] - rows[1:]) / gaps
        result.append(rows[0])
    return result
