"""Updates that compute less than a whole block, as a schedule holds them: token maps and recalls, checked and as text.

What they mean is said at ``CacheSchedule.tokens`` and ``CacheSchedule.recall``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bac.errors import InvalidInput, sentence
from bac.trunk import Block, BlockKind

_MOST_TOKENS = 127
"""What an int8 can name."""


def sound_tokens(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Return int8[blocks, K, T], all -1 where the block does not update, or None where every update is of all tokens.

    Raises:
        InvalidInput: another shape or range, a token that takes what is not computed, or an update of no token.
    """
    values = np.array(tokens)
    count = values.shape[2] if values.ndim == 3 else 0
    shaped = values.shape[:2] == mask.shape and 0 < count <= _MOST_TOKENS and np.issubdtype(values.dtype, np.integer)
    if not shaped or values.min() < -1 or values.max() >= count:
        told = f", {values.min()} to {values.max()}" if count else ""
        raise InvalidInput(
            sentence(
                "schedule tokens",
                expected=f"whole numbers [{mask.shape[0]} blocks, {mask.shape[1]} steps, T], each -1 to T - 1, T < 128",
                got=f"{values.dtype} of shape {values.shape}{told}",
                mend="give one map per update",
            )
        )
    values[~mask] = -1
    own = np.arange(count)
    computed, kept = values == own, values == -1
    represented = kept | np.take_along_axis(computed, np.where(kept, own, values), axis=2)
    for wrong, expected, got in (
        (~represented, "tokens merged into computed ones", "a token that takes the feature of one that is not"),
        (mask[:, :, None] & ~computed.any(axis=2, keepdims=True), "updates of at least one token", "one of none"),
        (kept[:, :1], "every token at step 0, since nothing is cached before it", "tokens that keep their features"),
    ):
        if wrong.any():
            raise InvalidInput(sentence("schedule tokens", expected=expected, got=got, mend="mend the method"))
    if computed[mask].all():
        return None
    values = values.astype(np.int8)
    values.setflags(write=False)
    return values


def sound_recall(recall: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Return bool[2, blocks, K], or None where nothing is recalled.

    Raises:
        InvalidInput: another shape, a recall where the block does not update, or one in even and odd chunks.
    """
    values = np.array(recall, dtype=bool)
    if values.shape != (2, *mask.shape):
        raise InvalidInput(
            sentence(
                "schedule recall",
                expected=f"bool[2, {mask.shape[0]} blocks, {mask.shape[1]} steps]",
                got=f"shape {values.shape}",
                mend="give one mask for even chunks and one for odd ones",
            )
        )
    idle, never = int((values & ~mask).sum()), int(values.all(axis=0).sum())
    if idle or never:
        raise InvalidInput(
            sentence(
                "schedule recall",
                expected="updates that every other chunk computes",
                got=f"{idle} recalls without an update and {never} updates that no chunk computes",
                mend="mend the method",
            )
        )
    values.setflags(write=False)
    return values if values.any() else None


def share_of_tokens(tokens: np.ndarray, blocks: Iterable[Block]) -> np.ndarray:
    """Return float64[blocks, K]: what part of a whole update the computed tokens of a map are, by FLOPs.

    As much as they are of all T, but for the keys and values of a self-attention, about half of it: those are of all
    tokens. (The attention's products are counted into both halves alike, which overstates a partial update by 1 % at
    Push-T's sizes.)
    """
    computed = (tokens == np.arange(tokens.shape[2])).mean(axis=2)
    always = np.array([[0.5 if block.kind is BlockKind.SELF_ATTENTION else 0.0] for block in blocks])
    return np.where(computed > 0, always + (1 - always) * computed, 0.0)


def token_document(tokens: np.ndarray, blocks: Iterable[Block]) -> dict[str, list[list[int]]]:
    """Return per block the token map of each step, an empty one where it computes all tokens or does not update."""
    own = list(range(tokens.shape[2]))
    rows = {str(block): each.tolist() for block, each in zip(blocks, tokens, strict=True)}
    return {name: [[] if each == own or max(each) < 0 else each for each in row] for name, row in rows.items()}


def read_tokens(document: Mapping[str, list[list[int]]], blocks: Iterable[Block], steps: int) -> np.ndarray:
    """Read ``token_document``'s; what is empty there computes all tokens.

    Raises:
        ValueError: a map of another length, one that is not of integers, or more maps than steps.
    """
    rows = [document[str(block)] for block in blocks]
    count = max(len(each) for row in rows for each in row)
    tokens = np.broadcast_to(np.arange(count), (len(rows), steps, count)).copy()
    for number, row in enumerate(rows):
        for step, each in enumerate(row):
            if each and (step >= steps or len(each) != count or any(type(token) is not int for token in each)):
                raise ValueError(f"token map {each} at step {step}")
            if each:
                tokens[number, step] = each
    return tokens


def recall_document(recall: np.ndarray, blocks: Iterable[Block]) -> dict[str, list[list[int]]]:
    """Return per block the steps that even chunks recall and those that odd ones do."""
    rows = zip(blocks, *recall, strict=True)
    return {str(block): [np.flatnonzero(half).tolist() for half in halves] for block, *halves in rows}


def read_recall(document: Mapping[str, Any], blocks: Iterable[Block], steps: int) -> np.ndarray:
    """Read ``recall_document``'s.

    Raises:
        ValueError: a block without two halves, or a step that is no integer of [0, steps).
    """
    rows = [document[str(block)] for block in blocks]
    recall = np.zeros((2, len(rows), steps), dtype=bool)
    for number, (even, odd) in enumerate(rows):
        for half, recalled in enumerate((even, odd)):
            if any(type(step) is not int or not 0 <= step < steps for step in recalled):
                raise ValueError(f"recalled steps {recalled}")
            recall[half, number, recalled] = True
    return recall
