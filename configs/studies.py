"""Typed configuration of ``scripts/bench.py``: what each study of ``scripts/studies`` varies and measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bac.choices import Choice, choice
from bac.executors import ExecutorKind, WeightType
from configs.schema import TaskConfig


class Study(Choice):
    """What ``scripts/bench.py`` measures; ``scripts/studies`` has a file of each."""

    LATENCY = "latency"
    GROWTH = "growth"
    TRIED = "tried"
    PARETO = "pareto"
    PEERS = "peers"
    REALTIME = "realtime"
    WALLCLOCK = "wallclock"
    EVALUATED = "evaluated"


@dataclass(kw_only=True, slots=True)
class GrowthConfig:
    """Axes of ``study=growth``, varied one at a time: updates S, denoising steps K, layers, channels d."""

    updates: list[int]
    steps: list[int]
    layers: list[int]
    widths: list[int]


@dataclass(kw_only=True, slots=True)
class ParetoConfig:
    """What ``study=pareto`` compares, beside the schedules that ``cache=search`` left.

    Attributes:
        methods: names of ``cache=``, each with the defaults of its YAML file.
        updates: budgets of each.
        budgets: of the methods that take others, by name: thresholds, or updates where few are possible or slow.
        free_last_step: methods that are also judged with the last step free.
        equal_gflops: each method's best row within so many GFLOPs is played.
        headline: labels of further rows to play, for instance ``bac-s10``; the rows that no other beats are played too.
        episodes: paired episodes of every played row; 0 plays none.
        evaluated: results of ``scripts/eval.py``; a schedule that one of them played on these episodes is not played
            again.
        parallel: episodes in one policy call.
        kept: file of what was judged and played so far; a killed study goes on from it.
    """

    methods: list[str]
    updates: list[int]
    budgets: dict[str, list[float]]
    free_last_step: list[str]
    equal_gflops: float
    headline: list[str]
    episodes: int
    evaluated: list[str]
    parallel: int
    kept: str


@dataclass(kw_only=True, slots=True)
class PeersConfig:
    """Caches of other packages that ``study=peers`` applies, a row for each value.

    Attributes:
        first_block: thresholds of diffusers' FirstBlockCache.
        taylorseer: intervals of diffusers' TaylorSeer, steps.
        magcache: thresholds of diffusers' MagCache.
        magcache_skipped: most steps that MagCache skips in a row; its own default of 3 computes 40 % at any threshold.
        dbcache: thresholds of cache-dit's DBCache, without and with its TaylorSeer.
        calibration_observations: observations that MagCache's ratios are measured on.
    """

    first_block: list[float]
    taylorseer: list[int]
    magcache: list[float]
    magcache_skipped: int
    dbcache: list[float]
    calibration_observations: int


@dataclass(kw_only=True, slots=True)
class RealtimeConfig:
    """Score against latency, ``study=realtime``.

    Attributes:
        rows: ``none``, ``none ddim-10``, or a name of ``cache=`` and its updates as in ``bac 10``.
        seams: ``replace``, ``blend``, ``inpaint``.
        latencies_ms: of a chunk, 0 among them; each row is also played at the latencies measured of it.
        episodes: of each point, the same seeds and noise everywhere.
        parallel: episodes in one policy call.
        calls: timed chunks of each row, at least 100; for ``inpaint`` around the actions that are committed.
        kept: file of what was timed and played so far; a killed study goes on from it.
    """

    rows: list[str]
    seams: list[str]
    latencies_ms: list[float]
    episodes: int
    parallel: int
    calls: int
    kept: str


@dataclass(kw_only=True, slots=True)
class WallclockConfig:
    """The loop in real time, ``study=wallclock``: alone, and beside processes that keep other cores busy.

    Attributes:
        schedule: a schedule that ships with the policy.
        episodes: of each run, one after the other.
        floor_s: seconds that a thread which only sleeps is timed for, for comparison, above 0.
        load_processes: busy processes of the second run.
        calls: timed chunks that the deadline is taken from, at least 100.
        hygiene: ask for frozen garbage collection, locked memory, a short switch interval and SCHED_FIFO; the report
            says what was granted.
    """

    schedule: str
    episodes: int
    floor_s: float
    load_processes: int
    calls: int
    hygiene: bool


@dataclass(kw_only=True, slots=True)
class BenchConfig:
    """``scripts/bench.py``: time rows in turn, in one process.

    Attributes:
        study: ``latency`` of a chunk, ms, under every executor, schedule and sampler (what it costs in score is
            ``realtime``); ``growth`` of that time with updates, steps, depth and width; ``tried``, what else could run
            a plan on a CPU; ``pareto``, error against cost of all methods; ``peers``, the caches of other packages;
            ``realtime``, score against latency (how long a chunk takes is ``latency``); ``wallclock``, the control loop
            in real time; ``evaluated``, schedules that ``scripts/eval.py`` played.
        checkpoint: path of a checkpoint; null takes the task's shipped policy.
        demonstrations: a zarr store or robomimic file that errors are judged on; null takes the committed one. What is
            only timed needs none.
        networks: ``checkpoint``, ``kitchen`` (the original Kitchen sizes with random weights), or both.
        batches: batch sizes, one table each.
        reference_ddim: DDIM step counts of the reference.
        updates: BAC budgets.
        ddim_updates: pairs of DDIM steps and the BAC budget on top of them.
        executors: executors of the rows, with a weight type after a space.
        growth: axes of ``study=growth``.
        pareto: methods and budgets of ``study=pareto``.
        sampler: of ``study=pareto``.
        peers: caches and thresholds of ``study=peers``.
        realtime: rows, seams and latencies of ``study=realtime``.
        wallclock: of ``study=wallclock``.
        evaluated: of ``study=evaluated``: results of ``scripts/eval.py`` on the same episodes, folders or JSON files,
            the one that the others are compared with first.
        memory: whether to measure the peak memory of every row, in processes of their own.
        only: time only rows whose name contains one of these, and the reference; null times all.
        stages_schedule: schedule under which ``predict`` is timed stage by stage.
        error_observations: observations of the action error.
        calls: timed calls of each row.
        warmup: untimed calls before them.
        table_s: seconds of one table's timed calls after which no further round of them begins (at least 3 are made).
        device: ``cpu`` or ``cuda``.
        threads: CPU threads of every row.
    """

    task: TaskConfig
    sampler: Any
    study: str
    checkpoint: str | None
    demonstrations: str | None
    networks: list[str]
    batches: list[int]
    reference_ddim: list[int]
    updates: list[int]
    ddim_updates: list[list[int]]
    executors: list[str]
    growth: GrowthConfig
    pareto: ParetoConfig
    peers: PeersConfig
    realtime: RealtimeConfig
    wallclock: WallclockConfig
    evaluated: list[str]
    memory: bool
    only: list[str] | None
    stages_schedule: str
    error_observations: int
    calls: int
    warmup: int
    table_s: float
    device: str
    threads: int

    def chosen_executors(self) -> Iterator[tuple[ExecutorKind, WeightType]]:
        """Yield ``executors`` as kinds and weight types."""
        for executor in self.executors:
            kind, _, weights = executor.partition(" ")
            yield choice("executors", kind, ExecutorKind), choice("executors", weights or "fp32", WeightType)
