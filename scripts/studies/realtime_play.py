"""What ``scripts/eval.py control=...`` plays: the configured loop, its latencies, and what is told of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from tqdm import tqdm

from bac.choices import choice
from bac.control import LoopCounters, LoopSettings, MonotonicClock, Seam
from bac.control.clock import NS_PER_MS
from bac.control.latency_budget import FEWEST_CALLS
from bac.control.process import Hygiene
from bac.errors import InvalidInput, sentence
from bac.methods import CrossChunk, Method
from bac.results import read_results
from bac.timing import device_synchroniser
from configs.controls import ControlMode, hold_of
from configs.schema import EvalConfig
from configs.tasks import environment, loop_rate
from envs.stage import Episode
from policies.diffusion_policy import DiffusionPolicy
from policies.realtime import ChunkSource, goes_on
from studies.realtime_episodes import LatencyOf, RealtimeEpisode, World, play_virtual, play_wallclock

MEASURED = "measured"
_WARMUP = 5

CONTROL_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "chunk latency p99, ms / ticks": lambda told: "{p99_ms:.1f} / {deadline_ticks}".format(**told),
    "ticks executed / held / waited": lambda told: "{executed} / {held} / {waited}".format(**told["counters"]),
    "ticks skipped, stopped episodes": lambda told: f"{told['counters']['skipped']}, {len(told['stopped'])}",
    "deadline misses of chunks": lambda told: "{deadline_misses} of {requests}".format(**told["counters"]),
    "action age mean / max, ms": lambda told: "{mean:.0f} / {max:.0f}".format(
        **{"mean": 0, "max": 0} | told["action_age_ms"]
    ),
}
"""What evaluation prints of a control loop: label -> from what ``results.json`` says of one side."""


def require_playable(config: EvalConfig, method: Method) -> None:
    """Refuse settings that cannot be played, before any work is done.

    Raises:
        InvalidInput: an unknown choice, a rate that is not the environment's, settings of a loop where there is none,
            latencies that are none, guards or hygiene that nothing would heed, limits that are not of the task's
            actions, or a method whose chunks go on from the chunk before.
        CorruptArtefact: latencies from a file that holds no results.
    """
    mode = choice("control", config.control.mode, ControlMode)
    rate_hz = loop_rate(config.task, config.rate_hz)
    config.control.settings(rate_hz, config.task.action_steps, 0.0)
    _require_guards(config, mode)
    if mode is ControlMode.NONE and (config.latency != MEASURED or config.rate_hz is not None):
        raise InvalidInput(
            sentence(
                "latency and rate_hz",
                expected="control=realtime or control=wallclock with them",
                got="control=none",
                mend="choose one of these",
            )
        )
    if mode is ControlMode.WALLCLOCK and config.latency != MEASURED:
        raise InvalidInput(
            sentence("latency", expected="measured in wall-clock time", got=config.latency, mend="use control=realtime")
        )
    if mode is not ControlMode.NONE and isinstance(method, CrossChunk):
        raise goes_on(method.label)
    if config.latency != MEASURED:
        for side in ("cached", "uncached") if config.compare else ("cached",):
            given_trace(config.latency, side)


def _require_guards(config: EvalConfig, mode: ControlMode) -> None:
    """Refuse limits that do not fit the task's actions, and what nothing would heed in this mode."""
    config.control.limits(config.task.action_dim)
    hygiene, chosen = config.control.hygiene, config.control.chosen
    asked = hygiene.of_loop() != Hygiene() or hygiene.of_inference() != Hygiene()
    if mode is ControlMode.NONE and chosen:
        what, expected = f"control.{chosen[0]}", "control=realtime or control=wallclock with it"
    elif mode is not ControlMode.WALLCLOCK and asked:
        what, expected = "control.hygiene", "control=wallclock with it"
    elif mode is not ControlMode.NONE and config.processes is not None:
        what, expected = "processes", "control=none with it, for a loop's episodes are played in one process"
    else:
        return
    raise InvalidInput(sentence(what, expected=expected, got=f"control={mode}", mend="choose that or leave it out"))


