"""What a chunk buffer should hold, said a second time and plainly: a dict of ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from bac.control import Seam
from bac.control.chunk_buffer import Taken


@dataclass
class ReferencePlan:
    """Tick -> (chunk, value) of every chunk that its action is made of, the oldest first."""

    capacity: int
    seam: Seam
    decay: float = 0.01
    ticks: dict[int, list[tuple[int, float]]] = field(default_factory=dict)

    def forget_before(self, tick: int) -> None:
        self.ticks = {at: made for at, made in self.ticks.items() if at >= tick}

    def put(self, number: int, first: int, values: Sequence[float], tick: int, committed: int = 0) -> Taken:
        self.forget_before(tick)
        given = {first + i: (number, value) for i, value in enumerate(values)}
        in_time = {at: each for at, each in given.items() if at >= tick}
        if not in_time:
            return Taken(due=0, late=len(given), kept=0, cut=0, replaced=0)
        kept = {at for at in in_time if at < first + committed and at in self.ticks}
        fresh = {at: each for at, each in in_time.items() if at < tick + self.capacity and at not in kept}
        old = {at: self.ticks.pop(at) for at in sorted(self.ticks) if at >= first and at not in kept}
        for at, each in fresh.items():
            self.ticks[at] = [*(old.get(at, []) if self.seam is Seam.BLEND else []), each]
        late, cut = len(given) - len(in_time), len(in_time) - len(kept) - len(fresh)
        return Taken(due=len(fresh), late=late, kept=len(kept), cut=cut, replaced=len(old))

    def take(self, tick: int) -> tuple[int, float] | None:
        """Return the newest chunk that the action due at ``tick`` is from, and the action."""
        self.forget_before(tick)
        made = self.ticks.pop(tick, None)
        if made is None:
            return None
        weights = [math.exp(-self.decay * i) for i in range(len(made))]
        return made[-1][0], sum(w * value for w, (_, value) in zip(weights, made, strict=True)) / sum(weights)
