"""Bubbling Union Algorithm: upstream blocks update wherever a downstream FFN does (BAC, arXiv 2506.13456).

An FFN recomputed on a stream that carries reuse error absorbs the error and passes it on: the error surge. Letting the
blocks that err most update at the same steps stops it.
"""

from __future__ import annotations

import numpy as np

from bac.choices import Choice
from bac.errors import InvalidInput, sentence
from bac.trunk import Block, BlockKind


class Downstream(Choice):
    """Which FFNs are downstream of a block: its own layer's too (authors' code), or later layers' only (paper)."""

    INCLUSIVE = "inclusive"
    STRICT = "strict"


def bubbling_union(
    mask: np.ndarray,
    blocks: tuple[Block, ...],
    reuse_error: np.ndarray,
    upstream_blocks: int,
    downstream: Downstream,
) -> np.ndarray:
    """Widen the schedules of the blocks with the largest reuse error.

    For each u of them: C(u) <- C(u) union C(v) over the FFN blocks v downstream of u, all C(v) as they were given.

    Args:
        mask: bool[blocks, K], the schedule so far.
        blocks: the rows.
        reuse_error: float[blocks], the ranking; ties go to the earlier block.
        upstream_blocks: n in [0, blocks], how many to widen.
        downstream: which FFNs count.

    Returns:
        bool[blocks, K], a new mask.
    """
    if not 0 <= upstream_blocks <= len(blocks):
        raise InvalidInput(
            sentence(
                "cache.upstream_blocks",
                expected=f"0 to {len(blocks)}",
                got=upstream_blocks,
                mend="choose a number in that range",
            )
        )
    widened = mask.copy()
    for upstream in np.argsort(-reuse_error, kind="stable")[:upstream_blocks]:
        nearest = blocks[upstream].layer + (downstream is Downstream.STRICT)
        ffns = [row for row, b in enumerate(blocks) if b.kind is BlockKind.FEED_FORWARD and b.layer >= nearest]
        widened[upstream] |= mask[ffns].any(axis=0)
    return widened
