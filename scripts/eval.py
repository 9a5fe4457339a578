"""Play a task with a cached policy: ``python scripts/eval.py task=push_t cache=bac``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from studies.calibration import Calibration
from studies.episodes import play, scores
from studies.realtime_play import CONTROL_ROWS, control_latencies, play_controlled, require_playable
from tqdm import tqdm

import bac
from bac.acceleration import select_for
from bac.device import use_threads
from bac.errors import InvalidInput, TooLarge, sentence
from bac.executors import Selection, WeightType
from bac.files import write_whole
from bac.methods import NoCache
from bac.pictures import save_figure, schedule_grid
from bac.results import run_provenance, write_results
from bac.schedule import CacheSchedule
from bac.statistics import paired_difference
from configs.controls import ControlMode
from configs.entry import script
from configs.schema import EvalConfig
from configs.tasks import HELD_OUT_SEED, demonstrations, require_environment, require_task
from envs.stage import Episode
from policies.diffusion_policy import DiffusionPolicy
from policies.evaluation import action_errors, latency_and_flops
from policies.loading import PRETRAINED, load_policy, locate_checkpoint, make_schedule


def main(config: EvalConfig, folder: Path) -> None:
    """Evaluate; print a table, write results, pictures and videos into ``folder``."""
    _require_counts(config)
    require_environment(config.task, draws=config.video > 0)
    use_threads(config.threads)
    if config.compare not in {None, "none"}:
        raise InvalidInput(
            sentence("compare", expected="none (the uncached policy) or null", got=config.compare, mend="give one")
        )
    method = config.cache.build()
    require_playable(config, method)
    checkpoint = locate_checkpoint(config.checkpoint or config.task.name)
    policy = load_policy(checkpoint, sampler=config.sampler.build, device=config.device, weights=config.weights)
    require_task(config.task, policy.spec)
    demos = demonstrations(config.task, config.demonstrations, config.filter_key)
    if not checkpoint.is_relative_to(PRETRAINED):  # a shipped policy's files belong to the package
        Calibration(config.calibration, policy, demos).on_first_use(method)
    schedule = make_schedule(method, policy)
    executor = config.executor.select(schedule, policy.trunk)
    cached = bac.accelerate(policy, schedule, executor)
    uncached, uncached_executor = _uncached(policy, executor)

    spread = demos.spread_observations(config.error_observations, cached.observation_steps, HELD_OUT_SEED)
    first = config.task.seed if config.seed is None else config.seed
    seeds = range(first, first + config.episodes)
    sides = {"cached": cached} | ({"uncached": uncached} if config.compare else {})
    traces = {} if config.control.mode == ControlMode.NONE else control_latencies(config, sides)
    playing = partial(_play, config, seeds, traces)
    episodes, told = playing(cached, "cached", record=config.video)
    results = {"task": config.task.name, "episodes": len(episodes), "seed": episodes[0].seed, **scores(episodes)}
    if config.compare:
        reference, of_reference = playing(uncached, "uncached")
        results["compare"] = _comparison(episodes, reference)
        told |= of_reference
    if told:
        results["control"] = told
    # A schedule that recalls the chunk before is judged where it does, on the second chunk of two.
    before = demos.spread_observations(
        config.error_observations, cached.observation_steps, HELD_OUT_SEED, earlier=cached.action_steps
    )
    errors = action_errors(cached, uncached, spread, before=None if schedule.recall is None else before)
    results["action_error"] = {"mean": float(errors.mean()), "p95": float(np.percentile(errors, 95))}
    one = demos.spread_observations(1, cached.observation_steps, HELD_OUT_SEED)
    timed = 2 if cached.spec.vision is None else 3  # cached, uncached, and the encoder apart
    with tqdm(desc="time", unit="call", total=timed * config.latency_calls, delay=1) as bar:
        results |= latency_and_flops(cached, schedule, uncached, one, config.latency_calls, bar.update)
    results["checkpoint"] = {"file": str(checkpoint), "weights": policy.checkpoint.training.get("weights")}
    results["schedule"] = _describe(schedule)
    results["executor"] = executor.to_json()
    results["uncached_executor"] = uncached_executor.to_json()
    results["provenance"] = run_provenance(torch.device(config.device), asdict(config))

    # First of all: what is drawn and filmed can be had again from the schedule and the seeds.
    write_results(folder / "results.json", results)
    write_whole(folder / "schedule.txt", lambda partial: partial.write_text(schedule.grid() + "\n"))
    save_figure(schedule_grid(schedule), folder / "schedule.png")
    for episode in episodes[: config.video]:
        _write_video(episode, folder / f"episode_{episode.seed}.mp4", config.task.rate_hz)
    _print(results, folder)


def _require_counts(config: EvalConfig) -> None:
    """Refuse numbers that would otherwise be missed only after the episodes."""
    fewest = {"episodes": 1, "video": 0, "parallel": 1, "processes": 1}
    fewest |= {"latency_calls": 1, "error_observations": 1}
    for name, least in fewest.items():
        given = getattr(config, name)
        if given is not None and given < least:
            raise InvalidInput(sentence(name, expected=f"at least {least}", got=given, mend="correct the override"))


def _uncached(policy: DiffusionPolicy, executor: Selection) -> tuple[DiffusionPolicy, Selection]:
    """Return the uncached policy and what runs it: the same executor in float32, or ``auto`` if that cannot hold it."""
    schedule, alike = make_schedule(NoCache(), policy), replace(executor, weights=WeightType.FP32)
    try:
        return bac.accelerate(policy, schedule, alike), alike
    except TooLarge:
        other = select_for(schedule, policy.trunk)
        return bac.accelerate(policy, schedule, other), other


def _play(
    config: EvalConfig,
    seeds: Sequence[int],
    traces: Mapping[str, list[float]],
    policy: DiffusionPolicy,
    side: str,
    record: int = 0,
) -> tuple[list[Episode], dict[str, Any]]:
    """Play the episodes; return them and, if the world does not wait for the policy, how the control loop fared."""
    if config.control.mode == ControlMode.NONE:
        return play(
            config.task,
            policy,
            seeds,
            parallel=config.parallel,
            processes=config.processes,
            record=record,
            title=f"play {side}",
        ), {}
    episodes, told = play_controlled(config, policy, traces[side], seeds, record, f"play {side}")
    return episodes, {side: told}


def _comparison(cached: list[Episode], uncached: list[Episode]) -> dict[str, Any]:
    """Return the uncached scores and the paired differences, cached minus uncached, same seeds and noise."""
    score, success = (
        paired_difference([of(each) for each in cached], [of(each) for each in uncached])
        for of in (attrgetter("score"), attrgetter("success"))
    )
    return {**scores(uncached), "score_difference": asdict(score), "success_difference": asdict(success)}


def _describe(schedule: CacheSchedule) -> dict[str, Any]:
    return {
        "method": schedule.method,
        "parameters": dict(schedule.parameters),
        "digest": schedule.digest,
        "block_updates": schedule.updates,
        "sampler": dict(schedule.provenance.sampler),
        "checkpoint": schedule.provenance.checkpoint,
    }


def _write_video(episode: Episode, path: Path, rate_hz: float) -> None:
    frames = np.stack(episode.frames)
    write_whole(path, lambda partial: iio.imwrite(partial, frames, extension=".mp4", fps=rate_hz))


def _print(results: dict[str, Any], folder: Path) -> None:
    table = Table("", "cached", _uncached_title(results), title=_title(results))
    compared = results.get("compare", {})
    for name in ("score", "success"):
        table.add_row(name, *(_interval(each.get(name)) for each in (results, compared)))
    if compared:
        table.add_row("score difference", _interval(compared["score_difference"]), "")
    table.add_row("action error mean / p95", "{mean:.4f} / {p95:.4f}".format(**results["action_error"]), "0")
    for label, key, shown in (
        ("GFLOPs", "gflops", "{:.2f}"),
        ("latency p50 / p99, ms", "latency_ms", "{0[p50]:.1f} / {0[p99]:.1f}"),
        ("control rate at p99, Hz", "control_rate_hz", "{:.1f}"),
    ):
        table.add_row(label, *(shown.format(results[key][side]) for side in ("cached", "uncached")))
    if "encoder" in results["latency_ms"]:
        spent = "{p50:.1f} / {p99:.1f}".format(**results["latency_ms"]["encoder"])
        table.add_row("of which encoder, ms", spent, spent)
    table.add_row("speed-up", f"{results['speedup']:.2f}x", "1x")
    for label, show in CONTROL_ROWS.items():
        if "control" in results:
            told = results["control"]
            table.add_row(label, *(show(told[side]) if side in told else "-" for side in ("cached", "uncached")))
    Console().print(table)
    print("{weights} weights of {file}".format(**results["checkpoint"]))
    print(f"{results['episodes']} episodes from seed {results['seed']}; results in {folder}")


def _title(results: dict[str, Any]) -> str:
    executor = results["executor"]
    return f"{results['task']}, {results['schedule']['method']}, {executor['kind']} {executor['weights']}"


def _uncached_title(results: dict[str, Any]) -> str:
    executor = results["uncached_executor"]
    return "uncached" if executor == results["executor"] else f"uncached, {executor['kind']} {executor['weights']}"


def _interval(estimate: dict[str, float] | None) -> str:
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**estimate) if estimate else "-"


if __name__ == "__main__":
    script("eval", EvalConfig)(main)()