def control_latencies(config: EvalConfig, policies: Mapping[str, DiffusionPolicy]) -> dict[str, list[float]]:
    """Return the latencies that each side is played with, ms: those given, or those of chunks timed here, in turn.

    Args:
        config: of the evaluation.
        policies: by side, ``cached`` or ``uncached``.

    Raises:
        Unavailable: executor or sampler cannot inpaint, and the seam does.
    """
    control, rate_hz = config.control, loop_rate(config.task, config.rate_hz)
    asked = {
        side: (policy, partial(control.settings, rate_hz, policy.action_steps)) for side, policy in policies.items()
    }
    if config.latency != MEASURED:
        for policy, settings_of in asked.values():
            _chunk_of(policy, 1)() if settings_of(0.0).seam is Seam.INPAINT else None
        return {side: given_trace(config.latency, side) for side in policies}
    # Timed where it will be computed: in a thread that is prepared as the inference thread is.
    with (
        control.hygiene.of_loop().applied(),
        ThreadPoolExecutor(1, initializer=control.hygiene.of_inference().apply) as as_inference,
    ):
        return as_inference.submit(measured_for, asked, max(config.latency_calls, FEWEST_CALLS)).result()


def play_controlled(
    config: EvalConfig, policy: DiffusionPolicy, trace: list[float], seeds: Sequence[int], record: int, title: str
) -> tuple[list[Episode], dict[str, Any]]:
    """Play an episode per seed while time goes on.

    Args:
        config: of the evaluation.
        policy: what plays.
        trace: its latencies, ms.
        seeds: the episodes.
        record: the first so many keep their frames.
        title: of the progress bar.

    Returns:
        The episodes, and what ``results.json`` says under ``control``.
    """
    control, rate_hz = config.control, loop_rate(config.task, config.rate_hz)
    of_inference: dict[str, str] = {}

    def prepare() -> None:
        of_inference.update(control.hygiene.of_inference().apply())

    settings = control.settings(rate_hz, policy.action_steps, p99(trace))
    world = World(
        environment(config.task),
        ChunkSource([policy]),
        settings,
        config.task.max_steps,
        hold_of(config.task),
        seeds[:record],
        control.limits(config.task.action_dim),
    )
    with control.hygiene.of_loop().applied() as of_loop:
        played = _played(config, world, seeds, trace, prepare, title)
    told = {"mode": control.mode, "rate_hz": rate_hz, "deadline_ticks": settings.deadline_ticks, "p99_ms": p99(trace)}
    told |= {"trace_ms": trace, "hygiene": {"loop": of_loop, "inference": of_inference}}
    return [each.episode for each in played], {**told, **summary(played)}


def _played(
    config: EvalConfig,
    world: World,
    seeds: Sequence[int],
    trace: Sequence[float],
    prepare: Callable[[], object],
    title: str,
) -> list[RealtimeEpisode]:
    with tqdm(total=len(seeds), desc=title, unit="episode") as bar:

        def report(_: Episode) -> None:
            bar.update()

        if config.control.mode == ControlMode.WALLCLOCK:
            return play_wallclock(world, seeds, prepare=prepare, on_episode=report)
        return play_virtual(world, seeds, drawn_from(trace), parallel=config.parallel, on_episode=report)


def given_trace(latency: object, side: str) -> list[float]:
    """Return latencies that need not be measured, ms: a constant, or those that an earlier result holds.

    Raises:
        InvalidInput: it is neither a number of at least 0 nor the results of a ``control`` run.
        CorruptArtefact: it is a file that holds no results.
    """
    if _is_latency(latency):
        return [float(latency)]
    path = Path(str(latency))
    if path.is_file():
        kept: Any = read_results(path)
        for key in ("control", side, "trace_ms"):
            kept = kept.get(key) if isinstance(kept, dict) else None
        if kept and isinstance(kept, list) and all(map(_is_latency, kept)):
            return [float(each) for each in kept]
    raise InvalidInput(
        sentence(
            "latency",
            expected=f"measured, milliseconds, or the results.json of a control run that played {side}",
            got=latency,
            mend="give one of these",
        )
    )


