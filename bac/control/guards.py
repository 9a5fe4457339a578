"""Guards: what must hold of a chunk before any of it may move a robot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.errors import InvalidInput, sentence


@dataclass(frozen=True)
class ActionLimits:
    """Bounds of every action, task units.

    Attributes:
        low, high: float[Da], low < high; infinite where a channel is free.
    """

    low: np.ndarray
    high: np.ndarray

    def __post_init__(self) -> None:
        low, high = np.asarray(self.low, np.float64), np.asarray(self.high, np.float64)
        if low.ndim != 1 or low.shape != high.shape or not (low < high).all():
            raise InvalidInput(
                sentence(
                    "action limits",
                    expected="low and high as two vectors of one length, low < high",
                    got=f"{low.tolist()} and {high.tolist()}",
                    mend="give the robot's limits",
                )
            )


def refusal_of(actions: object, limits: ActionLimits | None, channels: int | None = None) -> str | None:
    """Return why a chunk must not be executed, or None.

    Args:
        actions: what a predictor gave; should be finite float[N, Da] with N >= 1 and Da >= 1, within the limits, which
            are rounded to the precision of the actions: one that was clipped to them is within.
        limits: of the actions; None checks the rest.
        channels: Da of the chunks before it; None before the first.
    """
    if not isinstance(actions, np.ndarray) or actions.ndim != 2 or not actions.size or actions.dtype.kind != "f":
        shown = f"{actions.dtype}{list(actions.shape)}" if isinstance(actions, np.ndarray) else type(actions).__name__
        return sentence("chunk", expected="float[N, Da], N and Da >= 1", got=shown, mend="check the predictor")
    if not np.isfinite(actions).all():
        first = int(np.flatnonzero(~np.isfinite(actions).all(axis=1))[0])
        return sentence(
            "chunk", expected="finite actions", got=f"action {first} {actions[first]}", mend="check weights"
        )
    named = "the limits" if limits is not None else "the chunks before"
    channels = len(limits.low) if limits is not None else channels
    if channels is not None and actions.shape[1] != channels:
        got, expected = f"{actions.shape[1]} channels", f"{channels} as {named}"
        return sentence("chunk", expected=expected, got=got, mend="check the predictor")
    if limits is None:
        return None
    low, high = (np.asarray(each).astype(actions.dtype) for each in (limits.low, limits.high))
    outside = ((actions < low) | (actions > high)).any(axis=1)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        within = f"actions within {np.asarray(limits.low).tolist()} and {np.asarray(limits.high).tolist()}"
        return sentence("chunk", expected=within, got=f"action {first} {actions[first]}", mend="check observations")
    return None
