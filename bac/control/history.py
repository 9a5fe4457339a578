"""The last observations: a policy looks back on To of them, and an episode's first stands for those before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np

from bac.errors import InvalidInput, sentence


class ObservationHistory:
    """Keeps the last observations, one per tick.

    Args:
        steps: how many, To, at least 1.

    Raises:
        InvalidInput: fewer.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise InvalidInput(sentence("history", expected="at least 1 step", got=steps, mend="keep some"))
        self._seen: deque[Mapping[str, np.ndarray]] = deque(maxlen=steps)

    def append(self, values: Mapping[str, np.ndarray]) -> None:
        """Add the newest, key -> [...]; the first one fills the whole history."""
        self._seen.extend([values] if self._seen else [values] * (self._seen.maxlen or 1))

    def stacked(self) -> dict[str, np.ndarray]:
        """Return key -> [To, ...], the oldest first.

        Raises:
            InvalidInput: nothing was observed yet.
        """
        if not self._seen:
            raise InvalidInput(sentence("history", expected="an observation", got="none yet", mend="append one"))
        return {key: np.stack([seen[key] for seen in self._seen]) for key in self._seen[-1]}
