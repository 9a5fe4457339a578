"""Typed configuration: every script turns its YAML into one of these once, and builds objects from it.

The dataclasses are the schema (an unknown key or a wrong type is refused by Hydra with the full key); the YAML files of
this folder hold the values. ``???`` values must be given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hydra.core.config_store import ConfigStore

from bac.accelerate import select_for
from bac.choices import choice
from bac.executors import ExecutorKind, Selection, WeightType
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule
from bac.trunk import ResidualTrunk
from configs.methods import METHODS
from policies.base import PolicySpec
from policies.diffusion_transformer import DiffusionTransformerConfig
from policies.samplers import DiffusionProcess, Spacing, ddim, ddpm, dpm_solver
from policies.training import TrainingConfig


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """A task: environment, observation, action chunk and how it is scored.

    Attributes:
        name: which environment and demonstrations.
        observation: key -> channels, in the order the policy concatenates them.
        action_dim: channels of an action.
        action_steps: executed actions of a chunk.
        max_steps: control steps of an episode.
        seed: first seed of the published evaluation.
        rate_hz: control rate of the environment.
    """

    name: str
    observation: dict[str, int]
    action_dim: int
    action_steps: int
    max_steps: int
    seed: int
    rate_hz: float


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    """Sizes of the network and its diffusion process; see ``DiffusionTransformerConfig``."""

    horizon: int
    observation_steps: int
    layers: int
    heads: int
    width: int
    attention_dropout: float
    train_steps: int

    def build(self, task: TaskConfig) -> PolicySpec:
        """Return the specification of this policy on ``task``."""
        network = DiffusionTransformerConfig(
            action_dim=task.action_dim,
            observation_dim=sum(task.observation.values()),
            horizon=self.horizon,
            observation_steps=self.observation_steps,
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            attention_dropout=self.attention_dropout,
        )
        return PolicySpec(
            task.name, dict(task.observation), task.action_steps, network, DiffusionProcess(self.train_steps)
        )


@dataclass(kw_only=True, slots=True)
class DdpmConfig:
    """Ancestral sampling; ``steps`` null means all training steps."""

    steps: int | None

    def build(self, process: DiffusionProcess) -> SamplerTable:
        """Return the coefficient table."""
        return ddpm(process, self.steps)


@dataclass(kw_only=True, slots=True)
class DdimConfig:
    """Deterministic sampling in ``steps`` steps, spaced ``trailing`` or ``leading``."""

    steps: int
    spacing: str

    def build(self, process: DiffusionProcess) -> SamplerTable:
        """Return the coefficient table."""
        return ddim(process, self.steps, choice("sampler.spacing", self.spacing, Spacing))


@dataclass(kw_only=True, slots=True)
class DpmSolverConfig:
    """DPM-Solver++ of second order in ``steps`` steps, trailing spacing."""

    steps: int

    def build(self, process: DiffusionProcess) -> SamplerTable:
        """Return the coefficient table."""
        return dpm_solver(process, self.steps)


@dataclass(kw_only=True, slots=True)
class ExecutorConfig:
    """What runs the plan; see ``bac.accelerate.select_for``."""

    kind: str
    weights: str

    def select(self, schedule: CacheSchedule, trunk: ResidualTrunk) -> Selection:
        """Find out what works for a schedule on a trunk."""
        return select_for(schedule, trunk, self.kind, self.weights)


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """``scripts/eval.py``: play a task with a cached policy and say what it cost and what it scored.

    Attributes:
        checkpoint: path of a checkpoint; null takes the task's shipped policy.
        episodes: episodes to play, seeds ``seed``, ``seed + 1``, ...
        seed: first seed; null takes the task's published one.
        compare: ``none`` also plays the uncached policy on the same seeds and noise.
        video: number of episodes recorded.
        parallel: episodes in one policy call.
        latency_calls: timed batch-1 calls of each, cached and uncached in turn.
        error_observations: observations of the action error.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; null leaves torch's choice.
    """

    task: TaskConfig
    cache: Any
    sampler: Any
    executor: ExecutorConfig
    checkpoint: str | None
    episodes: int
    seed: int | None
    compare: str | None
    video: int
    parallel: int
    latency_calls: int
    error_observations: int
    device: str
    threads: int | None


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """``scripts/export.py``: write a cached policy as one ONNX graph.

    Attributes:
        checkpoint: path of a checkpoint; null takes the task's shipped policy.
        check_observations: observations on which the written graph is compared with the eager executor.
    """

    task: TaskConfig
    cache: Any
    sampler: Any
    checkpoint: str | None
    check_observations: int


@dataclass(kw_only=True, slots=True)
class CalibrateConfig:
    """``scripts/calibrate.py``: measure a feature profile and write the schedules made from it.

    Attributes:
        checkpoint: path of a checkpoint; null takes the task's shipped policy.
        reuse: take the profile that an earlier run left and measure only what it lacks; false measures all anew.
        observations: calibration observations, each from another place in the demonstrations.
        batch: observations in one policy call; memory grows with it.
        seed: of the choice of observations and of the noise.
        sensitivity_observations: how many of them also measure the sensitivity of steps; 0 for none.
        trial_observations: how many of them judge the trials of ``cache=search``.
        router_observations: how many of them train the router of ``cache=harmonica``.
        router_batch: observations in one rollout of the router.
        router_iterations: rollouts, with one step of the router's optimiser after each.
        router_penalty: weight of the gates' share of the FLOPs against the squared action error (normalised units).
        budgets: values of ``cache.updates`` (of ``cache.gflops`` for ``search``) to write schedules for, beside the
            configured one.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; null leaves torch's choice.
    """

    task: TaskConfig
    cache: Any
    sampler: Any
    checkpoint: str | None
    reuse: bool
    observations: int
    batch: int
    seed: int
    sensitivity_observations: int
    trial_observations: int
    router_observations: int
    router_batch: int
    router_iterations: int
    router_penalty: float
    budgets: list[float]
    device: str
    threads: int | None


@dataclass(kw_only=True, slots=True)
class OptimiserConfig:
    """See ``policies.training.TrainingConfig``."""

    cycles: list[int]
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    betas: list[float]
    gradient_clip: float
    ema_power: float
    precision: str

    def build(self, seed: int) -> TrainingConfig:
        """Return the recipe."""
        first, second = self.betas
        values = {name: getattr(self, name) for name in OptimiserConfig.__slots__ if name not in {"cycles", "betas"}}
        return TrainingConfig(**values, cycles=tuple(self.cycles), betas=(first, second), seed=seed)


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Episodes played with the EMA weights while training.

    Attributes:
        every: optimiser steps between rollouts; 0 for none.
        episodes: episodes of a rollout, from seed 200000 on, so that the published seeds stay unseen.
    """

    every: int
    episodes: int


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """``scripts/train.py``: train a policy on a task's demonstrations.

    Attributes:
        demonstrations: a zarr store; null takes the committed one.
        output: folder of training state, log, curve and checkpoint; a run found there is resumed.
        save_every: optimiser steps between saved states.
        seed: of everything random.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; null leaves torch's choice.
    """

    task: TaskConfig
    policy: PolicyConfig
    optimiser: OptimiserConfig
    rollout: RolloutConfig
    sampler: Any
    demonstrations: str | None
    output: str
    save_every: int
    seed: int
    device: str
    threads: int | None


