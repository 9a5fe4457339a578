"""Schedules that were evaluated, under every executor: success beside the time it takes, in one table a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bac.acceleration import select_for
from bac.errors import InvalidInput, Mismatch, sentence
from bac.executors import ExecutorKind
from bac.files import write_whole
from bac.results import run_provenance, write_results
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule
from bac.statistics import Estimate, mean_estimate, paired_difference
from bac.timing import Latency
from configs.methods import default_method
from configs.studies import BenchConfig
from policies.benchmark import Row, sampled_rows
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import load_policy, make_schedule
from policies.samplers import sampler_named
from studies.evaluations import read_evaluation, require_same_episodes, run_name, schedule_name, successes
from studies.latency import reference_loop
from studies.rows import REFERENCE, markdown_table, require_package, started, timed

_Named = dict[str, tuple[SamplerTable, CacheSchedule]]


def run(config: BenchConfig, folder: Path) -> None:
    """Make each evaluation's schedule again, time all under every executor in turn; write table and JSON."""
    if not config.evaluated:
        raise InvalidInput(
            sentence("evaluated", expected="results of scripts/eval.py", got="none", mend="give their folders")
        )
    require_package(REFERENCE, "diffusers", "diffusers")
    evaluations = [read_evaluation(Path(each)) for each in config.evaluated]
    for each in evaluations:
        require_same_episodes(evaluations[0], each)
    policy = load_policy(config.checkpoint or config.task.name, device=config.device)
    named = {schedule_name(each["schedule"]): _schedule(policy, each["schedule"]) for each in evaluations}
    built, missing = started(_rows(config, policy, named), policy)
    latency = timed(config, policy, built, policy.observe(policy.spec.blank_observation()), config.task.name)
    rows = [_row(policy, each, evaluations[0], latency, named) for each in evaluations]
    results = {
        "task": config.task.name,
        "episodes": evaluations[0]["episodes"],
        "seed": evaluations[0]["seed"],
        "reference": latency[REFERENCE].to_json(),
        "rows": rows,
        "unavailable": missing,
        "provenance": run_provenance(torch.device(config.device), asdict(config)),
    }
    text = table(rows, config.executors)
    write_whole(folder / "table.md", lambda path: path.write_text(text))
    write_results(folder / "results.json", results)
    print(f"{text}\nreference {latency[REFERENCE].p50_ms:.0f} ms; results in {folder}")


def table(rows: Sequence[Mapping[str, Any]], executors: Sequence[str]) -> str:
    """Return the Markdown table of results' ``rows``, with a column of milliseconds for each executor.

    The difference of success rates has a column where the score is not the success.
    """
    apart = any(row["score"] != row["success"] for row in rows)
    columns = ("run", "GFLOPs", "score", "difference, paired", "success", *("difference, paired",) * apart)
    timed_by = tuple(f"{each} ms" for each in executors)
    return markdown_table(
        (*columns, *timed_by, "Hz at p99", "against reference"), [_cells(row, executors, apart=apart) for row in rows]
    )


def _schedule(policy: DiffusionPolicy, told: Mapping[str, Any]) -> tuple[SamplerTable, CacheSchedule]:
    """Return sampler and schedule of an evaluation, made again from the policy's profile.

    Raises:
        Mismatch: it comes out as another: the evaluation had other settings, or the policy was calibrated since.
    """
    sampler = sampler_named(policy.spec.process, told["sampler"])
    sampled = DiffusionPolicy(policy.checkpoint, sampler, artefacts=policy.artefacts)
    method = default_method(told["method"])
    if "updates" in told["parameters"]:
        method = method.with_budget(told["parameters"]["updates"])
    schedule = make_schedule(method, sampled)
    if schedule.digest != told["digest"]:
        raise Mismatch(
            sentence(
                f"schedule {schedule_name(dict(told))}",
                expected=f"digest {told['digest'][:12]} as it was evaluated",
                got=f"{schedule.digest[:12]} from {dict(schedule.parameters)}",
                mend="evaluate it again with the defaults of cache=",
            )
        )
    return sampler, schedule


def _rows(config: BenchConfig, policy: DiffusionPolicy, named: _Named) -> Iterator[Row]:
    steps = policy.spec.process.train_steps
    yield Row(REFERENCE, partial(reference_loop, steps=steps), steps, None)
    for kind, weights in config.chosen_executors():
        yield from sampled_rows(policy, named, kind, weights)


def _row(
    policy: DiffusionPolicy,
    run: Mapping[str, Any],
    reference: Mapping[str, Any],
    latency: Mapping[str, Latency],
    named: _Named,
) -> dict[str, Any]:
    name = schedule_name(run["schedule"])
    succeeded = successes(run)
    compared = succeeded if run is reference else successes(reference)
    chosen = select_for(named[name][1], policy.trunk, ExecutorKind.AUTO).kind
    taken = {row.removesuffix(f", {name}"): each for row, each in latency.items() if row.endswith(f", {name}")}
    auto = taken.get(chosen)
    return {
        "run": run_name(run),
        "gflops": run["gflops"]["cached"],
        # Not the run's own: of 0 and 1 alone, it may be from before such scores had Wilson's interval.
        "score": asdict(mean_estimate(run["scores"])),
        "score_difference": asdict(paired_difference(run["scores"], reference["scores"])),
        "success": run["success"],
        "success_difference": asdict(paired_difference(succeeded, compared)),
        "latency_ms": {executor: each.to_json() for executor, each in taken.items()},
        "auto": chosen,
        "control_rate_hz": None if auto is None else 1e3 / auto.p99_ms,
        "speedup": None if auto is None else latency[REFERENCE].p50_ms / auto.p50_ms,
        "evaluation": {key: run["provenance"][key] for key in ("commit", "command")},
    }


def _cells(row: Mapping[str, Any], executors: Sequence[str], *, apart: bool) -> tuple[str, ...]:
    times = row["latency_ms"]
    return (
        row["run"],
        f"{row['gflops']:.2f}",
        str(Estimate(**row["score"])),
        Estimate(**row["score_difference"]).signed,
        str(Estimate(**row["success"])),
        *((Estimate(**row["success_difference"]).signed,) if apart else ()),
        *(f"{times[each]['p50']:.0f}" if each in times else "-" for each in executors),
        *(
            "-" if row[key] is None else f"{row[key]:.1f}{unit}"
            for key, unit in (("control_rate_hz", ""), ("speedup", "x"))
        ),
    )
