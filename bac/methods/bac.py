"""Block-wise Adaptive Caching (Ji et al., arXiv 2506.13456): ACS per block, then the Bubbling Union."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bac.methods.acs import IntervalScore, adaptive_update_steps
from bac.methods.base import ByUpdates, LastStep
from bac.methods.bubbling_union import Downstream, bubbling_union
from bac.profile import FeatureProfile, Metric
from bac.schedule import CacheSchedule


@dataclass(frozen=True)
class BlockAdaptive(ByUpdates):
    """BAC with the paper's parameters.

    Attributes:
        updates: S, update steps per block before the union, step 0 included.
        upstream_blocks: n, blocks widened by the union; the paper takes 5 in simulation, 3 on the robot.
        metric: how features are compared.
        score: interval score of the dynamic programme.
        downstream: which FFNs the union looks at.
        last_step: forced also updates every block at step K - 1, as the authors' code does.
    """

    updates: int = 10
    upstream_blocks: int = 5
    metric: Metric = Metric.COSINE
    score: IntervalScore = IntervalScore.ANCHOR
    downstream: Downstream = Downstream.INCLUSIVE
    last_step: LastStep = LastStep.FORCED
    name: str = "bac"

    def schedule(self, profile: FeatureProfile) -> CacheSchedule:
        """Return the schedule for the profile's checkpoint and sampler."""
        mask = np.zeros((len(profile.blocks), profile.steps), dtype=bool)
        for row, similarity in zip(mask, profile.similarity(self.metric), strict=True):
            row[list(adaptive_update_steps(similarity, self.updates, self.score))] = True
        mask = bubbling_union(mask, profile.blocks, profile.reuse_error(), self.upstream_blocks, self.downstream)
        return self.last_step.applied(self.made(profile, mask))
