"""The control loop in real time: how late its ticks are, with and without another process on the other cores.

Beside each run stands a thread that only sleeps from tick to tick: what the machine itself makes late, a virtual one
most of all, no loop can make up for.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bac
from bac.control import LatencyBudget, LoopSettings, MonotonicClock, TickGrid, ticks_for
from bac.control.clock import NS_PER_MS
from bac.control.latency_budget import FEWEST_CALLS
from bac.control.process import Hygiene
from bac.errors import InvalidInput, Unavailable, sentence
from bac.executors import ExecutorKind
from bac.results import run_provenance, write_results
from configs.controls import hold_of
from configs.studies import BenchConfig
from configs.tasks import environment, loop_rate, require_environment, require_task
from policies.loading import load_policy, locate_checkpoint
from policies.realtime import ChunkSource
from studies.episodes import scores
from studies.realtime_episodes import World, play_wallclock
from studies.realtime_play import measured_in_turn, p99, summary
from studies.rows import markdown_table

_STARTING_S = 60.0
_HYGIENE = Hygiene(freeze_gc=True, lock_memory=True, switch_interval_ms=0.5, priority=50)
_COLUMNS = (
    "load",
    "ticks",
    "skipped",
    "jitter p50 ms",
    "p99 ms",
    "max ms",
    "only sleeping: p50 ms",
    "p99 ms",
    "max ms",
    "deadline misses",
    "held",
    "latency mean ms",
)


def run(config: BenchConfig, folder: Path) -> None:
    """Play in real time, alone and beside a busy process; write table and JSON into ``folder``."""
    study, rate_hz = config.wallclock, loop_rate(config.task, None)
    _require(config, rate_hz)
    policy = load_policy(locate_checkpoint(config.checkpoint or config.task.name), device=config.device)
    require_task(config.task, policy.spec)
    fast = bac.accelerate(policy, study.schedule, ExecutorKind.AUTO)
    (trace,) = measured_in_turn([(fast, 0)], study.calls)
    settings = LoopSettings(rate_hz, fast.action_steps, ticks_for(p99(trace), rate_hz))
    world = World(environment(config.task), ChunkSource([fast]), settings, config.task.max_steps, hold_of(config.task))
    seeds = range(config.task.seed, config.task.seed + study.episodes)
    # The scheduler's priority is of the thread that asks: the loop's, and inference stays below it.
    hygiene = _HYGIENE.apply() if study.hygiene else {}
    runs = {}
    for load in (0, study.load_processes):
        clock = _NotingClock()
        with _busy(load):
            floor = _only_sleeping(rate_hz, round(study.floor_s * rate_hz))
            played = play_wallclock(world, seeds, clock=clock)
        told = {**scores([each.episode for each in played]), **summary(played)}
        runs[load] = told | {"jitter_ms": _spread(clock.late_ms), "only_sleeping_ms": _spread(floor)}
    results = {
        "runs": {str(load): told for load, told in runs.items()},
        "alone": LatencyBudget(1e9).judge(trace).to_json(),
        "hygiene": hygiene,
        "provenance": run_provenance(torch.device(config.device), asdict(config)),
    }
    text = markdown_table(_COLUMNS, [_cells(load, told) for load, told in runs.items()])
    write_results(folder / "results.json", results)
    print(f"{study.schedule} at {rate_hz:g} Hz, {settings.deadline_ticks} tick(s) to the deadline; hygiene: {hygiene}")
    print(f"{text}\nresults in {folder}")


def _require(config: BenchConfig, rate_hz: float) -> None:
    """Refuse what would be missed only after something was timed or played."""
    study = config.wallclock
    fewest = {"episodes": 1, "floor_s": 1 / rate_hz, "load_processes": 1, "calls": FEWEST_CALLS}
    for name, least in fewest.items():
        if not (given := getattr(study, name)) >= least:
            raise InvalidInput(
                sentence(f"wallclock.{name}", expected=f"at least {least:g}", got=given, mend="correct the override")
            )
    require_environment(config.task, draws=False)


class _NotingClock(MonotonicClock):
    """Notes how late each sleep ended, milliseconds."""

    def __init__(self) -> None:
        self.late_ms: list[float] = []

    def sleep_until_ns(self, when_ns: int) -> None:
        """Sleep and note."""
        super().sleep_until_ns(when_ns)
        self.late_ms.append((self.now_ns() - when_ns) / NS_PER_MS)


def _only_sleeping(rate_hz: float, ticks: int) -> list[float]:
    """Return how late each of so many ticks began with nothing else to do, milliseconds."""
    clock = _NotingClock()
    grid = TickGrid(clock.now_ns(), rate_hz)
    for tick in range(1, ticks + 1):
        clock.sleep_until_ns(grid.at_ns(tick))
    return clock.late_ms


def _spread(late_ms: Sequence[float]) -> dict[str, float]:
    p50, p99, largest = np.percentile(late_ms, [50, 99, 100])
    return {"count": len(late_ms), "p50": float(p50), "p99": float(p99), "max": float(largest)}


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    """Keep so many other processes computing."""
    context = multiprocessing.get_context("spawn")
    burning = [context.Event() for _ in range(processes)]
    running = [context.Process(target=_burn, args=(each,), daemon=True) for each in burning]
    for each in running:
        each.start()
    try:
        if not all(each.wait(_STARTING_S) for each in burning):
            raise _idle(processes, "fewer")
        yield
        if not all(each.is_alive() for each in running):
            raise _idle(processes, "one that ended")
    finally:
        for each in running:
            each.terminate()
            each.join()


def _idle(processes: int, got: str) -> Unavailable:
    expected = f"{processes} that compute to the end"
    return Unavailable(sentence("busy processes", expected=expected, got=got, mend="look at their errors"))


def _burn(burning: Event) -> None:
    burning.set()
    # No product of matrices, whose library would take the other cores as well.
    while True:
        pass


def _cells(load: int, told: dict[str, Any]) -> tuple[str, ...]:
    counters = told["counters"]
    return (
        f"{load} process(es)",
        str(counters["ticks"]),
        str(counters["skipped"]),
        *(f"{told[name][key]:.2f}" for name in ("jitter_ms", "only_sleeping_ms") for key in ("p50", "p99", "max")),
        f"{counters['deadline_misses']} of {counters['requests']}",
        str(counters["held"]),
        f"{told['latency_ms'].get('mean', 0):.1f}",
    )