@dataclass(kw_only=True, slots=True)
class ImportConfig:
    """``scripts/import_checkpoint.py``: convert a checkpoint of the original diffusion_policy.

    Attributes:
        source: the original ``.ckpt``.
        weights: ``ema`` or ``raw``; there is no default.
    """

    task: TaskConfig
    source: str
    weights: str


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """``scripts/compare.py``: put evaluations of the same episodes side by side.

    Attributes:
        reference: results folder of the run the others are compared to, usually ``cache=none``.
        runs: results folders of the others.
    """

    reference: str
    runs: list[str]


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """``scripts/report.py``: fill the tables of a document from committed results.

    Attributes:
        results: folder of the results.
        document: Markdown file with ``<!-- table: NAME -->`` and ``<!-- end -->`` around each table.
    """

    results: str
    document: str


class Study(StrEnum):
    """What ``scripts/bench.py`` measures; ``scripts/studies`` has a file of each."""

    LATENCY = "latency"
    GROWTH = "growth"
    TRIED = "tried"
    PARETO = "pareto"
    PEERS = "peers"


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
class BenchConfig:
    """``scripts/bench.py``: time rows in turn, in one process.

    Attributes:
        study: ``latency`` of a chunk under every executor, schedule and sampler; ``growth`` of that time with updates,
            steps, depth and width; ``tried``, what else could run a plan on a CPU; ``pareto``, error against cost of
            all methods; ``peers``, the caches of other packages.
        checkpoint: path of a checkpoint; null takes the task's shipped policy.
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
    networks: list[str]
    batches: list[int]
    reference_ddim: list[int]
    updates: list[int]
    ddim_updates: list[list[int]]
    executors: list[str]
    growth: GrowthConfig
    pareto: ParetoConfig
    peers: PeersConfig
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


def register() -> None:
    """Make the schemas known to Hydra under the names the YAML files extend."""
    store = ConfigStore.instance()
    scripts: dict[str, type] = {
        "eval": EvalConfig,
        "export": ExportConfig,
        "calibrate": CalibrateConfig,
        "train": TrainConfig,
        "import_checkpoint": ImportConfig,
        "compare": CompareConfig,
        "bench": BenchConfig,
        "report": ReportConfig,
    }
    for name, node in scripts.items():
        store.store(name=f"{name}_schema", node=node)
    groups: dict[str, dict[str, type]] = {
        "task": {"task": TaskConfig},
        "policy": {"policy": PolicyConfig},
        "sampler": {"ddpm": DdpmConfig, "ddim": DdimConfig, "dpm_solver": DpmSolverConfig},
        "executor": {"executor": ExecutorConfig},
        "cache": METHODS,
    }
    for group, nodes in groups.items():
        for name, node in nodes.items():
            store.store(group=group, name=f"{name}_schema", node=node)
