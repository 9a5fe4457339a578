"""Every method at several budgets: what it costs, how far its actions are from the uncached ones, what it scores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import bac
from bac.errors import InvalidInput, sentence
from bac.executors import ExecutorKind, WeightType
from bac.feature_error import feature_errors
from bac.files import write_whole
from bac.methods import LastStep, Method, NoCache
from bac.pictures import plain_log_axis, save_figure
from bac.plan import schedule_cost
from bac.profiler import record_features
from bac.results import run_provenance, write_results
from bac.schedule import CacheSchedule
from bac.statistics import Estimate, mean_estimate, paired_difference
from bac.trials import Trials
from configs.methods import default_method
from configs.studies import BenchConfig
from configs.tasks import HELD_OUT_SEED, demonstrations
from policies.benchmark import executor_rows, noise_of
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import load_policy, make_schedule, schedule_path
from studies.episodes import play, scores
from studies.evaluations import read_evaluation
from studies.kept import Kept
from studies.rows import markdown_table, started, timed

_UNCACHED = NoCache().label
COLUMNS = (
    "method", "GFLOPs", "action error mean", "p95", "feature error", "p50 ms", "p99 ms", "score", "difference, paired",
)  # fmt: skip
_RECORDED = 4
"""Held-out observations whose features are kept to judge predictions; 40 MB each at Push-T's sizes."""


def run(config: BenchConfig, folder: Path) -> None:
    """Judge all methods, time them in turn, play the frontier and the headline rows; write table, plots and JSON.

    What was judged and played is kept in ``config.pareto.kept`` after each schedule: a killed study goes on from it.
    """
    torch.set_num_threads(os.cpu_count() or 1)  # neither an error nor a score depends on it
    source = config.checkpoint or config.task.name
    policy = load_policy(source, sampler=config.sampler.build, device=config.device)
    schedules = {label: make_schedule(method, policy) for label, method in _methods(config)}
    schedules |= _found(policy)
    _require_known(config.pareto.headline, schedules)
    kept = Kept(Path(config.pareto.kept))

    judged = _judged(config, policy, schedules, kept)
    chosen = dict.fromkeys(
        (_UNCACHED, *frontier(judged), *equals(judged, config.pareto.equal_gflops), *config.pareto.headline)
    )
    played = _played(config, policy, {label: schedules[label] for label in chosen}, kept)
    latency = _timed(config, policy, schedules)
    results = [
        {
            **judged[label],
            **latency.get(label, {"p50": None, "p99": None}),
            **_against(played.get(label), played.get(_UNCACHED)),
        }
        for label in schedules
    ]
    text = markdown_table(COLUMNS, map(cells, results))
    write_whole(folder / "pareto.md", lambda path: path.write_text(text))
    save_figure(_error_plot(results), folder / "pareto.png")
    if played:
        save_figure(_score_plot(results), folder / "scores.png")
    provenance = run_provenance(torch.device(config.device), asdict(config))
    sampler = dict(policy.sampler.identity)
    write_results(folder / "results.json", {"sampler": sampler, "rows": results, "provenance": provenance})
    print(f"{text}\nresults in {folder}")


def _methods(config: BenchConfig) -> Iterator[tuple[str, Method]]:
    """Yield no caching, and every method with the defaults of its YAML file at each of its budgets."""
    yield _UNCACHED, NoCache()
    forced = [default_method(name) for name in config.pareto.methods]
    free = [
        replace(default_method(name), last_step=LastStep.FREE)  # type: ignore[type-var]
        for name in config.pareto.free_last_step
    ]
    for method in (*forced, *free):
        for budget in config.pareto.budgets.get(method.name, config.pareto.updates):
            yield (each := method.with_budget(budget)).label, each


def _found(policy: DiffusionPolicy) -> dict[str, CacheSchedule]:
    """Return the schedules that ``cache=search`` left beside the checkpoint."""
    kept = sorted(schedule_path(policy, "search").parent.glob("search-*.json"))
    return {path.stem: CacheSchedule.load(path) for path in kept}


def _require_known(headline: list[str], schedules: dict[str, CacheSchedule]) -> None:
    unknown = sorted(set(headline) - set(schedules))
    if unknown:
        raise InvalidInput(
            sentence("pareto.headline", expected=f"some of {list(schedules)}", got=unknown, mend="correct the override")
        )


