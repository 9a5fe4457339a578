"""Typed configuration: every script turns its YAML into one of these once, and builds objects from it.

The dataclasses are the schema (an unknown key or a wrong type is refused by Hydra with the full key); the YAML files of
this folder hold the values. ``???`` values must be given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bac.acceleration import select_for
from bac.choices import choice
from bac.errors import InvalidInput, sentence
from bac.executors import Selection, select
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule
from bac.trunk import ResidualTrunk
from configs.controls import ControlConfig, FamilyConfig
from policies.base import PolicySpec
from policies.diffusion_transformer import DiffusionTransformerConfig
from policies.samplers import DiffusionProcess, Spacing, ddim, ddpm, dpm_solver
from policies.training import TrainingConfig
from policies.vision import VisionConfig


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """A task: environment, observation, action chunk and how it is scored.

    Attributes:
        name: which environment and demonstrations.
        observation: key -> channels, in the order the policy concatenates them; 64 for an image, which is what its
            encoder makes of it.
        action_dim: channels of an action.
        action_steps: executed actions of a chunk of a policy that is trained; one that was trained keeps its own.
        max_steps: control steps of an episode.
        seed: first seed of the published evaluation.
        rate_hz: control rate of the environment.
        least_range: see ``policies.normalizer.LimitsNormalizer.fit``; images have units of their own.
        images: which keys of the observation are images -> [height, width], pixels; none in low-dim tasks.
        crop: [height, width] of the part of an image that the encoder sees; null in low-dim tasks.
    """

    name: str
    observation: dict[str, int]
    action_dim: int
    action_steps: int
    max_steps: int
    seed: int
    rate_hz: float
    least_range: float
    images: dict[str, list[int]] = field(default_factory=dict)
    crop: list[int] | None = None

    @property
    def world(self) -> str:
        """Name of the world the task is played in: a low-dim task and its image variant share it."""
        return self.name.removesuffix("_image")

    @property
    def vision(self) -> VisionConfig | None:
        """Cameras and crop; None for a low-dim task."""
        if not self.images and self.crop is None:
            return None
        sizes = [*self.images.values(), self.crop or []]
        if any(len(size) != 2 for size in sizes):
            raise InvalidInput(
                sentence(
                    "task.images and task.crop",
                    expected="[height, width] each",
                    got=f"{self.images} and {self.crop}",
                    mend="correct them",
                )
            )
        *images, crop = ((height, width) for height, width in sizes)
        return VisionConfig(dict(zip(self.images, images, strict=True)), crop)


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
        process = DiffusionProcess(self.train_steps)
        return PolicySpec(task.name, dict(task.observation), task.action_steps, network, process, task.vision)


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
    """What runs the plan; see ``bac.acceleration.select_for``."""

    kind: str
    weights: str

    def select(self, schedule: CacheSchedule, trunk: ResidualTrunk) -> Selection:
        """Find out what works for a schedule on a trunk."""
        return select_for(schedule, trunk, self.kind, self.weights)

    def select_plain(self, trunk: ResidualTrunk) -> Selection:
        """Find out what works for schedules of whole updates on a trunk."""
        return select(self.kind, trunk, self.weights)


@dataclass(kw_only=True, slots=True)
class CalibrationConfig:
    """What calibration measures.

    Attributes:
        observations: calibration observations, each from another place in the demonstrations.
        batch: observations in one policy call; memory grows with it.
        seed: of the choice of observations and of the noise.
        sensitivity_observations: how many of them also measure the sensitivity of steps; 0 for none.
        trial_observations: how many of them judge the trials of ``cache=search``.
        router_observations: how many of them train the router of ``cache=harmonica``.
        router_batch: observations in one rollout of the router.
        router_iterations: rollouts, with one step of the router's optimiser after each.
        router_penalty: weight of the gates' share of the FLOPs against the squared action error (normalised units).
    """

    observations: int
    batch: int
    seed: int
    sensitivity_observations: int
    trial_observations: int
    router_observations: int
    router_batch: int
    router_iterations: int
    router_penalty: float

    def __post_init__(self) -> None:
        fewest = {"observations": 1, "batch": 1, "sensitivity_observations": 0, "trial_observations": 1}
        fewest |= {"router_observations": 1, "router_batch": 1, "router_iterations": 0, "router_penalty": 0}
        for name, least in fewest.items():
            if not (given := getattr(self, name)) >= least:
                told = sentence(f"calibration, {name}", expected=f"at least {least}", got=given, mend="correct it")
                raise InvalidInput(told)


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """``scripts/eval.py``: play a task with a cached policy and say what it cost and what it scored.

    Attributes:
        checkpoint: path of a checkpoint, ours or an original ``.ckpt``; null takes the task's shipped policy.
        weights: of an original checkpoint, ``ema`` or ``raw``; null takes those that the original evaluates.
        demonstrations: a zarr store or robomimic file; null takes the committed one.
        filter_key: the mask of a robomimic file that names the episodes to read; null takes all.
        calibration: how a checkpoint given by its path is calibrated when it is first used with a method.
        control: whether the world waits for the policy.
        latency: of a chunk where it does not: ``measured`` here and now, milliseconds, or the ``results.json`` of an
            earlier such run, whose latencies are drawn again.
        rate_hz: of the control loop; null takes the task's, and no other is possible.
        episodes: episodes to play, seeds ``seed``, ``seed + 1``, ...
        seed: first seed; null takes the task's published one.
        compare: ``none`` also plays the uncached policy on the same seeds and noise.
        video: number of episodes recorded.
        parallel: episodes in one policy call.
        processes: that the environments run in; null for one per core, at most 8.
        latency_calls: timed batch-1 calls of each, cached and uncached in turn; fewer than 100 have no 99th percentile
            but nearly their slowest.
        error_observations: observations of the action error.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; null leaves torch's choice.
    """

    task: TaskConfig
    cache: Any
    sampler: Any
    executor: ExecutorConfig
    calibration: CalibrationConfig
    control: ControlConfig
    latency: Any
    rate_hz: float | None
    checkpoint: str | None
    weights: str | None
    demonstrations: str | None
    filter_key: str | None
    episodes: int
    seed: int | None
    compare: str | None
    video: int
    parallel: int
    processes: int | None
    latency_calls: int
    error_observations: int
    device: str
    threads: int | None


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """``scripts/export.py``: write a cached policy as one ONNX graph.

    Attributes:
        checkpoint: path of a checkpoint, ours or an original ``.ckpt``; null takes the task's shipped policy.
        weights: of an original checkpoint, ``ema`` or ``raw``; null takes those that the original evaluates.
        demonstrations: a zarr store or robomimic file; null takes the committed one.
        check_observations: observations on which the written graph is compared with the eager executor.
    """

    task: TaskConfig
    cache: Any
    sampler: Any
    checkpoint: str | None
    weights: str | None
    demonstrations: str | None
    check_observations: int


@dataclass(kw_only=True, slots=True)
class CalibrateConfig(CalibrationConfig):
    """``scripts/calibrate.py``: measure a feature profile and write the schedules made from it.

    Attributes:
        checkpoint: path of a checkpoint, ours or an original ``.ckpt``; null takes the task's shipped policy.
        weights: of an original checkpoint, ``ema`` or ``raw``; null takes those that the original evaluates.
        demonstrations: a zarr store or robomimic file; null takes the committed one.
        filter_key: the mask of a robomimic file that names the episodes to read; null takes all.
        reuse: take the profile that an earlier run left, refused if it is of another number of ``observations``, and
            measure only the sensitivity or, for ``cache=harmonica``, the gates if it lacks them; other statistics that
            it lacks stay lacking. False measures all anew.
        overwrite: replace schedules of the same name that were made with other parameters; false refuses.
        budgets: values of ``cache.updates`` (of ``cache.gflops`` for ``search``) to write schedules for, beside the
            configured one.
        bank: make the schedule bank from the profile that an earlier run left, and time it on this device, instead.
        family: what is in the bank.
        executor: what runs the bank.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; null leaves torch's choice.
    """

    task: TaskConfig
    cache: Any
    sampler: Any
    executor: ExecutorConfig
    checkpoint: str | None
    weights: str | None
    demonstrations: str | None
    filter_key: str | None
    reuse: bool
    overwrite: bool
    budgets: list[float]
    bank: bool
    family: FamilyConfig
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
    encoder_weight_decay: float
    betas: list[float]
    gradient_clip: float
    ema_power: float
    precision: str
    noise_draws: int
    scaled_condition: bool

    def build(self, seed: int) -> TrainingConfig:
        """Return the recipe."""
        betas: Any = tuple(self.betas)  # two, or refused
        values = {name: getattr(self, name) for name in OptimiserConfig.__slots__ if name not in {"cycles", "betas"}}
        return TrainingConfig(**values, cycles=tuple(self.cycles), betas=betas, seed=seed)


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
        demonstrations: a zarr store or robomimic file; null takes the committed one.
        filter_key: the mask of a robomimic file that names the episodes to read; null takes all.
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
    filter_key: str | None
    output: str
    save_every: int
    seed: int
    device: str
    threads: int | None


@dataclass(kw_only=True, slots=True)
class MakeDemosConfig:
    """``scripts/make_demos.py``: record a scripted expert into a robomimic file; see ``envs.demos.recording.Recorder``.

    Attributes:
        episodes: successes to keep.
        seed: first seed; those of training rollouts and of the published evaluation are others.
        noise_m: standard deviation of the noise on the expert's moves, m.
        disturbed: share of episodes that begin after a push.
        images: record the camera images too; those of an image task always are.
        processes: that record side by side.
        output: folder of the file.
    """

    task: TaskConfig
    episodes: int
    seed: int
    noise_m: float
    disturbed: float
    images: bool
    processes: int
    output: str


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
        reference: results folder, or its JSON, of the run the others are compared to, usually ``cache=none``.
        runs: the same of the others.
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
