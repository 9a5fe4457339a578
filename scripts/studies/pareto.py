"""Every method at several budgets: what it costs and how far its actions are from the uncached ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from bac.executors import ExecutorKind
from bac.files import write_whole
from bac.methods import Method
from bac.pictures import plain_log_axis, save_figure
from bac.results import run_provenance, write_results
from bac.schedule import CacheSchedule
from bac.trials import Trials
from configs.methods import default_method
from configs.schema import BenchConfig
from configs.tasks import HELD_OUT_SEED, demonstrations
from policies.benchmark import executor_rows, noise_of
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import load_policy, locate_checkpoint, make_schedule, schedule_folder
from studies.rows import markdown_table, started, timed

_COLUMNS = ("method", "GFLOPs", "action error mean", "p95", "p50 ms", "p99 ms")


def run(config: BenchConfig, folder: Path) -> None:
    """Judge all methods, then time them in turn; write table, plot and JSON into ``folder``.

    What was judged is kept in ``config.pareto.kept`` after each schedule: a killed study goes on where it stopped.
    """
    torch.set_num_threads(config.threads)
    checkpoint = locate_checkpoint(config.checkpoint or config.task.name)
    policy = load_policy(checkpoint, device=config.device)
    schedules = {label: make_schedule(method, policy, checkpoint) for label, method in _methods(config)}
    schedules |= _found(policy, checkpoint)
    judged = _judged(config, policy, schedules)

    rows = list(executor_rows(policy, schedules, ExecutorKind.AUTO))
    built, _ = started(rows, policy)
    spread = demonstrations(config.task).spread_observations(1, policy.observation_steps, HELD_OUT_SEED)
    latency = timed(config, policy, built, policy.observe(spread), "time")
    results = [
        {"method": label, **judged[label], **latency[row.name].to_json()}
        for label, row in zip(schedules, rows, strict=True)
    ]
    text = markdown_table(_COLUMNS, map(_cells, results))
    write_whole(folder / "pareto.md", lambda path: path.write_text(text))
    save_figure(_plot(results), folder / "pareto.png")
    provenance = run_provenance(torch.device(config.device), asdict(config))
    write_results(folder / "results.json", {"rows": results, "provenance": provenance})
    print(f"{text}\nresults in {folder}")


def _methods(config: BenchConfig) -> Iterator[tuple[str, Method]]:
    """Yield every method of ``config.pareto.methods`` with the defaults of its YAML file at each budget."""
    for name in config.pareto.methods:
        method = default_method(name)
        for budget in config.pareto.updates:
            yield (each := method.with_budget(budget)).label, each


def _found(policy: DiffusionPolicy, checkpoint: Path) -> dict[str, CacheSchedule]:
    """Return the schedules that ``cache=search`` left beside the checkpoint."""
    kept = sorted(schedule_folder(checkpoint, policy.sampler).glob("search-*.json"))
    return {path.stem: CacheSchedule.load(path) for path in kept}


def _judged(
    config: BenchConfig, policy: DiffusionPolicy, schedules: dict[str, CacheSchedule]
) -> dict[str, dict[str, float]]:
    kept = Path(config.pareto.kept)
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    missing = {key: schedule for schedule in schedules.values() if (key := _key(config, schedule)) not in done}
    if missing:
        trials = _trials(config, policy)
        for key, schedule in tqdm(missing.items(), desc="judge", unit="schedule"):
            errors = trials.action_errors(schedule)
            done[key] = {
                "gflops": trials.flops(schedule) / 1e9,
                "error": float(errors.mean()),
                "error_p95": float(np.percentile(errors, 95)),
            }
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, lambda path: path.write_text(json.dumps(done, indent=1)))
    return {label: done[_key(config, schedule)] for label, schedule in schedules.items()}


def _trials(config: BenchConfig, policy: DiffusionPolicy) -> Trials:
    """Return held-out observations to judge on."""
    spread = demonstrations(config.task).spread_observations(
        config.error_observations, policy.observation_steps, HELD_OUT_SEED
    )
    noise = noise_of(policy, policy.sampler.steps, config.error_observations, HELD_OUT_SEED)
    return Trials(policy.trunk, policy.sampler, policy.provenance, policy.observe(spread), noise, policy.spec.executed)


def _key(config: BenchConfig, schedule: CacheSchedule) -> str:
    return f"{schedule.digest} on {config.error_observations}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    shown = {"gflops": "{:.2f}", "error": "{:.4f}", "error_p95": "{:.4f}", "p50": "{:.1f}", "p99": "{:.1f}"}
    return (row["method"], *(form.format(row[key]) for key, form in shown.items()))


def _plot(results: list[dict[str, Any]]) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(results, key=lambda row: row["gflops"]):
        by_method.setdefault(row["method"].rpartition("-")[0], []).append(row)
    for number, (name, rows) in enumerate(by_method.items()):
        for panel, key in zip(panels, ("gflops", "p50"), strict=True):
            panel.plot([row[key] for row in rows], [row["error"] for row in rows], "o-", color=f"C{number}", label=name)
    for panel, label in zip(panels, ("GFLOPs per chunk", "ms per chunk, p50"), strict=True):
        panel.set(yscale="log", xlabel=label)
        plain_log_axis(panel, "x")
    panels[0].set_ylabel("mean action error, held-out observations")
    panels[0].legend(fontsize=8)
    return figure
