"""Training windows over episodes of different length, with the padding rules of diffusion_policy."""

from __future__ import annotations

import numpy as np


def window_index(episode_ends: np.ndarray, *, horizon: int, pad_before: int, pad_after: int) -> np.ndarray:
    """Return int64[N, horizon]: for every window the frames it is made of.

    A window may start up to ``pad_before`` frames before its episode and end up to ``pad_after`` frames behind it;
    the missing frames repeat the episode's first or last one. diffusion_policy pads by ``observation_steps - 1``
    and ``action_steps - 1``::

        frames        0 0 1 2 3 ... n-2 n-1 n-1 n-1
        first window  ^^^^^^^            ^^^^^^^^^^^ last window

    Args:
        episode_ends: int64[E], the index one past each episode's last frame, increasing.
        horizon: frames in a window, at least 1.
        pad_before: frames of padding before an episode, at least 0.
        pad_after: frames of padding behind an episode, at least 0.
    """
    windows = []
    start = 0
    for end in episode_ends.tolist():
        length = end - start
        first = np.arange(-pad_before, length - horizon + pad_after + 1)
        inside = np.clip(first[:, None] + np.arange(horizon), 0, length - 1)
        windows.append(start + inside)
        start = end
    return np.concatenate(windows)
