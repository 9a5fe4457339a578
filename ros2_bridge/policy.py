"""The policy behind the node: loaded, checked, built and warmed in ``configure``. The only file that loads torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bac.control import Request, Seam
from bac.control.clock import NS_PER_MS
from bac.errors import Mismatch, MissingArtefact, sentence
from ros2_bridge.mapping import Shape
from ros2_bridge.settings import NodeSettings

if TYPE_CHECKING:
    from policies.diffusion_policy import DiffusionPolicy
    from policies.realtime import ChunkSource

Chunk = Callable[[Request, int, int | None], np.ndarray]
"""(request, which schedule, seed of the noise or None) -> float32[N, Da], task units; one call at a time."""


@dataclass(frozen=True)
class ReadyPolicy:
    """A policy that is built and warm.

    Attributes:
        task: its task.
        observation: key -> (channels,), or (height, width, 3) of an image.
        observation_steps: observations it looks back on, To.
        action_dim: channels of an action, Da.
        action_steps: executed actions of a chunk, Ta.
        caches: names of the schedules; ``chunk`` takes their index.
        methods: the caching method of each.
        chunk: computes a chunk.
        slowest_ms: the slowest warm call of the first schedule.
        device: what it runs on.
        executor: what runs its plans.
    """

    task: str
    observation: Mapping[str, Shape]
    observation_steps: int
    action_dim: int
    action_steps: int
    caches: tuple[str, ...]
    methods: tuple[str, ...]
    chunk: Chunk
    slowest_ms: float
    device: str
    executor: str

    def index(self, cache: str) -> int:
        """Return which of the schedules is called ``cache``, or is the first of that method.

        Raises:
            Mismatch: none that was built.
        """
        for names in (self.caches, self.methods):
            if cache in names:
                return names.index(cache)
        raise Mismatch(
            sentence(
                "cache", expected=f"one of {list(self.caches)}", got=cache, mend="name it in `caches` and configure"
            )
        )


Load = Callable[[NodeSettings], ReadyPolicy]


def load(settings: NodeSettings) -> ReadyPolicy:
    """Load, accelerate and warm what the parameters ask for.

    Raises:
        MissingArtefact: no such checkpoint, schedule or bank.
        CorruptArtefact: a file cannot be read.
        Mismatch: a policy of another task, a schedule of another checkpoint or sampler, or a bank timed elsewhere.
        InvalidInput: an unknown device, or a schedule whose chunks go on from the chunk before.
        Unavailable: this machine lacks the device or the executor, no schedule of the bank is within the budget, or
            executor or sampler cannot inpaint and the seam asks for it.
    """
    # Here, for importing the node must not load torch.
    import torch

    from bac.device import use_threads
    from policies.loading import load_policy
    from policies.realtime import ChunkSource

    given = settings.values
    use_threads(given["threads"] or None)
    policy = load_policy(given["checkpoint"] or given["task"], device=given["device"])
    if policy.spec.task != given["task"]:
        raise Mismatch(
            sentence("checkpoint", expected=f"a policy of {given['task']}", got=policy.spec.task, mend="correct `task`")
        )
    built = _from_bank(policy, settings) if given["budget_ms"] else _named(policy, settings)
    source = ChunkSource([each.policy for each in built.values()])
    spec, blank = policy.spec, policy.spec.blank_observation()
    observation: dict[str, Shape] = {key: blank[key].shape[1:] for key in spec.observation}

    def chunk(request: Request, schedule: int, seed: int | None) -> np.ndarray:
        return source.predictor(seed)(replace(request, level=schedule))

    about = run_device(policy.trunk.device)
    executor = f"{next(iter(built.values())).policy.denoiser.__class__.__name__}, {torch.get_num_threads()} thread(s)"
    slowest_ms = _warm(source, blank, len(built), given["warmup_calls"])
    loop = settings.loop(policy.action_steps, slowest_ms, len(built))
    if loop.seam is Seam.INPAINT:
        _warm_inpainting(source, blank, len(built), loop.deadline_ticks)
    return ReadyPolicy(
        spec.task,
        observation,
        source.observation_steps,
        spec.network.action_dim,
        policy.action_steps,
        tuple(built),
        tuple(each.method for each in built.values()),
        chunk,
        slowest_ms,
        about,
        executor,
    )


def run_device(device: object) -> str:
    """Return the name of the device a policy lies on, as results have it."""
    import torch

    from bac.results import run_provenance

    return str(run_provenance(torch.device(str(device)), {})["device"])


@dataclass(frozen=True)
class _Built:
    """A policy over one schedule, and the method that made the schedule."""

    policy: DiffusionPolicy
    method: str


def _named(policy: DiffusionPolicy, settings: NodeSettings) -> dict[str, _Built]:
    """Return schedule name -> policy for ``cache`` and ``caches``."""
    import bac
    from bac.methods import full_schedule
    from bac.schedule import CacheSchedule

    folder = policy.schedules
    kept = {} if folder is None else {file.stem: file for file in sorted(folder.glob("*.json"))}
    built = {}
    for name in dict.fromkeys(_resolve(each, kept) for each in [settings.values["cache"], *settings.values["caches"]]):
        if name == "none":
            schedule = full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)
        else:
            schedule = CacheSchedule.load(kept[name])
        built[name] = _Built(bac.accelerate(policy, schedule, settings.values["executor"]), schedule.method)
    return built


def _from_bank(policy: DiffusionPolicy, settings: NodeSettings) -> dict[str, _Built]:
    """Return the bank's entries within the budget: the most accurate, and two to switch to, each faster.

    Raises:
        Mismatch: what is kept under this device's name was measured on another, or under another version of torch.
    """
    from bac.control import ScheduleBank
    from bac.executors import select
    from policies.bank import BANK_FILE, accelerated, load_device_profile, load_member
    from policies.loading import bank_folder

    home: Path = bank_folder(policy)
    executor = select(settings.values["executor"], policy.trunk)
    device = load_device_profile(home, policy.trunk.device, executor)
    entries = ScheduleBank.load(home / BANK_FILE).on(device).ladder(settings.values["budget_ms"], levels=3)
    chosen = [load_member(policy, home, entry) for entry in entries]
    return {
        entry.name: _Built(accelerated(policy, member, executor.kind, executor.weights), member.schedule.method)
        for entry, member in zip(entries, chosen, strict=True)
    }


def _resolve(cache: str, kept: Mapping[str, Path]) -> str:
    """Return a schedule's name; a method's name means the one of its schedules that updates most, the most accurate."""
    from bac.schedule import CacheSchedule

    if cache == "none" or cache in kept:
        return cache
    schedules = {name: CacheSchedule.load(file) for name, file in kept.items()}
    updates = {name: each.share.sum() for name, each in schedules.items() if each.method == cache}
    if not updates:
        raise MissingArtefact(
            sentence(
                "cache",
                expected=f"none or one of {list(kept)}",
                got=cache,
                mend="calibrate, or give budget_ms for the bank",
            )
        )
    return max(updates, key=lambda name: updates[name])


def _warm(source: ChunkSource, blank: Mapping[str, np.ndarray], schedules: int, calls: int) -> float:
    """Call every schedule; return the slowest call of the first but its very first one, which may compile, in ms."""
    batch = {key: values[None] for key, values in blank.items()}
    taken_ms = []
    for schedule in range(schedules):
        for _ in range(calls + 1):
            began = time.monotonic_ns()
            source.chunks(batch, None, [None], schedule)
            taken_ms.append((time.monotonic_ns() - began) / NS_PER_MS)
    return max(taken_ms[1 : calls + 1])


def _warm_inpainting(source: ChunkSource, blank: Mapping[str, np.ndarray], schedules: int, deadline_ticks: int) -> None:
    """Call every schedule with every number of committed actions there can be: each may record a graph of its own.

    Raises:
        Unavailable: executor or sampler cannot inpaint.
    """
    batch = {key: values[None] for key, values in blank.items()}
    for schedule in range(schedules):
        (actions,) = source.chunks(batch, None, [None], schedule)
        for count in range(1, min(deadline_ticks, source.length) + 1):
            source.chunks(batch, None, [actions[:count]], schedule)