def _judged(
    config: BenchConfig, policy: DiffusionPolicy, schedules: dict[str, CacheSchedule], kept: Kept
) -> dict[str, dict[str, Any]]:
    """Return GFLOPs, action errors and feature errors of each schedule on held-out observations."""

    def key(schedule: CacheSchedule) -> str:
        return f"{schedule.digest} on {config.error_observations} observations"

    judge = cache(partial(_judge, config, policy))  # costly to make, and needless if all is known

    def values_of(schedule: CacheSchedule) -> dict[str, Any]:
        return judge()(schedule)

    judged = {}
    for label, schedule in tqdm(schedules.items(), desc="judge", unit="schedule"):
        values = kept.get(key(schedule), partial(values_of, schedule))
        about = {"label": label, "method": schedule.method, "parameters": dict(schedule.parameters)}
        judged[label] = {**about, **values}
    return judged


def _judge(config: BenchConfig, policy: DiffusionPolicy) -> Callable[[CacheSchedule], dict[str, Any]]:
    spread = demonstrations(config.task, config.demonstrations).spread_observations(
        config.error_observations, policy.observation_steps, HELD_OUT_SEED
    )
    observed = policy.observe(spread)
    noise = noise_of(policy, policy.sampler.steps, config.error_observations, HELD_OUT_SEED)
    trials = Trials(policy.trunk, policy.sampler, policy.provenance, observed, noise, policy.spec.executed)
    features = record_features(
        policy.trunk, policy.sampler, observed[:_RECORDED], noise_of(policy, policy.sampler.steps, _RECORDED)
    )

    def judge(schedule: CacheSchedule) -> dict[str, Any]:
        gflops = schedule_cost(schedule, policy.trunk.cost).planned / 1e9
        if schedule.recall is not None:  # it goes on from the chunk before; these observations are of single chunks
            return {"gflops": gflops, "error": None, "error_p95": None, "feature_error": None}
        errors = trials.action_errors(schedule)
        by_step = feature_errors(schedule, features)
        return {
            "gflops": gflops,
            "error": float(errors.mean()),
            "error_p95": float(np.percentile(errors, 95)),
            "feature_error": float(by_step.mean()),
            "feature_error_by_step": by_step.round(5).tolist(),
        }

    return judge


