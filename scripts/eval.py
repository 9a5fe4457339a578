"""Play a task with a cached policy: ``python scripts/eval.py task=push_t cache=bac``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import bac
from bac.errors import InvalidInput, sentence
from bac.files import write_whole
from bac.methods import NoCache, full_schedule
from bac.passes import optimise
from bac.pictures import save_figure, schedule_grid
from bac.plan import PlanCost, cost, lower
from bac.profile import FeatureProfile
from bac.results import run_provenance, write_results
from bac.schedule import CacheSchedule
from bac.statistics import bootstrap_mean, wilson
from bac.timing import Latency, device_synchroniser, measure_interleaved
from configs.entry import script
from configs.schema import EvalConfig
from configs.tasks import TaskDemonstrations, demonstrations, environment
from envs.rollout import Episode, rollout
from policies.action_error import action_errors
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import load_policy, locate_checkpoint, profile_path


def main(config: EvalConfig, folder: Path) -> None:
    """Evaluate; print a table, write results, pictures and videos into ``folder``."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _require_known_comparison(config)
    checkpoint = locate_checkpoint(config.checkpoint or config.task.name)
    uncached = load_policy(checkpoint, sampler=config.sampler.build, device=config.device)
    schedule = _schedule(config, uncached, checkpoint)
    cached = bac.accelerate(uncached, schedule)

    episodes = _play(config, cached, "cached", record=config.video)
    results = _scores(config, episodes)
    if config.compare:
        results["compare"] = _comparison(episodes, _play(config, uncached, "uncached", record=0))
    demos = demonstrations(config.task)
    errors = _action_errors(config, cached, uncached, demos)
    results["action_error"] = {"mean": float(errors.mean()), "p95": float(np.percentile(errors, 95))}
    results |= _speed(config, cached, uncached, demos)
    full = full_schedule(schedule.blocks, schedule.steps, schedule.provenance)
    results |= _flops(
        cost(optimise(lower(schedule)), cached.trunk.cost), cost(optimise(lower(full)), cached.trunk.cost)
    )
    results["schedule"] = {
        "method": schedule.method,
        "parameters": dict(schedule.parameters),
        "digest": schedule.digest,
        "block_updates": schedule.updates,
        "sampler": dict(uncached.sampler.identity),
        "checkpoint": uncached.checkpoint.digest,
    }
    results["provenance"] = run_provenance(torch.device(config.device), asdict(config))

    (folder / "schedule.txt").write_text(schedule.grid() + "\n")
    save_figure(schedule_grid(schedule), folder / "schedule.png")
    for episode in episodes:
        if episode.frames:
            _write_video(episode, folder / f"episode_{episode.seed}.mp4", config.task.rate_hz)
    write_results(folder / "results.json", results)
    _print(results, folder)


def _require_known_comparison(config: EvalConfig) -> None:
    if config.compare not in {None, "none"}:
        raise InvalidInput(
            sentence("compare", expected="none (the uncached policy) or null", got=config.compare, mend="give one")
        )


def _schedule(config: EvalConfig, policy: DiffusionPolicy, checkpoint: Path) -> CacheSchedule:
    method = config.cache.build()
    if isinstance(method, NoCache):
        return full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)
    profile = FeatureProfile.load(profile_path(checkpoint, policy.sampler))
    return method.schedule(profile)


def _play(config: EvalConfig, policy: DiffusionPolicy, name: str, *, record: int) -> list[Episode]:
    first = config.task.seed if config.seed is None else config.seed
    seeds = range(first, first + config.episodes)
    with tqdm(total=config.episodes, desc=f"play {name}", unit="episode") as bar:
        return rollout(
            environment(config.task),
            policy,
            seeds,
            parallel=config.parallel,
            record=seeds[:record],
            on_episode=lambda _: bar.update(),
        )


def _scores(config: EvalConfig, episodes: list[Episode]) -> dict[str, Any]:
    scores = np.array([episode.score for episode in episodes])
    return {
        "task": config.task.name,
        "episodes": len(episodes),
        "seed": episodes[0].seed,
        "score": asdict(bootstrap_mean(scores)),
        "success": asdict(wilson(sum(episode.success for episode in episodes), len(episodes))),
        "scores": scores.round(6).tolist(),
    }


