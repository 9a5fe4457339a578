"""Degradation: to a cheaper schedule after misses, and back with hysteresis."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from bac.errors import InvalidInput, sentence


@dataclass(frozen=True)
class Degradation:
    """When to change the level. Level 0 is the most accurate schedule, each next one cheaper.

    Attributes:
        levels: how many there are, at least 1.
        misses: so many ticks with a miss ...
        window: ... among so many ticks lead to the next level.
        recover: so many ticks in a row without a miss lead one level back; at least ``window``, or the level would
            go back and forth.
    """

    levels: int = 1
    misses: int = 3
    window: int = 50
    recover: int = 200

    def __post_init__(self) -> None:
        if self.levels < 1 or not 1 <= self.misses <= self.window <= self.recover:
            raise InvalidInput(
                sentence(
                    "degradation",
                    expected="at least 1 level and 1 <= misses <= window <= recover",
                    got=self,
                    mend="correct the settings",
                )
            )


class Degrader:
    """Counts misses and says which level is on."""

    def __init__(self, rule: Degradation) -> None:
        self._rule = rule
        self._missed: deque[bool] = deque(maxlen=rule.window)
        self._clean = 0
        self.level = 0

    def tick(self, missed: bool) -> int:
        """Count a tick; return the change of level, -1, 0 or 1."""
        self._missed.append(missed)
        self._clean = 0 if missed else self._clean + 1
        if sum(self._missed) >= self._rule.misses and self.level + 1 < self._rule.levels:
            return self._change(1)
        if self._clean >= self._rule.recover and self.level > 0:
            return self._change(-1)
        return 0

    def _change(self, by: int) -> int:
        self.level += by
        # What happened at the other level says nothing about this one.
        self._missed.clear()
        self._clean = 0
        return by
