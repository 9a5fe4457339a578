"""Channels: how each channel of a feature moves from step to step, and how well each solver predicts it.

All channels of a block are cached together, yet they do not move alike (HyCa, arXiv 2510.04188). Errors are measured as
they are made, on uncached features that count as computed at every h-th step and as predicted in between; the errors
of all solvers follow from six second moments of the features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bac.solvers import Solver, measured_intervals

_FAR = 4
"""Steps over which a channel's persistence is measured."""


class ChannelTotals:
    """Sums over observations of what ``FeatureProfile`` calls ``solver_mse`` and ``channel_dynamics``.

    Args:
        blocks: number of blocks.
        steps: K. Where it is too small for any interval, nothing is measured.
    """

    def __init__(self, blocks: int, steps: int) -> None:
        self._intervals = measured_intervals(steps)
        self._errors: list[Tensor | float] = [0.0] * blocks
        self._squares: list[Tensor | float] = [0.0] * blocks
        self._observations = 0

    def add(self, block: int, features: Tensor) -> None:
        """Count float[K, B, T, d] of a block."""
        if not self._intervals:
            return
        observations, rows = features.shape[1], features.flatten(1, 2)
        errors = torch.stack([_solver_errors(rows, interval) for interval in self._intervals])
        self._errors[block] += observations * errors.double().cpu()
        self._squares[block] += observations * _mean_squares(rows).double().cpu()
        if block == 0:
            self._observations += observations

    def statistics(self) -> dict[str, np.ndarray]:
        """Return both by name, means over the observations; none if nothing was measured."""
        if not self._intervals:
            return {}
        errors, squares = (
            torch.stack([torch.as_tensor(total) for total in totals], dim=-2) / self._observations
            for totals in (self._errors, self._squares)
        )
        size, change, bend, far = squares.sqrt()
        ratios = torch.stack((change / size, bend / change, far / change / _FAR))
        # 0 / 0 is a channel that never moves.
        dynamics = ratios.nan_to_num(nan=0.0)
        return {"solver_mse": errors.float().numpy(), "channel_dynamics": dynamics.float().numpy()}


def _solver_errors(rows: Tensor, interval: int) -> Tensor:
    """Return float[solvers, d], mean squared errors where float[K, N, d] is computed at every ``interval``-th step."""
    periods = rows[: len(rows) // interval * interval].view(-1, interval, *rows.shape[1:])
    slopes = (periods[1:, 0] - periods[:-1, 0]) / interval
    slope, curve = slopes[1:], (slopes[1:] - slopes[:-1]) / interval
    known = [_mean_product(slope, slope), _mean_product(slope, curve), _mean_product(curve, curve)]
    errors = rows.new_zeros(len(Solver), rows.shape[-1])
    for ahead in range(1, interval):
        change = periods[2:, ahead] - periods[2:, 0]
        moments = [_mean_product(change, each) for each in (change, slope, curve)]
        # The square of change - a slope - b curve.
        factors = [
            (1, -2 * a, -2 * b, a * a, 2 * a * b, b * b)
            for a, b in (solver.coefficients(ahead, interval) for solver in Solver)
        ]
        errors += rows.new_tensor(factors) @ torch.stack(moments + known)
    # Where a solver is nearly exact the moments cancel, and rounding can leave less than nothing.
    return (errors / (interval - 1)).clamp_(min=0)


def _mean_squares(rows: Tensor) -> Tensor:
    """Return float[4, d], mean squares of float[K, N, d], its change, the change of that, its change over 4 steps."""
    change = rows.diff(dim=0)
    parts = rows, change, change.diff(dim=0), rows[_FAR:] - rows[:-_FAR]
    return torch.stack([_mean_product(part, part) for part in parts])


def _mean_product(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).mean(dim=(0, 1))
