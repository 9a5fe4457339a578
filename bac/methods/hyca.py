"""HyCa (arXiv 2510.04188): channels clustered by how they move, each cluster predicted by the solver that suits it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.errors import InvalidInput, sentence
from bac.methods.base import ByUpdates, LastStep
from bac.methods.forecast import forecast_of
from bac.methods.uniform import Uniform
from bac.profile import FeatureProfile
from bac.schedule import CacheSchedule
from bac.solvers import LEAST_STEPS, Solver, measured_intervals

_HISTORY = 3
"""Features that a slope and its change are made of."""

_ROUNDS = 100
"""Rounds of k-means at most; some ten are enough for a few hundred channels."""

_STILL = 1e-6
"""What a descriptor of 0 counts as in the logarithm."""


@dataclass(frozen=True)
class HyCa(ByUpdates):
    """A solver per cluster of channels, on a uniform schedule.

    The channels of each block are clustered by the profile's ``channel_dynamics``; a cluster takes the solver with the
    least error, summed over its channels, at the measured interval that is nearest to K / S. All of it is decided
    offline: a prediction is a weighted sum of the latest three features with weights per channel.

    Attributes:
        updates: S, evenly spaced updates, step 0 included; the paper's interval K / S is 3 to 8.
        clusters: at most so many per block.
        seed: of the clusters' first centres; equal seeds give equal schedules.
        last_step: forced also updates at step K - 1.

    Raises:
        InvalidInput: no clusters.
    """

    updates: int = 20
    clusters: int = 8
    seed: int = 0
    last_step: LastStep = LastStep.FORCED
    name: str = "hyca"

    def __post_init__(self) -> None:
        if self.clusters < 1:
            raise InvalidInput(
                sentence("cache.clusters", expected="at least 1", got=self.clusters, mend="the default is 8")
            )

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule for the profile's checkpoint and sampler.

        Raises:
            InvalidInput: too few steps, a profile in which no solvers were compared, or more updates than steps.
        """
        require_steps(profile.steps)
        mask = Uniform(self.updates, self.last_step).schedule(profile).mask
        errors, dynamics = (profile.require(name, self.name) for name in ("solver_mse", "channel_dynamics"))
        intervals = np.array(measured_intervals(profile.steps))
        nearest = int(np.abs(intervals - profile.steps / self.updates).argmin())
        chosen = np.stack(
            [
                solver_per_channel(errors[nearest, :, block], dynamics[:, block], self.clusters, self.seed)
                for block in range(len(profile.blocks))
            ]
        )
        solvers, groups = np.unique(chosen, return_inverse=True)
        forecasts = [_forecast(mask[:1], list(Solver)[solver]) for solver in solvers]
        forecast = np.broadcast_to(np.stack(forecasts, axis=-1), (*mask.shape, _HISTORY, len(solvers)))
        return self.made(profile, mask, forecast, groups=groups.reshape(chosen.shape))


def require_steps(steps: int) -> None:
    """Refuse a number of denoising steps K at which no solvers can be compared.

    Raises:
        InvalidInput: it is below ``LEAST_STEPS``.
    """
    if steps < LEAST_STEPS:
        raise InvalidInput(
            sentence(
                "cache=hyca",
                expected=f"a sampler of at least {LEAST_STEPS} steps",
                got=steps,
                mend="use one of more steps, or another method",
            )
        )


def solver_per_channel(errors: np.ndarray, dynamics: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Return int64[d], the number in ``Solver`` of each channel's solver.

    Args:
        errors: float[solvers, d], mean squared.
        dynamics: float[descriptors, d], at least 0.
        clusters: at most so many different choices.
        seed: of the first centres.
    """
    points = np.log(np.maximum(dynamics.T.astype(np.float64), _STILL))
    spread = points.std(axis=0)
    points = (points - points.mean(axis=0)) / np.where(spread > 0, spread, 1)
    cluster = k_means(points, clusters, np.random.default_rng(seed))
    totals = np.stack([np.bincount(cluster, weights=each, minlength=clusters) for each in errors])
    return totals.argmin(axis=0)[cluster]


def k_means(points: np.ndarray, clusters: int, draw: np.random.Generator) -> np.ndarray:
    """Return int64[n], the cluster of each point float64[n, dimensions]; Lloyd's rounds from k-means++ centres."""
    centres = points[[draw.integers(len(points))]]
    for _ in range(1, clusters):
        distance = _squared_distances(points, centres).min(axis=1)
        total = distance.sum()
        if total == 0:
            break  # as many centres as different points
        centres = np.vstack((centres, points[draw.choice(len(points), p=distance / total)]))
    cluster = _squared_distances(points, centres).argmin(axis=1)
    for _ in range(_ROUNDS):
        # A centre that lost all its points stays where it is.
        for number in np.unique(cluster):
            centres[number] = points[cluster == number].mean(axis=0)
        before, cluster = cluster, _squared_distances(points, centres).argmin(axis=1)
        if np.array_equal(before, cluster):
            break
    return cluster


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((points[:, None] - centres) ** 2).sum(axis=2)


def _forecast(mask: np.ndarray, solver: Solver) -> np.ndarray:
    """Return float64[1, K, 3], a solver's weights; the first predictions lack curvature, and before that slope."""

    def rule(seen: np.ndarray, step: int) -> np.ndarray:
        features, gaps = np.eye(len(seen)), seen[:-1] - seen[1:]
        slopes = (features[:-1] - features[1:]) / gaps[:, None]
        weights = features[0]
        if len(slopes) > 0:
            a, b = solver.coefficients(step - seen[0], gaps[0])
            weights = weights + a * slopes[0]
        if len(slopes) > 1:
            weights = weights + b * (slopes[0] - slopes[1]) / gaps.mean()
        return weights

    return forecast_of(mask, _HISTORY, rule)
