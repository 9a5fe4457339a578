"""Episodes played and scored, as evaluation and studies both do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from bac.statistics import bootstrap_mean, wilson
from configs.schema import TaskConfig
from configs.tasks import environment
from envs.rollout import Episode, rollout
from policies.diffusion_policy import DiffusionPolicy


def play(
    task: TaskConfig, policy: DiffusionPolicy, seeds: Sequence[int], *, parallel: int, record: int = 0, title: str
) -> list[Episode]:
    """Play an episode per seed with a progress bar; the first ``record`` keep their frames."""
    with tqdm(total=len(seeds), desc=title, unit="episode") as bar:
        return rollout(
            environment(task),
            policy,
            seeds,
            parallel=parallel,
            record=seeds[:record],
            on_episode=lambda _: bar.update(),
        )


def scores(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return JSON values: mean score and success rate with 95 % intervals, and the score of every episode."""
    each = np.array([episode.score for episode in episodes])
    return {
        "score": asdict(bootstrap_mean(each)),
        "success": asdict(wilson(sum(episode.success for episode in episodes), len(episodes))),
        "scores": each.round(6).tolist(),
    }
