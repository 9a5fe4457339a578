"""What ``scripts/eval.py control=...`` plays: the configured loop, its latencies, and what is told of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from tqdm import tqdm

from bac.choices import choice
from bac.control import LatencyBudget, LoopCounters, LoopSettings, Seam
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

CONTROL_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "chunk latency p99, ms / ticks": lambda told: "{p99_ms:.1f} / {deadline_ticks}".format(**told),
    "ticks executed / held / waited": lambda told: "{executed} / {held} / {waited}".format(**told["counters"]),
    "deadline misses of chunks": lambda told: "{deadline_misses} of {requests}".format(**told["counters"]),
    "action age p99, ms": lambda told: f"{told['action_age_ms'].get('p99', 0):.0f}",
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
    """Refuse guards that do not fit the task's actions, and guards and hygiene where nothing would heed them."""
    config.control.limits(config.task.action_dim)
    hygiene = config.control.hygiene
    asked = hygiene.of_loop() != Hygiene() or hygiene.of_inference() != Hygiene()
    if mode is ControlMode.NONE and config.control.guarded:
        what, expected = "guards of control", "control=realtime or control=wallclock with them"
    elif mode is not ControlMode.WALLCLOCK and asked:
        what, expected = "control.hygiene", "control=wallclock with it"
    else:
        return
    raise InvalidInput(sentence(what, expected=expected, got=f"control={mode}", mend="choose that or leave them out"))


def play_controlled(
    config: EvalConfig, policy: DiffusionPolicy, side: str, seeds: Sequence[int], record: int, title: str
) -> tuple[list[Episode], dict[str, Any]]:
    """Play an episode per seed while time goes on.

    Args:
        config: of the evaluation.
        policy: what plays.
        side: ``cached`` or ``uncached``, whose latency trace an earlier result holds.
        seeds: the episodes.
        record: the first so many keep their frames.
        title: of the progress bar.

    Returns:
        The episodes, and what ``results.json`` says under ``control``.
    """
    control, rate_hz = config.control, loop_rate(config.task, config.rate_hz)
    settings_of = partial(control.settings, rate_hz, policy.action_steps)
    of_inference: dict[str, str] = {}

    def prepare() -> None:
        of_inference.update(control.hygiene.of_inference().apply())

    with control.hygiene.of_loop().applied() as of_loop:
        # Timed where it will be computed: in a thread that is prepared as the inference thread is.
        with ThreadPoolExecutor(1, initializer=prepare) as as_inference:
            measure = partial(measured_for, policy, settings_of, max(config.latency_calls, FEWEST_CALLS))
            trace = as_inference.submit(latency_trace, config.latency, side, measure).result()
        settings = settings_of(p99(trace))
        world = World(
            environment(config.task),
            ChunkSource([policy]),
            settings,
            config.task.max_steps,
            hold_of(config.task),
            seeds[:record],
            control.limits(config.task.action_dim),
        )
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


def latency_trace(latency: object, side: str, measure: Callable[[], list[float]]) -> list[float]:
    """Return latencies, ms: a constant, those that ``measure`` finds now, or those that an earlier result holds.

    Raises:
        InvalidInput: it is neither a number of at least 0, nor ``measured``, nor the results of a ``control`` run.
        CorruptArtefact: it is a file that holds no results.
    """
    return measure() if latency == MEASURED else given_trace(latency, side)


def given_trace(latency: object, side: str) -> list[float]:
    """Return latencies that need not be measured, ms; see ``latency_trace``."""
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


def measured_for(policy: DiffusionPolicy, settings_of: Callable[[float], LoopSettings], calls: int) -> list[float]:
    """Time chunks as a loop asks for them: with the seam ``inpaint``, around the actions that it commits.

    How many these are hangs on what a chunk takes, so it is timed anew until no more are committed than were.

    Args:
        policy: what is timed.
        settings_of: the loop's settings where a chunk takes so many ms at the 99th percentile.
        calls: timed chunks, at least 100.

    Returns:
        Milliseconds each, rounded to microseconds.

    Raises:
        Unavailable: executor or sampler cannot inpaint.
    """
    length = ChunkSource([policy]).length

    def committed(p99_ms: float) -> int:
        settings = settings_of(p99_ms)
        return min(settings.deadline_ticks, length) if settings.seam is Seam.INPAINT else 0

    count = committed(0.0)
    trace = measured_ms(policy, calls, count)
    while (more := committed(p99(trace))) > count:
        count = more
        trace = measured_ms(policy, calls, count)
    return trace


def measured_ms(policy: DiffusionPolicy, calls: int, committed: int = 0) -> list[float]:
    """Time chunks of one observation, whose values do not matter, ms each, rounded to microseconds.

    Around so many committed actions; with fewer they are called once, for each number may record a graph of its own.
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
    timed = partial(chunk, actions[:committed] if committed else None)
    return [round(each, 3) for each in LatencyBudget(1e9).measure(timed, calls=calls).taken_ms]


def p99(trace: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return float(np.percentile(trace, 99))


def drawn_from(trace: Sequence[float]) -> LatencyOf:
    """Return latencies drawn from a trace, each by its episode and chunk alone, whatever is played beside it."""
    return lambda seed, number: trace[int(np.random.default_rng((seed, number)).integers(len(trace)))]


def summary(played: Sequence[RealtimeEpisode]) -> dict[str, Any]:
    """Return JSON values: counters over all episodes, worst percentiles of an episode, action discontinuity."""
    reports = [each.report for each in played]
    names = [each.name for each in fields(LoopCounters) if each.name != "last_refusal"]
    return {
        "counters": {name: sum(getattr(each.counters, name) for each in reports) for name in names},
        "stopped": {each.episode.seed: each.report.stopped for each in played if each.report.stopped},
        "last_refusal": {each.episode.seed: told for each in played if (told := each.report.counters.last_refusal)},
        **{
            name: _worst([getattr(each, name) for each in reports])
            for name in ("jitter_ms", "observation_age_ms", "action_age_ms", "latency_ms")
        },
        "seam_jump": _spread([jump for each in played for jump in each.seam_jumps]),
        "step_within_chunk": _spread([step for each in played for step in each.steps_within]),
    }


def _worst(statistics: Sequence[dict[str, float]]) -> dict[str, float]:
    counted = [each for each in statistics if each["count"]]
    total = sum(each["count"] for each in counted)
    if not total:
        return {"count": 0}
    mean = sum(each["mean"] * each["count"] for each in counted) / total
    return {"count": total, "mean": mean, **{key: max(each[key] for each in counted) for key in ("p50", "p99", "max")}}


def _spread(distances: Sequence[float]) -> dict[str, float]:
    if not distances:
        return {"count": 0}
    p50, p95 = np.percentile(distances, [50, 95])
    return {"count": len(distances), "mean": float(np.mean(distances)), "p50": float(p50), "p95": float(p95)}
