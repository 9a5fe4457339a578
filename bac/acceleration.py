"""The public verbs: ``accelerate`` a policy of ours, ``attach`` caching to a network of anybody's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from typing_extensions import Self

from bac.choices import choice
from bac.errors import MissingArtefact, Unavailable, sentence
from bac.executors import (
    CacheHooks,
    CrossChunkExecutor,
    Executor,
    ExecutorKind,
    Selection,
    SiteTable,
    WeightType,
    select,
)
from bac.passes import optimise
from bac.plan import lower, verify
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule, Provenance
from bac.token_reuse import TokenReuseTrunk
from bac.trunk import ResidualTrunk


class Acceleratable(Protocol):
    """What ``accelerate`` needs of a policy; ``policies.DiffusionPolicy`` has it."""

    @property
    def trunk(self) -> ResidualTrunk:
        """The denoiser as residual branches."""

    @property
    def sampler(self) -> SamplerTable:
        """The denoising steps."""

    @property
    def provenance(self) -> Provenance:
        """Names checkpoint and sampler."""

    @property
    def action_steps(self) -> int:
        """Actions of a chunk that are executed."""

    @property
    def schedules(self) -> Path | None:
        """Folder of named schedules."""

    def with_denoiser(self, denoiser: Executor) -> Self:
        """Return the same policy over another denoiser."""


PolicyT = TypeVar("PolicyT", bound=Acceleratable)


def accelerate(
    policy: PolicyT, schedule: CacheSchedule | Path | str, executor: Selection | str = ExecutorKind.AUTO
) -> PolicyT:
    """Return the policy with its denoiser replaced by a cached one; same observation in, same chunk shape out.

    Args:
        policy: the policy; it stays as it is.
        schedule: a schedule, a path to one, or the name of one that ships with the policy, for instance ``"bac-s10"``.
        executor: what runs the plan: a name of ``ExecutorKind``, or what ``bac.executors.select`` gave.

    Raises:
        MissingArtefact: no such schedule.
        Mismatch: made for another checkpoint, sampler, step count or block set.
        Unavailable: this machine does not have the executor.
    """
    found = schedule if isinstance(schedule, CacheSchedule) else CacheSchedule.load(_locate(policy, schedule))
    return policy.with_denoiser(
        build_executor(found, policy.trunk, policy.sampler, policy.provenance, executor, policy.action_steps)
    )


def build_executor(
    schedule: CacheSchedule,
    trunk: ResidualTrunk,
    sampler: SamplerTable,
    provenance: Provenance,
    executor: Selection | str = ExecutorKind.AUTO,
    action_steps: int | None = None,
) -> Executor:
    """Check a schedule against what is about to run, lower it, optimise the plan, verify it and bind it.

    Args:
        schedule: which block to compute at which step.
        trunk: the denoiser.
        sampler: its sampler.
        provenance: names both.
        executor: a name of ``ExecutorKind``, or what ``select_for`` or ``bac.executors.select`` gave.
        action_steps: actions that are executed of a chunk; only a schedule that recalls the chunk before needs it.

    Raises:
        InvalidInput: the schedule recalls, and ``action_steps`` is not given.
        Mismatch: made for another checkpoint, sampler, step count, block set or number of tokens.
        Unavailable: this machine, this trunk or this schedule does not have the executor.
    """
    schedule.require(provenance, trunk.blocks, sampler.steps)
    selection = executor if isinstance(executor, Selection) else select_for(schedule, trunk, executor)
    plan = optimise(lower(schedule.plain()))
    verify(plan, schedule)
    if schedule.recall is None:
        return selection.build(plan, _trunk_for(schedule, trunk), sampler)
    if selection.kind is not ExecutorKind.EAGER:
        raise _recalls(selection.kind)
    return CrossChunkExecutor(plan, trunk, sampler, schedule.recall, action_steps)


def select_for(
    schedule: CacheSchedule,
    trunk: ResidualTrunk,
    kind: ExecutorKind | str = ExecutorKind.AUTO,
    weights: WeightType | str = WeightType.FP32,
) -> Selection:
    """Find out what runs a schedule: ``bac.executors.select``, but where the schedule allows only the eager executor.

    Raises:
        InvalidInput: no such executor or weight type, or an executor that does not store weights in that way.
        Mismatch: the schedule's token maps are for another number of tokens.
        Unavailable: asked for by name, and this machine, this trunk or this schedule does not have it.
    """
    if schedule.recall is None:
        return select(kind, _trunk_for(schedule, trunk), weights)
    if choice("executor", kind, ExecutorKind) is ExecutorKind.AUTO:
        because = "only the eager executor follows a schedule that recalls features of the chunk before"
        return replace(select(ExecutorKind.EAGER, trunk, weights), because=because)
    if kind != ExecutorKind.EAGER:
        raise _recalls(kind)
    return select(kind, trunk, weights)


def _trunk_for(schedule: CacheSchedule, trunk: ResidualTrunk) -> ResidualTrunk:
    """Return what a schedule's plan runs on: the trunk, or one that follows the schedule's token maps."""
    return trunk if schedule.tokens is None else TokenReuseTrunk(trunk, schedule.tokens)


def _recalls(kind: ExecutorKind | str) -> Unavailable:
    return Unavailable(
        sentence(
            f"executor {kind}",
            expected="eager for a schedule that recalls features of the chunk before",
            got=kind,
            mend="use executor=eager",
        )
    )


def attach(
    sites: SiteTable, schedule: CacheSchedule, timesteps: np.ndarray, provenance: Provenance | None = None
) -> CacheHooks:
    """Patch a network's branches to follow a schedule; undo it with ``detach`` or use the result as a context manager.

    Args:
        sites: where the network computes its blocks.
        schedule: which block to compute at which step.
        timesteps: int64[K], the time steps at which the network will be called, noisiest first.
        provenance: names the network's checkpoint and its sampler, for instance ``policy.provenance``. A network of
            anybody's cannot say what it is: with None the schedule's blocks and its number of steps are compared alone.

    Raises:
        Mismatch: made for another step count or block set or, with ``provenance``, another checkpoint or sampler.
        Unavailable: the schedule has token maps or recalls.
        InvalidInput: hooks are attached to the network already.
    """
    if provenance is not None:
        schedule.require(provenance, tuple(sites.branches), len(timesteps))
    return CacheHooks(sites, schedule, timesteps).attach()


def detach(hooks: CacheHooks) -> None:
    """Give the network its own methods back."""
    hooks.detach()


def _locate(policy: Acceleratable, schedule: Path | str) -> Path:
    path = Path(schedule)
    if path.is_file():
        return path
    folder = policy.schedules
    named = [] if folder is None else sorted(file.stem for file in folder.glob("*.json"))
    if folder is None or str(schedule) not in named:
        raise MissingArtefact(
            sentence(
                "schedule",
                expected=f"a file or one of {named}",
                got=str(schedule),
                mend="run scripts/calibrate.py with this checkpoint and sampler",
            )
        )
    return folder / f"{schedule}.json"
