"""Numbers of a loop that may run for days: constant memory, whatever is counted."""

from __future__ import annotations

import numpy as np


class RecentStatistics:
    """Count, mean and largest of all values; percentiles of the latest ones.

    Args:
        capacity: how many values percentiles are of.
    """

    def __init__(self, capacity: int = 4096) -> None:
        self._recent = np.zeros(capacity)
        self._total = 0.0
        self.count = 0
        self.largest = -np.inf

    def add(self, value: float) -> None:
        """Count a finite value."""
        self._recent[self.count % len(self._recent)] = value
        self.count += 1
        self._total += value
        self.largest = max(self.largest, value)

    def to_json(self) -> dict[str, float]:
        """Return ``count`` and, unless it is 0, ``mean``, ``p50``, ``p99`` and ``max``."""
        if not self.count:
            return {"count": 0}
        p50, p99 = np.percentile(self._recent[: min(self.count, len(self._recent))], [50, 99])
        return {
            "count": self.count,
            "mean": self._total / self.count,
            "p50": float(p50),
            "p99": float(p99),
            "max": float(self.largest),
        }
