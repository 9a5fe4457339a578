"""The episode loop over anything with ``predict``: many environments, one prediction for all of them at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np

from envs.errors import EnvError
from envs.stage import Env, Episode, Start, open_stage


class ChunkPredictor(Protocol):
    """What decides: the last observations in, the next actions out."""

    @property
    def observation_steps(self) -> int:
        """Observations that ``predict`` looks back on (To), at least 1."""

    def predict(self, observation: Mapping[str, np.ndarray], noise_keys: Sequence[tuple[int, int]]) -> np.ndarray:
        """Return float32[B, Ta, Da], the actions to execute next in each of B episodes, in environment units.

        Args:
            observation: key -> float32[B, To, ...], the oldest first; an episode's first one repeats before its start.
            noise_keys: (episode seed, chunk number from 0) of each row: noise drawn from it alone does not change
                with the batch that the row happens to sit in.
        """


def rollout(
    make_env: Callable[[], Env],
    predictor: ChunkPredictor,
    seeds: Sequence[int],
    *,
    parallel: int = 50,
    processes: int = 1,
    record: Collection[int] = (),
    on_episode: Callable[[Episode], None] | None = None,
) -> list[Episode]:
    """Play one episode per seed and return them in the order of ``seeds``.

    ::

        predict(B rows)  step x Ta   predict(B rows)  step x Ta   ...
        slot 0           seed 7 ....................  done: seed 9, chunk 0 ...
        slot 1           seed 8 ......................................

    Args:
        make_env: builds one environment with dict observations; called up to ``parallel`` times.
        predictor: chooses the actions; one call per round, a row per running episode.
        seeds: the episodes, as the environment's ``reset`` takes them.
        parallel: episodes that run side by side, at least 1.
        processes: that they run in, at least 1; see ``envs.stage.open_stage``. Episodes are the same with any number.
        record: seeds whose frames are kept; the environment then needs ``render`` to give rgb arrays.
        on_episode: called with each episode when it ends, in that order.

    Raises:
        EnvError: an argument is out of its range, or the predictor's actions are misshapen or not finite.
    """
    if min(parallel, processes, predictor.observation_steps) < 1:
        raise EnvError(
            "rollout: expected parallel, processes and observation_steps of at least 1, got "
            f"{parallel}, {processes} and {predictor.observation_steps}; raise them."
        )
    if not seeds:
        return []
    episodes: dict[int, Episode] = {}
    waiting = deque(enumerate(seeds))
    slots = min(parallel, len(seeds))
    with closing(open_stage(make_env, slots, predictor.observation_steps, processes)) as stage:

        def begin(free: Iterable[int]) -> dict[int, _Row]:
            rows = {slot: _Row(*waiting.popleft()) for slot in islice(free, len(waiting))}
            views = stage.play({slot: Start(row.seed, row.seed in record) for slot, row in rows.items()})
            for slot, view in views.items():
                rows[slot].history = view.history
            return rows

        running = begin(range(slots))
        while running:
            chunks = _chunks(predictor, list(running.values()), stage.action_shape)
            views = stage.play(dict(zip(running, chunks, strict=True)))
            over = []
            for slot, row in running.items():
                row.chunks, row.history, episode = row.chunks + 1, views[slot].history, views[slot].episode
                if episode is not None:
                    over.append(slot)
                    episodes[row.order] = episode
                    if on_episode is not None:
                        on_episode(episode)
            begun = begin(over)
            running = {slot: begun.get(slot, row) for slot, row in running.items() if slot in begun or slot not in over}
    return [episodes[order] for order in range(len(seeds))]


@dataclass
class _Row:
    """An episode under way: its place among the seeds, the chunks it took and its history, key -> [To, ...]."""

    order: int
    seed: int
    chunks: int = 0
    history: Mapping[str, np.ndarray] = field(default_factory=dict)


def _chunks(predictor: ChunkPredictor, rows: Sequence[_Row], action_shape: tuple[int, ...]) -> np.ndarray:
    """Return float[B, Ta, Da] for the running episodes by one prediction."""
    observation = {key: np.stack([row.history[key] for row in rows]) for key in rows[0].history}
    actions = np.asarray(predictor.predict(observation, [(row.seed, row.chunks) for row in rows]))
    batch = len(rows)
    if actions.ndim != 3 or (len(actions), actions.shape[2:]) != (batch, action_shape) or not actions.shape[1]:
        raise EnvError(
            f"rollout: expected actions [{batch}, at least 1, {action_shape}], got {actions.shape}; "
            "the predictor must return one chunk for each row."
        )
    finite = np.isfinite(actions).all(axis=(1, 2))
    if not finite.all():
        raise EnvError(
            f"rollout: expected finite actions, got NaN or infinity for seeds "
            f"{[row.seed for row, good in zip(rows, finite, strict=True) if not good]}; "
            "check the policy's weights and its observations."
        )
    return actions
