"""Episodes played and scored, as evaluation and studies both do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from bac.statistics import mean_estimate, wilson
from configs.schema import TaskConfig
from configs.tasks import environment
from envs.rollout import rollout
from envs.stage import Episode
from policies.diffusion_policy import DiffusionPolicy

_MOST_PROCESSES = 8


def play(
    task: TaskConfig,
    policy: DiffusionPolicy,
    seeds: Sequence[int],
    *,
    title: str,
    parallel: int = 50,
    processes: int | None = None,
    record: int = 0,
) -> list[Episode]:
    """Play an episode per seed with a progress bar.

    Args:
        task: what is played.
        policy: decides.
        seeds: of the episodes.
        title: of the progress bar.
        parallel: episodes in one policy call.
        processes: that the environments run in; None for one per core, at most 8.
        record: so many of the first keep their frames.
    """
    if processes is None:
        processes = min(os.cpu_count() or 1, _MOST_PROCESSES)
    with tqdm(total=len(seeds), desc=title, unit="episode") as bar:
        return rollout(
            environment(task),
            policy,
            seeds,
            parallel=parallel,
            processes=processes,
            record=seeds[:record],
            on_episode=lambda _: bar.update(),
        )


def scores(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return JSON values: mean score and success rate with 95 % intervals, and the score of every episode."""
    each = np.array([episode.score for episode in episodes])
    return {
        "score": asdict(mean_estimate(each)),
        "success": asdict(wilson(sum(episode.success for episode in episodes), len(episodes))),
        "scores": each.round(6).tolist(),
    }
