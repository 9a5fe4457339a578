"""Environments side by side: a stage of them in this process, or several stages in processes of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import gymnasium
import numpy as np

from envs.errors import EnvError
from envs.processes import spawned

_Value = TypeVar("_Value")

Env = gymnasium.Env[dict[str, Any], np.ndarray]
"""What is played in: observations are dicts of arrays, actions arrays."""


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


@dataclass(frozen=True)
class Start:
    """Begin an episode.

    Attributes:
        seed: what the environment is reset with.
        filmed: keep frames.
    """

    seed: int
    filmed: bool = False


@dataclass(frozen=True)
class View:
    """What an episode shows when it has begun or taken a chunk.

    Attributes:
        history: key -> [To, ...], its last observations, the oldest first; empty if it is over.
        episode: the whole of it if it is over.
    """

    history: Mapping[str, np.ndarray]
    episode: Episode | None = None


class Stage:
    """Environments in this process, each in a slot with a number."""

    def __init__(self, make_env: Callable[[], Env], slots: int, observation_steps: int) -> None:
        with ExitStack() as opened:
            self._envs = [opened.enter_context(closing(make_env())) for _ in range(slots)]
            self._opened = opened.pop_all()
        self._observation_steps = observation_steps
        self._running: dict[int, _Running] = {}

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one action."""
        return self._envs[0].action_space.shape or ()

    def play(self, tasks: Mapping[int, Start | np.ndarray]) -> dict[int, View]:
        """Begin an episode in a slot, or step through the action chunk float[Ta, Da] in the one that is under way."""
        return {slot: self._play(slot, task) for slot, task in tasks.items()}

    def close(self) -> None:
        """Close the environments."""
        self._opened.close()

    def _play(self, slot: int, task: Start | np.ndarray) -> View:
        if isinstance(task, Start):
            self._running[slot] = _Running(self._envs[slot], task, self._observation_steps)
        else:
            self._running[slot].execute(task)
        return self._running[slot].view()


class Stages:
    """What a stage is, its slots dealt out to several processes; an episode is the same in any of them."""

    def __init__(self, make_env: Callable[[], Env], slots: int, observation_steps: int, processes: int) -> None:
        shares = [len(range(own, slots, processes)) for own in range(processes)]
        with ExitStack() as opened:
            self._workers = [opened.enter_context(spawned(1, make_env)) for _ in shares]
            # All build at the same time, and what one refuses is raised here as it is.
            for future in [
                worker.submit(_open, make_env, share, observation_steps)
                for worker, share in zip(self._workers, shares, strict=True)
            ]:
                _result(future)
            opened.pop_all()

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Shape of one action."""
        return _result(self._workers[0].submit(_action_shape))

    def play(self, tasks: Mapping[int, Start | np.ndarray]) -> dict[int, View]:
        """Do what ``Stage.play`` does, in all processes at the same time."""
        count = len(self._workers)
        shares = [{slot // count: task for slot, task in tasks.items() if slot % count == own} for own in range(count)]
        futures = [worker.submit(_play, share) for worker, share in zip(self._workers, shares, strict=True)]
        return {
            slot * count + own: view for own, future in enumerate(futures) for slot, view in _result(future).items()
        }

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.shutdown(cancel_futures=True)


def open_stage(make_env: Callable[[], Env], slots: int, observation_steps: int, processes: int) -> Stage | Stages:
    """Build ``slots`` environments, in this process or, with more than one of ``processes``, in so many others.

    Args:
        make_env: builds one environment; pickled for other processes, so a function that a module has.
        slots: at least 1.
        observation_steps: observations in a view's history, at least 1.
        processes: at least 1; no more are started than there are slots.
    """
    processes = min(processes, slots)
    if processes == 1:
        return Stage(make_env, slots, observation_steps)
    return Stages(make_env, slots, observation_steps, processes)


class _Running:
    """An episode under way in one environment."""

    def __init__(self, env: Env, start: Start, observation_steps: int) -> None:
        self._env, self._start, self._observation_steps = env, start, observation_steps
        self._success = self._done = False
        self._rewards: list[float] = []
        self._frames: list[np.ndarray] = []
        self._step_undrawn = getattr(env, "step_undrawn", env.step)
        observation, _ = env.reset(seed=start.seed)
        self._history = deque([observation] * observation_steps, maxlen=observation_steps)
        self._film()

    def execute(self, chunk: np.ndarray) -> None:
        """Step through float[Ta, Da] until it or the episode ends.

        Only the last To observations are shown: images of earlier ones are not drawn by an environment that can do so.
        """
        first_shown = len(chunk) - self._observation_steps
        for number, action in enumerate(chunk):
            step = self._step_undrawn if number < first_shown else self._env.step
            observation, reward, terminated, truncated, info = step(action)
            self._history.append(observation)
            self._rewards.append(float(reward))
            self._success |= bool(info.get("is_success", terminated))
            self._film()
            self._done = terminated or truncated
            if self._done:
                return

    def view(self) -> View:
        if self._done:
            return View({}, self._episode())
        return View({key: np.stack([seen[key] for seen in self._history]) for key in self._history[-1]})

    def _episode(self) -> Episode:
        score, frames = max(self._rewards), tuple(self._frames)
        return Episode(self._start.seed, score, self._success, tuple(self._rewards), frames)

    def _film(self) -> None:
        if not self._start.filmed:
            return
        frame = self._env.render()
        if not isinstance(frame, np.ndarray):
            raise EnvError(
                f"rollout, episode {self._start.seed}: expected render() to give an array, got {type(frame).__name__}; "
                "make the environment with render_mode 'rgb_array' or record nothing."
            )
        self._frames.append(frame)


_STAGE: list[Stage] = []
"""Of a process that ``Stages`` started."""


def _open(make_env: Callable[[], Env], slots: int, observation_steps: int) -> None:
    _STAGE.append(Stage(make_env, slots, observation_steps))


def _play(tasks: Mapping[int, Start | np.ndarray]) -> dict[int, View]:
    return _STAGE[0].play(tasks)


def _action_shape() -> tuple[int, ...]:
    return _STAGE[0].action_shape


def _result(future: Future[_Value]) -> _Value:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise EnvError(
            f"rollout: expected its environment processes to live, got one that ended ({error}); "
            "play with processes=1 to see why."
        ) from error