def _is_latency(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def measured_for(
    asked: Mapping[str, tuple[DiffusionPolicy, Callable[[float], LoopSettings]]], calls: int
) -> dict[str, list[float]]:
    """Time chunks as a loop asks for them: with the seam ``inpaint``, around the actions that it commits.

    How many these are hangs on what a chunk takes, so it is timed anew until no more are committed than were.

    Args:
        asked: name -> what is timed, and the loop's settings where a chunk takes so many ms at the 99th percentile.
        calls: timed chunks of each, at least 100.

    Returns:
        Milliseconds each, rounded to microseconds, by name.

    Raises:
        Unavailable: executor or sampler cannot inpaint.
    """
    lengths = {name: ChunkSource([policy]).length for name, (policy, _) in asked.items()}

    def committed(name: str, p99_ms: float) -> int:
        settings = asked[name][1](p99_ms)
        return min(settings.deadline_ticks, lengths[name]) if settings.seam is Seam.INPAINT else 0

    policies = [policy for policy, _ in asked.values()]
    counts = {name: committed(name, 0.0) for name in asked}
    while True:
        timed = measured_in_turn(list(zip(policies, counts.values(), strict=True)), calls)
        traces = dict(zip(asked, timed, strict=True))
        more = {name: max(counts[name], committed(name, p99(traces[name]))) for name in asked}
        if more == counts:
            return traces
        counts = more


def measured_in_turn(asked: Sequence[tuple[DiffusionPolicy, int]], calls: int) -> list[list[float]]:
    """Time chunks of one observation, whose values do not matter, ms each, rounded to microseconds.

    Args:
        asked: policies, each with the number of committed actions that its chunks are denoised around.
        calls: of each; all are called in turn, so that a slow minute of the machine is every one's.
    """
    timed = [_chunk_of(policy, committed) for policy, committed in asked]
    taken_ms: list[list[float]] = [[] for _ in timed]
    clock = MonotonicClock()
    with tqdm(desc="time", unit="chunk", total=calls * len(timed), delay=1) as bar:
        for number in range(_WARMUP + calls):
            for chunk, taken in zip(timed, taken_ms, strict=True):
                began = clock.now_ns()
                chunk()
                ended = clock.now_ns()
                if number >= _WARMUP:
                    taken.append(round((ended - began) / NS_PER_MS, 3))
                    bar.update()
    return taken_ms


def _chunk_of(policy: DiffusionPolicy, committed: int) -> Callable[[], object]:
    """Return what asks for a chunk around so many actions, once it was called with fewer.

    Each number may record a graph of its own; and who cannot inpaint says so here.
    """
    blank = {key: values[None] for key, values in policy.spec.blank_observation().items()}
    source, synchronise = ChunkSource([policy]), device_synchroniser(policy.trunk.device)

    def chunk(given: np.ndarray | None) -> np.ndarray:
        (actions,) = source.chunks(blank, [(0, 0)], [given])
        synchronise()
        return actions

    actions = chunk(None)
    for count in range(1, committed):
        chunk(actions[:count])
    return partial(chunk, actions[:committed] if committed else None)


def p99(trace: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return float(np.percentile(trace, 99))


def drawn_from(trace: Sequence[float]) -> LatencyOf:
    """Return latencies drawn from a trace, each by its episode and chunk alone, whatever is played beside it."""
    return lambda seed, number: trace[int(np.random.default_rng((seed, number)).integers(len(trace)))]


def summary(played: Sequence[RealtimeEpisode]) -> dict[str, Any]:
    """Return JSON values: counters and statistics over all episodes, and the discontinuity of the actions."""
    reports = [each.report for each in played]
    names = [each.name for each in fields(LoopCounters) if each.name != "last_refusal"]
    return {
        "counters": {name: sum(getattr(each.counters, name) for each in reports) for name in names},
        "stopped": {each.episode.seed: each.report.stopped for each in played if each.report.stopped},
        "last_refusal": {each.episode.seed: told for each in played if (told := each.report.counters.last_refusal)},
        **{
            name: _over_episodes([getattr(each, name) for each in reports])
            for name in ("jitter_ms", "observation_age_ms", "action_age_ms", "latency_ms")
        },
        "seam_jump": _spread([jump for each in played for jump in each.seam_jumps]),
        "step_within_chunk": _spread([step for each in played for step in each.steps_within]),
    }


def _over_episodes(statistics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return count, mean and maximum over all episodes, and the 99th percentile of the worst one.

    An episode tells its percentiles alone, and those of all of them together are none of these.
    """
    counted = [each for each in statistics if each["count"]]
    total = sum(each["count"] for each in counted)
    if not total:
        return {"count": 0}
    return {
        "count": total,
        "mean": sum(each["mean"] * each["count"] for each in counted) / total,
        "max": max(each["max"] for each in counted),
        "worst_episode_p99": max(each["p99"] for each in counted),
    }


def _spread(distances: Sequence[float]) -> dict[str, float]:
    if not distances:
        return {"count": 0}
    p50, p95 = np.percentile(distances, [50, 95])
    return {"count": len(distances), "mean": float(np.mean(distances)), "p50": float(p50), "p95": float(p95)}
