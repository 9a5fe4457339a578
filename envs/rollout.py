"""The episode loop over anything with ``predict``: many environments, one prediction for all of them at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium
import numpy as np

from envs.errors import EnvError

Env = gymnasium.Env[dict[str, Any], np.ndarray]
"""What ``rollout`` plays in: observations are dicts of arrays, actions arrays."""


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


@dataclass(frozen=True)
class Episode:
    """One finished episode.

    Attributes:
        seed: what the environment was reset with.
        score: the highest reward of the episode.
        success: the environment called a step a success (``is_success`` in its info, else ``terminated``).
        rewards: one per control step.
        frames: uint8[H, W, 3] each, the first before the first step; empty unless recorded.
    """

    seed: int
    score: float
    success: bool
    rewards: tuple[float, ...]
    frames: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)

    @property
    def steps(self) -> int:
        """Number of control steps."""
        return len(self.rewards)


def rollout(
    make_env: Callable[[], Env],
    predictor: ChunkPredictor,
    seeds: Sequence[int],
    *,
    parallel: int = 50,
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
        parallel: episodes that run side by side in this process, at least 1.
        record: seeds whose frames are kept; the environment then needs ``render`` to give rgb arrays.
        on_episode: called with each episode when it ends, in that order.

    Raises:
        EnvError: an argument is out of its range, or the predictor's actions are misshapen or not finite.
    """
    if parallel < 1 or predictor.observation_steps < 1:
        raise EnvError(
            "rollout: expected parallel and observation_steps of at least 1, got "
            f"{parallel} and {predictor.observation_steps}; raise them."
        )
    episodes: dict[int, Episode] = {}
    waiting = deque(enumerate(seeds))

    def begin(env: Env) -> _Running:
        order, seed = waiting.popleft()
        return _Running(env, order, seed, predictor.observation_steps, filmed=seed in record)

    with ExitStack() as stack:
        envs = [stack.enter_context(closing(make_env())) for _ in range(min(parallel, len(seeds)))]
        running = [begin(env) for env in envs]
        while running:
            for row, chunk in zip(running, _chunks(predictor, running), strict=True):
                row.execute(chunk)
                if row.done:
                    episodes[row.order] = row.episode()
                    if on_episode is not None:
                        on_episode(episodes[row.order])
            running = [begin(row.env) if row.done else row for row in running if waiting or not row.done]
    return [episodes[order] for order in range(len(seeds))]


class _Running:
    """An episode under way in one environment."""

    def __init__(self, env: Env, order: int, seed: int, observation_steps: int, *, filmed: bool) -> None:
        self.env, self.order, self.seed, self.chunks, self.done = env, order, seed, 0, False
        self._success = False
        self._filmed = filmed
        self._rewards: list[float] = []
        self._frames: list[np.ndarray] = []
        observation, _ = env.reset(seed=seed)
        self.history = deque([observation] * observation_steps, maxlen=observation_steps)
        self._film()

    def execute(self, chunk: np.ndarray) -> None:
        """Step through float[Ta, Da] until it or the episode ends."""
        self.chunks += 1
        for action in chunk:
            observation, reward, terminated, truncated, info = self.env.step(action)
            self.history.append(observation)
            self._rewards.append(float(reward))
            self._success |= bool(info.get("is_success", terminated))
            self._film()
            self.done = terminated or truncated
            if self.done:
                return

    def episode(self) -> Episode:
        return Episode(self.seed, max(self._rewards), self._success, tuple(self._rewards), tuple(self._frames))

    def _film(self) -> None:
        if not self._filmed:
            return
        frame = self.env.render()
        if not isinstance(frame, np.ndarray):
            raise EnvError(
                f"rollout, episode {self.seed}: expected render() to give an array, got {type(frame).__name__}; "
                "make the environment with render_mode 'rgb_array' or record nothing."
            )
        self._frames.append(frame)


def _chunks(predictor: ChunkPredictor, running: Sequence[_Running]) -> np.ndarray:
    """Return float[B, Ta, Da] for the running episodes by one prediction."""
    keys = running[0].history[-1]
    observation = {key: np.stack([[seen[key] for seen in row.history] for row in running]) for key in keys}
    actions = np.asarray(predictor.predict(observation, [(row.seed, row.chunks) for row in running]))
    batch, action_shape = len(running), running[0].env.action_space.shape or ()
    if actions.ndim != 3 or (len(actions), actions.shape[2:]) != (batch, action_shape) or not actions.shape[1]:
        raise EnvError(
            f"rollout: expected actions [{batch}, at least 1, {action_shape}], got {actions.shape}; "
            "the predictor must return one chunk for each row."
        )
    finite = np.isfinite(actions).all(axis=(1, 2))
    if not finite.all():
        raise EnvError(
            f"rollout: expected finite actions, got NaN or infinity for seeds "
            f"{[row.seed for row, good in zip(running, finite, strict=True) if not good]}; "
            "check the policy's weights and its observations."
        )
    return actions
