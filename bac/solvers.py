"""Solvers: the ways a channel of a feature may go on between two updates (HyCa, arXiv 2510.04188).

Each extrapolates by the slope and the curvature of the latest computed features. With x steps since the latest, h steps
between updates, s the latest difference over h and c the change of s over h (over the mean of the two gaps it spans),
the prediction is ``latest + a(x, h) s + b(x, h) c``; a solver is its a and b. The families are the paper's; implicit
formulas ask for a slope that is not known yet, and what they get for it here is stated below and is ours.
"""

from __future__ import annotations

from bac.choices import Choice

_INTERVALS = (2, 3, 5, 8)
LEAST_STEPS = 3 * min(_INTERVALS)
"""Denoising steps K below which solvers cannot be compared at any interval."""


class Solver(Choice):
    """How a channel is predicted, in the order of how much it trusts the past.

    ``hold``: the latest value. ``adams_bashforth``: along the latest slope. ``taylor``: TaylorSeer of order 2. ``bdf``:
    the second-order backward differentiation formula, its slope at the new step extrapolated. ``adams_moulton``: the
    trapezoidal rule with the slopes that the parabola through the last three values has at both ends, which is that
    parabola; the only one that is exact on parabolas.
    """

    HOLD = "hold"
    ADAMS_BASHFORTH = "adams_bashforth"
    TAYLOR = "taylor"
    BDF = "bdf"
    ADAMS_MOULTON = "adams_moulton"

    def coefficients(self, ahead: float, gap: float) -> tuple[float, float]:
        """Return a and b, what the slope and the curvature count for.

        Args:
            ahead: x > 0, steps since the latest update.
            gap: h > 0, steps between the latest two updates.
        """
        match self:
            case Solver.HOLD:
                return 0.0, 0.0
            case Solver.ADAMS_BASHFORTH:
                return ahead, 0.0
            case Solver.TAYLOR:
                return ahead, ahead**2 / 2
            case Solver.BDF:
                # Unequal steps: F = latest + (w^2 (h s) + x (1 + w) slope) / (1 + 2 w), w = x / h, slope = s + x c.
                return ahead, ahead**2 * (gap + ahead) / (gap + 2 * ahead)
            case Solver.ADAMS_MOULTON:
                return ahead, ahead * (ahead + gap) / 2


def measured_intervals(steps: int) -> tuple[int, ...]:
    """Return the intervals h at which solvers are compared: K ``steps`` hold two for the past and one to predict."""
    return tuple(interval for interval in _INTERVALS if 3 * interval <= steps)
