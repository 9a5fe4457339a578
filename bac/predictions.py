"""Predictions of reused features, as a schedule holds them: weights and groups of channels, checked and as text.

What they mean is said at ``CacheSchedule.forecast`` and ``CacheSchedule.groups``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bac.errors import InvalidInput, sentence
from bac.trunk import Block

GROUP_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""In text a channel's group is one digit, so there are at most 36 groups."""

Weight = float | tuple[float, ...]
"""Of a computed feature in a prediction: one for all channels, or one per group of channels."""


def sound_forecast(forecast: np.ndarray, mask: np.ndarray, grouped: bool) -> np.ndarray:
    """Return float64[blocks, K, p], or [blocks, K, p, G], zeros where the block updates.

    Raises:
        InvalidInput: another shape, NaN, or a weight on a feature that was not computed yet.
    """
    values = np.array(forecast, dtype=np.float64)
    shaped = values.ndim == 3 + grouped and values.shape[:2] == mask.shape and min(values.shape) >= 1
    if not shaped or not np.isfinite(values).all():
        raise InvalidInput(
            sentence(
                "schedule forecast",
                expected=f"finite float[{mask.shape[0]} blocks, {mask.shape[1]} steps, history{', groups' * grouped}]",
                got=f"shape {values.shape} with {int((~np.isfinite(values)).sum())} NaN or infinite weights",
                mend="give one row per block",
            )
        )
    values[mask] = 0
    unseen = np.arange(values.shape[2]) >= np.cumsum(mask, axis=1)[:, :, None]
    if (values[unseen] != 0).any():
        raise InvalidInput(
            sentence(
                "schedule forecast",
                expected="weights on computed features alone",
                got="weights before as many updates",
                mend="lower the order of the first predictions",
            )
        )
    values.setflags(write=False)
    return values


def sound_groups(groups: np.ndarray, mask: np.ndarray, forecast: np.ndarray | None) -> np.ndarray:
    """Return int64[blocks, d].

    Raises:
        InvalidInput: another shape, groups without predictions, more than 36, or one that has no weights.
    """
    values = np.array(groups)
    count = 0 if forecast is None else min(forecast.shape[3], len(GROUP_DIGITS))
    whole = values.dtype.kind in "iu" and values.ndim == 2 and len(values) == len(mask) and values.size > 0
    if not whole or values.min() < 0 or values.max() >= count:
        raise InvalidInput(
            sentence(
                "schedule groups",
                expected=f"int[{len(mask)} blocks, channels] below {count}, the groups that have weights",
                got=f"{values.dtype} of shape {values.shape}" + (f" up to {values.max()}" if values.size else ""),
                mend="give every channel a group of the forecast",
            )
        )
    values = values.astype(np.int64)
    values.setflags(write=False)
    return values


def forecast_document(forecast: np.ndarray, mask: np.ndarray, blocks: Iterable[Block]) -> dict[str, list[Any]]:
    """Return per block the weights of every step, none where it updates."""
    return {
        str(block): [[] if update else weights.tolist() for update, weights in zip(row, each, strict=True)]
        for block, row, each in zip(blocks, mask, forecast, strict=True)
    }


def read_forecast(
    document: Mapping[str, list[list[Any]]], blocks: Iterable[Block], steps: int, *, grouped: bool
) -> np.ndarray:
    """Read ``forecast_document``'s.

    Raises:
        ValueError: weights of another shape than the others, or more of them than steps.
    """
    least = (1, len(GROUP_DIGITS)) if grouped else (1,)
    shape = next((np.shape(weights) for each in document.values() for weights in each if weights), least)
    rows = [document[str(block)] for block in blocks]
    forecast = np.zeros((len(rows), steps, *shape))
    for number, row in enumerate(rows):
        for step, weights in enumerate(row):
            if weights and (step >= steps or np.shape(weights) != shape):
                raise ValueError(f"{len(weights)} weights at step {step}")
            if weights:
                forecast[number, step] = weights
    return forecast


def group_document(groups: np.ndarray, blocks: Iterable[Block]) -> dict[str, str]:
    """Return per block a digit per channel."""
    rows = zip(blocks, groups.tolist(), strict=True)
    return {str(block): "".join(GROUP_DIGITS[group] for group in row) for block, row in rows}


def read_groups(document: Mapping[str, str], blocks: Iterable[Block]) -> np.ndarray:
    """Read ``group_document``'s.

    Raises:
        ValueError: a character that is no digit of a group, or blocks of different widths.
    """
    return np.array([[GROUP_DIGITS.index(digit) for digit in document[str(block)]] for block in blocks], dtype=np.int64)
