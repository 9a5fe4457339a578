"""Episodes whose world goes on while the policy thinks: on a virtual clock, many side by side, or in real time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from threading import Thread, current_thread
from time import monotonic

import numpy as np

from bac.control import (
    ActionLimits,
    Command,
    CommandKind,
    ControlLoop,
    Inference,
    LoopReport,
    LoopSettings,
    MonotonicClock,
    Observation,
    ObservationHistory,
    Request,
    SimulatedInference,
    ThreadInference,
    VirtualClock,
)
from bac.control.clock import Clock
from bac.control.loop import Hold
from bac.errors import Unavailable, sentence
from envs.stage import Env, Episode
from policies.realtime import ChunkSource

LatencyOf = Callable[[int, int], float]
"""(episode seed, chunk number) -> milliseconds."""


@dataclass(frozen=True)
class RealtimeEpisode:
    """An episode and what its loop had to say.

    Attributes:
        episode: as from a rollout; ticks before the first action are no steps, for the world was at rest.
        report: of the loop.
        seam_jumps: distances of consecutive executed actions where the second is from another chunk, task units.
        steps_within: likewise, where both are from one chunk.
    """

    episode: Episode
    report: LoopReport
    seam_jumps: tuple[float, ...]
    steps_within: tuple[float, ...]


@dataclass(frozen=True)
class World:
    """What episodes are played in.

    Attributes:
        make_env: builds one environment.
        source: chooses the actions.
        settings: of the loop; its rate is the environment's.
        max_ticks: ticks until an episode ends, waiting for the first chunk included.
        hold: what keeps the robot where it is.
        record: seeds whose frames are kept.
        limits: of actions, or None.
    """

    make_env: Callable[[], Env]
    source: ChunkSource
    settings: LoopSettings
    max_ticks: int
    hold: Hold
    record: Collection[int] = field(default=())
    limits: ActionLimits | None = None


def play_virtual(
    world: World,
    seeds: Sequence[int],
    latency: LatencyOf,
    *,
    parallel: int = 50,
    on_episode: Callable[[Episode], object] = lambda _: None,
) -> list[RealtimeEpisode]:
    """Play an episode per seed in virtual time; the same latencies give the same episodes.

    Chunks of several episodes are predicted in one call, as ``envs.rollout`` does: with no latency and the seam
    ``replace`` the calls, and so the episodes, are the same to the last bit.

    Args:
        world: what they are played in.
        seeds: the episodes.
        latency: of each chunk.
        parallel: episodes side by side, at least 1.
        on_episode: called with each episode when it ends.
    """
    played: dict[int, RealtimeEpisode] = {}
    waiting = deque(enumerate(seeds))

    def begin(env: Env) -> _Simulated:
        order, seed = waiting.popleft()
        return _Simulated(world, env, seed, order, latency)

    with ExitStack() as stack:
        envs = [stack.enter_context(closing(world.make_env())) for _ in range(min(parallel, len(seeds)))]
        running = [begin(env) for env in envs]
        while running:
            asking = []
            for row in running:
                row.advance()
                while row.done:
                    played[row.order] = row.result()
                    on_episode(played[row.order].episode)
                    if not waiting:
                        break
                    row = begin(row.env)
                    row.advance()
                if not row.done:
                    asking.append(row)
            running = asking
            _answer(world.source, running)
    return [played[order] for order in range(len(seeds))]


def play_wallclock(
    world: World,
    seeds: Sequence[int],
    *,
    clock: Clock | None = None,
    prepare: Callable[[], object] = lambda: None,
    leaving_s: float = 300.0,
    on_episode: Callable[[Episode], object] = lambda _: None,
) -> list[RealtimeEpisode]:
    """Play an episode per seed in real time, one after the other, inference in its own thread, which ends with it.

    The world is stepped where the loop acts: in ticks that it skips, for the simulator itself took too long, it stands.

    Args:
        world: what they are played in.
        seeds: the episodes.
        clock: of the loops; by default the monotonic clock.
        prepare: called first in each inference thread.
        leaving_s: how long a chunk that is under way when its episode ends may still take.
        on_episode: called with each episode when it ends.

    Raises:
        Unavailable: a chunk that took longer.
    """
    played = []
    time = MonotonicClock() if clock is None else clock
    threads: list[Thread] = []  # of one episode: more than one if inference was started again

    def begin() -> None:
        threads.append(current_thread())
        prepare()

    with closing(world.make_env()) as env:
        for seed in seeds:
            threads.clear()
            with closing(ThreadInference(world.source.predictor(seed), time, begin)) as inference:
                row = _Running(world, env, seed, inference, time)
                row.loop.start()
                while not row.done:
                    row.begin_tick()
                    row.end_tick()
            # A chunk that nobody will execute would compete with the next episode's first.
            deadline_s = monotonic() + leaving_s
            for thread in threads:
                thread.join(max(deadline_s - monotonic(), 0.0))
                if thread.is_alive():
                    raise Unavailable(
                        sentence(
                            f"inference of episode {seed}",
                            expected=f"to finish its last chunk within {leaving_s:g} s of the episode's end",
                            got="no answer",
                            mend="see what its predictor waits for",
                        )
                    )
            played.append(row.result())
            on_episode(played[-1].episode)
    return played


class _Running:
    """An episode under way in one environment."""

    def __init__(self, world: World, env: Env, seed: int, inference: Inference, clock: Clock) -> None:
        self.env, self.seed, self.done = env, seed, False
        self._world, self._clock = world, clock
        self.loop = ControlLoop(world.settings, inference, clock, limits=world.limits, hold=world.hold)
        self._rewards: list[float] = []
        self._frames: list[np.ndarray] = []
        self._success = False
        self._last: Command | None = None
        self._jumps: tuple[list[float], list[float]] = [], []
        first, _ = env.reset(seed=seed)
        self._history = ObservationHistory(world.source.observation_steps)
        self._history.append(first)
        self._film()

    def begin_tick(self) -> None:
        self.loop.wait()
        self.loop.sense(Observation(self._history.stacked(), self._clock.now_ns()))

    def end_tick(self) -> None:
        command = self.loop.act()
        if command.action is not None:
            self._step(command, command.action)
        self.done |= command.kind is CommandKind.STOP or self.loop.tick + 1 >= self._world.max_ticks
        self._last = command

    def result(self) -> RealtimeEpisode:
        score = max(self._rewards, default=0.0)
        episode = Episode(self.seed, score, self._success, tuple(self._rewards), tuple(self._frames))
        return RealtimeEpisode(episode, self.loop.report(), *map(tuple, self._jumps))

    def _step(self, command: Command, action: np.ndarray) -> None:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._history.append(observation)
        self._rewards.append(float(reward))
        self._success |= bool(info.get("is_success", terminated))
        self._film()
        self.done = terminated or truncated
        last = self._last
        executed = last is not None and command.kind is last.kind is CommandKind.EXECUTE
        if last is not None and executed and command.tick == last.tick + 1:
            assert last.action is not None  # what was executed had one
            distance = float(np.linalg.norm(action - last.action))
            self._jumps[command.chunk == last.chunk].append(distance)

    def _film(self) -> None:
        if self.seed in self._world.record:
            frame = self.env.render()
            assert isinstance(frame, np.ndarray)
            self._frames.append(frame)


class _Simulated(_Running):
    """An episode in virtual time, which stops where it asks for a chunk."""

    def __init__(self, world: World, env: Env, seed: int, order: int, latency: LatencyOf) -> None:
        self.order = order
        self.asked: Request | None = None
        self.chunk: np.ndarray | None = None
        self._sensed = False
        clock = VirtualClock()

        def latency_of(request: Request) -> float:
            self.asked = request
            return latency(seed, request.number)

        super().__init__(world, env, seed, SimulatedInference(self._given, latency_of, clock), clock)

    def advance(self) -> None:
        """Go on until a chunk is asked for or the episode ends."""
        while not self.done:
            if self._sensed:
                self._sensed = False
                self.end_tick()
                continue
            self.begin_tick()
            self._sensed = True
            if self.asked is not None:
                return

    def _given(self, _: Request) -> np.ndarray:
        assert self.chunk is not None  # computed when it was asked for
        return self.chunk


def _answer(source: ChunkSource, rows: Sequence[_Simulated]) -> None:
    """Predict what the rows ask for, in one call per level."""
    asked = [(row, row.asked) for row in rows if row.asked is not None]
    for level in sorted({request.level for _, request in asked}):
        group = [(row, request) for row, request in asked if request.level == level]
        values = [request.observation.values for _, request in group]
        observation = {key: np.stack([each[key] for each in values]) for key in values[0]}
        keys = [(row.seed, request.number) for row, request in group]
        chunks = source.chunks(observation, keys, [request.committed for _, request in group], level)
        for (row, _), chunk in zip(group, chunks, strict=True):
            row.chunk, row.asked = chunk, None