def frontier(judged: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Yield what no other schedule beats in both GFLOPs and error, the cheapest first."""
    least = np.inf
    known = {label: values for label, values in judged.items() if values["error"] is not None}
    for label, values in sorted(known.items(), key=lambda item: (item[1]["gflops"], item[1]["error"])):
        if values["error"] < least:
            least = values["error"]
            yield label


def equals(judged: Mapping[str, dict[str, Any]], gflops: float) -> Iterator[str]:
    """Yield of each method the label of least error within so many GFLOPs; none of one that costs more."""
    by_method: dict[str, list[str]] = {}
    for label, row in judged.items():
        by_method.setdefault(row["method"], []).append(label)
    for labels in by_method.values():
        within = [label for label in labels if judged[label]["gflops"] <= gflops]
        if within:
            # What goes on from the chunk before has no error to choose by.
            yield min(within, key=lambda label: judged[label]["error"] or -judged[label]["gflops"])


def _played(
    config: BenchConfig, policy: DiffusionPolicy, schedules: dict[str, CacheSchedule], kept: Kept
) -> dict[str, dict[str, Any]]:
    """Return scores of each schedule, all on the same episodes and noise; nothing if no episodes are wanted."""
    if config.pareto.episodes == 0:
        return {}
    seeds = range(config.task.seed, config.task.seed + config.pareto.episodes)
    evaluated = _evaluated(config.pareto.evaluated, seeds, config.task.max_steps)
    playing = partial(play, config.task, seeds=seeds, parallel=config.pareto.parallel)

    def played(label: str, schedule: CacheSchedule) -> dict[str, Any]:
        return scores(playing(policy=bac.accelerate(policy, schedule), title=label))

    results = {}
    for label, schedule in schedules.items():
        key = f"{schedule.digest} on {len(seeds)} episodes from {seeds[0]}, at most {config.task.max_steps} steps"
        results[label] = evaluated.get(schedule.digest) or kept.get(key, partial(played, label, schedule))
    return results


def _evaluated(paths: list[str], seeds: range, max_steps: int) -> dict[str, dict[str, Any]]:
    """Return scores by digest of schedules that ``scripts/eval.py`` played on these episodes, among others.

    What was played in another way is left out: in a world that does not wait, with other weights than float32, or
    with longer or shorter episodes.
    """
    found = {}
    for path in paths:
        run = read_evaluation(Path(path))
        played = run["scores"][: len(seeds)]
        usual = "control" not in run and run["executor"]["weights"] == WeightType.FP32
        as_long = run["provenance"]["config"]["task"]["max_steps"] == max_steps
        if usual and as_long and run["seed"] == seeds[0] and len(played) == len(seeds):
            digest = run["schedule"]["digest"]
            found[digest] = {"score": asdict(mean_estimate(played)), "scores": played, "evaluated": path}
    return found


def _timed(
    config: BenchConfig, policy: DiffusionPolicy, schedules: dict[str, CacheSchedule]
) -> dict[str, dict[str, float]]:
    """Return the latency of each schedule, all timed in turn; not of those that go on from the chunk before."""
    torch.set_num_threads(config.threads)
    single = {label: schedule for label, schedule in schedules.items() if schedule.recall is None}
    rows = list(executor_rows(policy, single, ExecutorKind.AUTO))
    built, _ = started(rows, policy)
    latency = timed(config, policy, built, policy.observe(policy.spec.blank_observation()), "time")
    return {label: latency[row.name].to_json() for label, row in zip(single, rows, strict=True)}


def _against(played: dict[str, Any] | None, uncached: dict[str, Any] | None) -> dict[str, Any]:
    """Return the scores of a row with the paired difference from the uncached ones, or nothing."""
    if played is None or uncached is None:
        return {}
    return {**played, "score_difference": asdict(paired_difference(played["scores"], uncached["scores"]))}


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row of the table under ``COLUMNS``."""
    shown = {"gflops": "{:.2f}", "error": "{:.4f}", "error_p95": "{:.4f}", "feature_error": "{:.3f}",
             "p50": "{:.1f}", "p99": "{:.1f}"}  # fmt: skip
    numbers = ["-" if row[key] is None else form.format(row[key]) for key, form in shown.items()]
    if "score" not in row:
        return (row["label"], *numbers, "-", "-")
    return (row["label"], *numbers, str(Estimate(**row["score"])), Estimate(**row["score_difference"]).signed)


def _lines(results: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (name, rows by cost) per method, with the free last step apart."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(results, key=lambda row: row["gflops"]):
        if row["method"] != _UNCACHED:
            free = row["parameters"].get("last_step") == LastStep.FREE
            by_name.setdefault(f"{row['method']}{', last step free' if free else ''}", []).append(row)
    yield from by_name.items()


_MARKERS = "osv^D*PX<>ph"


def _error_plot(results: list[dict[str, Any]]) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), layout="constrained", sharey=True)
    for number, (name, rows) in enumerate(_lines(results)):
        style = {"marker": _MARKERS[number % len(_MARKERS)], "color": f"C{number % 10}", "label": name}
        for panel, key in zip(panels, ("gflops", "p50"), strict=True):
            drawn = [(row[key], row["error"]) for row in rows if row["error"]]
            panel.plot(*np.array(drawn).reshape(-1, 2).T, markersize=5, linewidth=0.9, **style)
    for panel, label in zip(panels, ("GFLOPs per chunk", "ms per chunk, p50"), strict=True):
        panel.set(yscale="log", xlabel=label)
        plain_log_axis(panel, "x")
    panels[0].set_ylabel("mean action error, held-out observations")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return figure


def _score_plot(results: list[dict[str, Any]]) -> Figure:
    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for row in results:
        if "score" in row and row["p50"] is not None:
            score = row["score"]
            spread = [[score["mean"] - score["low"]], [score["high"] - score["mean"]]]
            axis.errorbar(row["p50"], score["mean"], spread, fmt="o", capsize=3, markersize=4)
            axis.annotate(
                row["label"], (row["p50"], score["mean"]), fontsize=7, xytext=(4, 3), textcoords="offset points"
            )
    plain_log_axis(axis, "x")
    axis.set(xlabel="ms per chunk, p50", ylabel="mean score, 95 % interval")
    return figure
