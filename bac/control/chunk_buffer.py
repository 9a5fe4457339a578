"""The chunk buffer: actions with the tick they are due at, and what happens where a new chunk meets the old one.

::

    tick          10  11  12  13  14  15  16  17        a chunk was observed at tick 11 and arrives before tick 13
    buffer                  a   a   a
    new chunk          n   n   n   n   n   n   n
    replace                 n   n   n   n   n   n       its actions 11 and 12 are late: dropped, never executed
    blend                  an  an  an   n   n   n
    inpaint                 a   n   n   n   n   n       11 to 13 had been committed; it was denoised around them
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bac.choices import Choice
from bac.errors import InvalidInput, sentence


class Seam(Choice):
    """How a new chunk takes over.

    ``replace``: from its first action that is not late. ``blend``: likewise, but an action that several chunks gave is
    their mean, the i-th oldest weighted ``exp(-decay i)`` (temporal ensembling of ACT, Zhao et al., arXiv 2304.13705).
    ``inpaint``: the actions committed for the time of the inference stay as they are, and the new chunk was denoised
    around them (real-time chunking, Black et al., arXiv 2506.07339).
    """

    REPLACE = "replace"
    BLEND = "blend"
    INPAINT = "inpaint"


@dataclass(frozen=True)
class ActionChunk:
    """Consecutive actions, one per tick.

    Attributes:
        actions: float[N, Da], task units.
        first_tick: the tick that ``actions[0]`` is due at.
        number: of the chunk; later chunks have higher ones.
        observed_ns: stamp of the observation it was made from.
        committed: how many of its first actions repeat what was committed when it was asked for.
    """

    actions: np.ndarray
    first_tick: int
    number: int
    observed_ns: int
    committed: int = 0

    def __post_init__(self) -> None:
        if self.actions.ndim != 2 or not len(self.actions):
            raise InvalidInput(
                sentence(
                    "action chunk",
                    expected="float[N, Da] with at least one action",
                    got=f"shape {self.actions.shape}",
                    mend="give an action per row",
                )
            )


@dataclass(frozen=True)
class DueAction:
    """An action of the buffer.

    Attributes:
        tick: when it is due.
        action: float[Da], task units, read-only.
        chunk: number of the newest chunk in it.
        observed_ns: stamp of that chunk's observation.
    """

    tick: int
    action: np.ndarray
    chunk: int
    observed_ns: int


@dataclass(frozen=True)
class Taken:
    """What became of a chunk's actions; ``due + late + kept + cut`` are all of them.

    Attributes:
        due: now in the buffer.
        late: dropped, for their tick was over.
        kept: not needed, for the committed action stayed.
        cut: dropped, for they were too far ahead.
        replaced: actions of older chunks that they replaced or that fell off behind them.
    """

    due: int
    late: int
    kept: int
    cut: int
    replaced: int


@dataclass(frozen=True)
class _Entry:
    """An action and what it was blended from: ``due.action`` is ``total / weight`` where ``count`` is above 1."""

    due: DueAction
    total: np.ndarray
    weight: float
    count: int


class ChunkBuffer:
    """Actions waiting for their ticks. For one thread.

    Args:
        capacity: how many ticks ahead it holds actions, at least 1.
        seam: how a new chunk takes over.
        decay: of the weights of ``blend``, at least 0; 0.01 as in ACT.

    Raises:
        InvalidInput: a value outside its range.
    """

    def __init__(self, capacity: int, seam: Seam = Seam.REPLACE, decay: float = 0.01) -> None:
        if capacity < 1 or not 0 <= decay < math.inf:
            raise InvalidInput(
                sentence(
                    "chunk buffer",
                    expected="a capacity of at least 1 tick and a decay of at least 0",
                    got=f"{capacity} and {decay}",
                    mend="correct them",
                )
            )
        self._capacity, self._seam, self._decay = capacity, seam, decay
        self._entries: dict[int, _Entry] = {}
        self._next_tick: int | None = None
        self._latest: int | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, chunk: ActionChunk, tick: int) -> Taken:
        """Let a chunk take over.

        Args:
            chunk: later than any before it.
            tick: the first tick whose action was not taken yet; what is due before it is late, or forgotten.

        Raises:
            InvalidInput: an older chunk than the last one, or a tick that is over.
        """
        self._require_onward(tick)
        if self._latest is not None and chunk.number <= self._latest:
            raise InvalidInput(
                sentence("action chunk", expected=f"a number above {self._latest}", got=chunk.number, mend="drop it")
            )
        self._latest = chunk.number
        self.forget_before(tick)
        end = chunk.first_tick + len(chunk.actions)
        begin, limit = max(chunk.first_tick, tick), tick + self._capacity
        late = min(max(tick - chunk.first_tick, 0), len(chunk.actions))
        if begin >= end:
            return Taken(due=0, late=late, kept=0, cut=0, replaced=0)
        free_from = chunk.first_tick + chunk.committed
        kept = [at for at in range(begin, min(end, free_from)) if at in self._entries]
        old = {at: self._entries.pop(at) for at in list(self._entries) if at >= begin and at not in kept}
        fresh = [at for at in range(begin, min(end, limit)) if at not in kept]
        for at in fresh:
            self._entries[at] = self._joined(chunk, at, old.get(at))
        cut = end - begin - len(kept) - len(fresh)
        return Taken(due=len(fresh), late=late, kept=len(kept), cut=cut, replaced=len(old))

    def take(self, tick: int) -> DueAction | None:
        """Return the action due at ``tick``, once, and forget what was due before it.

        Raises:
            InvalidInput: this tick or a later one was taken before.
        """
        self._require_onward(tick)
        self._next_tick = tick + 1
        self.forget_before(tick)
        entry = self._entries.pop(tick, None)
        return None if entry is None else entry.due

    def forget_before(self, tick: int) -> int:
        """Forget what was due before ``tick``; return how many actions that were."""
        over = [at for at in self._entries if at < tick]
        for at in over:
            del self._entries[at]
        return len(over)

    def ahead(self, tick: int, count: int) -> np.ndarray:
        """Return float[n, Da], n <= count: what is due at ``tick`` and the ticks after it, up to the first gap."""
        actions = []
        for at in range(tick, tick + count):
            if at not in self._entries:
                break
            actions.append(self._entries[at].due.action)
        return np.array(actions) if actions else np.empty((0, 0))

    def clear(self) -> int:
        """Forget all actions; return how many there were."""
        count = len(self._entries)
        self._entries.clear()
        return count

    def _joined(self, chunk: ActionChunk, at: int, old: _Entry | None) -> _Entry:
        action = np.array(chunk.actions[at - chunk.first_tick])
        # The sum of sound actions must be finite too, which float16 does not promise.
        total, weight, count = action.astype(np.result_type(action.dtype, np.float32)), 1.0, 1
        if self._seam is Seam.BLEND and old is not None:
            share = math.exp(-self._decay * old.count)
            total, weight, count = old.total + share * action, old.weight + share, old.count + 1
            action = (total / weight).astype(action.dtype)
        action.setflags(write=False)
        return _Entry(DueAction(at, action, chunk.number, chunk.observed_ns), total, weight, count)

    def _require_onward(self, tick: int) -> None:
        if self._next_tick is not None and tick < self._next_tick:
            raise InvalidInput(
                sentence("chunk buffer", expected=f"tick {self._next_tick} or later", got=tick, mend="let ticks pass")
            )
