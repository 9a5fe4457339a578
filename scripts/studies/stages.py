"""What surrounds the denoising loop: the stages of ``predict``, and the start of a compiled executor."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

import bac
from bac.errors import Unavailable
from bac.executors import ExecutorKind, WeightType
from bac.methods import full_schedule
from bac.timing import device_synchroniser, measure_stages
from configs.studies import BenchConfig
from envs.processes import spawned
from policies.benchmark import FULL, PolicySource, Row, executor_rows, start
from policies.loading import load_policy
from studies.rows import markdown_table

_LATER = 3
"""Later starts that are timed."""


def time_stages(config: BenchConfig) -> dict[str, Any]:
    """Time the stages of ``predict`` with one of the task's shipped schedules, batch 1."""
    policy = bac.accelerate(
        load_policy(config.checkpoint or config.task.name, device=config.device), config.stages_schedule
    )
    stages: dict[str, Callable[[Any], Any]] = {
        "observation encoding": policy.observe,
        "noise": lambda observed: (observed, policy.draw_noise(len(observed))),
        "denoising": lambda inputs: policy.denoiser(*inputs),
        "post-processing": policy.executed,
    }
    timed = measure_stages(
        stages,
        policy.spec.blank_observation(),
        calls=config.calls,
        synchronise=device_synchroniser(torch.device(config.device)),
    )
    return {"schedule": config.stages_schedule, "latency_ms": {name: each.to_json() for name, each in timed.items()}}


def stages_markdown(stages: dict[str, Any]) -> str:
    """Return the table of ``time_stages``."""
    rows = [(name, f"{ms['p50']:.3f}", f"{ms['p99']:.3f}") for name, ms in stages["latency_ms"].items()]
    title = f"**predict, batch 1, schedule {stages['schedule']}, executor auto**"
    return f"{title}\n\n{markdown_table(('stage', 'p50 ms', 'p99 ms'), rows)}"


def time_starts(config: BenchConfig) -> dict[str, dict[str, Any]]:
    """Return per compiled executor the seconds of its start: with nothing compiled yet, and the median of later ones.

    Each start is in a process of its own. Of an executor that this machine does not have, return why not, under
    ``unavailable``.
    """
    source = partial(load_policy, config.checkpoint or config.task.name, device=config.device)
    policy = source()
    full = {FULL: full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)}
    result: dict[str, dict[str, Any]] = {}
    for weights in WeightType:
        (row,) = executor_rows(policy, full, ExecutorKind.COMPILED, weights)
        try:
            with tempfile.TemporaryDirectory() as cache:
                start_once = partial(_seconds_to_start, row, source, cache)
                first, *later = (_in_new_process(start_once) for _ in range(1 + _LATER))
        except Unavailable as reason:
            result[f"compiled {weights}"] = {"unavailable": str(reason)}
            continue
        second = median(later)
        result[f"compiled {weights}"] = {"first_s": first, "second_s": second, "ratio": first / second}
    return result


def starts_markdown(starts: dict[str, dict[str, Any]]) -> str:
    """Return the table of ``time_starts``."""
    here = {name: each for name, each in starts.items() if "unavailable" not in each}
    rows = [(name, f"{s['first_s']:.2f}", f"{s['second_s']:.2f}", f"{s['ratio']:.0f}x") for name, s in here.items()]
    missing = "".join(f"\n- {name}: not here; {starts[name]['unavailable']}\n" for name in starts if name not in here)
    table = markdown_table(("executor", "first s", "second s", "ratio"), rows) if rows else ""
    return f"**Start of a compiled executor**\n\n{table}{missing}"


def _in_new_process(work: Callable[[], float]) -> float:
    with spawned(1, work) as pool:
        return pool.submit(work).result()


def _seconds_to_start(row: Row, source: PolicySource, cache: str) -> float:
    os.environ["BAC_CACHE"] = cache
    return start(row, source()).start_s