def _comparison(cached: list[Episode], uncached: list[Episode]) -> dict[str, Any]:
    """Return the uncached scores and the paired differences, cached minus uncached, same seeds and noise."""
    ours, theirs = (np.array([episode.score for episode in each]) for each in (cached, uncached))
    wins = np.array([[episode.success for episode in each] for each in (cached, uncached)], dtype=float)
    return {
        "score": asdict(bootstrap_mean(theirs)),
        "success": asdict(wilson(int(wins[1].sum()), len(theirs))),
        "score_difference": asdict(bootstrap_mean(ours - theirs)),
        "success_difference": asdict(bootstrap_mean(wins[0] - wins[1])),
        "scores": theirs.round(6).tolist(),
    }


def _action_errors(
    config: EvalConfig, cached: DiffusionPolicy, uncached: DiffusionPolicy, demos: TaskDemonstrations
) -> np.ndarray:
    # Another seed than any calibration's: schedules are judged on observations they were not made from.
    spread = demos.spread_observations(config.error_observations, cached.observation_steps, seed=1_000_003)
    return action_errors(cached, uncached, spread)


def _speed(
    config: EvalConfig, cached: DiffusionPolicy, uncached: DiffusionPolicy, demos: TaskDemonstrations
) -> dict[str, Any]:
    observation = demos.spread_observations(1, cached.observation_steps, seed=0)
    calls: dict[str, Callable[[], object]] = {
        "cached": lambda: cached.predict(observation),
        "uncached": lambda: uncached.predict(observation),
    }
    synchronise = device_synchroniser(torch.device(config.device))
    latency = measure_interleaved(calls, calls=config.latency_calls, synchronise=synchronise)
    return {
        "latency_ms": {name: _latency(each) for name, each in latency.items()},
        "speedup": latency["uncached"].p50_ms / latency["cached"].p50_ms,
        "control_rate_hz": {name: 1e3 / each.p99_ms for name, each in latency.items()},
    }


def _latency(latency: Latency) -> dict[str, float]:
    return {
        "p50": latency.p50_ms,
        "p99": latency.p99_ms,
        "mean": latency.mean_ms,
        "warmup_s": latency.warmup_s,
        "calls": latency.calls,
    }


def _flops(cached: PlanCost, uncached: PlanCost) -> dict[str, Any]:
    costs = {"cached": cached, "uncached": uncached}
    return {
        "gflops": {name: each.planned / 1e9 for name, each in costs.items()},
        "gflops_hoisted": {name: each.hoisted / 1e9 for name, each in costs.items()},
    }


def _write_video(episode: Episode, path: Path, rate_hz: float) -> None:
    frames = np.stack(episode.frames)
    write_whole(path, lambda partial: iio.imwrite(partial, frames, extension=".mp4", fps=rate_hz))


def _print(results: dict[str, Any], folder: Path) -> None:
    table = Table("", "cached", "uncached", title=f"{results['task']}, {results['schedule']['method']}")
    compared = results.get("compare", {})
    for name in ("score", "success"):
        table.add_row(name, *(_interval(each.get(name)) for each in (results, compared)))
    if compared:
        table.add_row("score difference", _interval(compared["score_difference"]), "")
    table.add_row("action error mean / p95", "{mean:.4f} / {p95:.4f}".format(**results["action_error"]), "0")
    both = ("cached", "uncached")
    table.add_row("GFLOPs", *(f"{results['gflops'][each]:.2f}" for each in both))
    table.add_row(
        "latency p50 / p99, ms", *("{p50:.1f} / {p99:.1f}".format(**results["latency_ms"][each]) for each in both)
    )
    table.add_row("control rate at p99, Hz", *(f"{results['control_rate_hz'][each]:.1f}" for each in both))
    table.add_row("speed-up", f"{results['speedup']:.2f}x", "1x")
    Console().print(table)
    print(f"{results['episodes']} episodes from seed {results['seed']}; results in {folder}")


def _interval(estimate: dict[str, float] | None) -> str:
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**estimate) if estimate else "-"


if __name__ == "__main__":
    script("eval", EvalConfig)(main)()
