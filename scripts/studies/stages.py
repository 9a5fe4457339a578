"""What surrounds the denoising loop: the stages of ``predict``, and the start of a compiled executor."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch

import bac
from bac.executors import ExecutorKind, WeightType
from bac.methods import full_schedule
from bac.timing import device_synchroniser, measure_stages
from configs.studies import BenchConfig
from configs.tasks import HELD_OUT_SEED, demonstrations
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
    seen = demonstrations(config.task).spread_observations(1, policy.observation_steps, HELD_OUT_SEED)
    stages: dict[str, Callable[[Any], Any]] = {
        "observation encoding": policy.observe,
        "noise": lambda observed: (observed, policy.draw_noise(len(observed))),
        "denoising": lambda inputs: policy.denoiser(*inputs),
        "post-processing": policy.executed,
    }
    timed = measure_stages(
        stages, seen, calls=config.calls, synchronise=device_synchroniser(torch.device(config.device))
    )
    return {"schedule": config.stages_schedule, "latency_ms": {name: each.to_json() for name, each in timed.items()}}


def stages_markdown(stages: dict[str, Any]) -> str:
    """Return the table of ``time_stages``."""
    rows = [(name, f"{ms['p50']:.3f}", f"{ms['p99']:.3f}") for name, ms in stages["latency_ms"].items()]
    title = f"**predict, batch 1, schedule {stages['schedule']}, executor auto**"
    return f"{title}\n\n{markdown_table(('stage', 'p50 ms', 'p99 ms'), rows)}"


def time_starts(config: BenchConfig) -> dict[str, dict[str, float]]:
    """Return per compiled executor the seconds of its start: with nothing compiled yet, and the median of later ones.

    Each start is in a process of its own.
    """
    source = partial(load_policy, config.checkpoint or config.task.name, device=config.device)
    policy = source()
    full = {FULL: full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)}
    result = {}
    for weights in WeightType:
        (row,) = executor_rows(policy, full, ExecutorKind.COMPILED, weights)
        with tempfile.TemporaryDirectory() as cache:
            first, *later = (_in_new_process(partial(_seconds_to_start, row, source, cache)) for _ in range(1 + _LATER))
        second = median(later)
        result[f"compiled {weights}"] = {"first_s": first, "second_s": second, "ratio": first / second}
    return result


def starts_markdown(starts: dict[str, dict[str, float]]) -> str:
    """Return the table of ``time_starts``."""
    rows = [(name, f"{s['first_s']:.2f}", f"{s['second_s']:.2f}", f"{s['ratio']:.0f}x") for name, s in starts.items()]
    return f"**Start of a compiled executor**\n\n{markdown_table(('executor', 'first s', 'second s', 'ratio'), rows)}"


def _in_new_process(work: Callable[[], float]) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work).result()


def _seconds_to_start(row: Row, source: PolicySource, cache: str) -> float:
    os.environ["BAC_CACHE"] = cache
    return start(row, source()).start_s
