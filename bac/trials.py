"""Trials: schedules judged by what they do to the action chunk, on calibration observations."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from bac.accelerate import build_executor
from bac.executors import ChunkNoise, CompiledExecutor, Executor, ExecutorKind
from bac.methods.none import full_schedule
from bac.passes import optimise
from bac.plan import lower, schedule_cost
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule, Provenance
from bac.trunk import ResidualTrunk


class Trials:
    """Runs schedules on the same observations and noise and compares the executed actions with the uncached ones.

    Args:
        trunk: the denoiser.
        sampler: its sampler.
        provenance: names both.
        observed: normalised observations float32[N, To, Do].
        noise: of the N calls.
        executed: the actions of a chunk that count.
        executor: what runs the trials.
    """

    def __init__(
        self,
        trunk: ResidualTrunk,
        sampler: SamplerTable,
        provenance: Provenance,
        observed: Tensor,
        noise: ChunkNoise,
        executed: slice,
        executor: ExecutorKind = ExecutorKind.AUTO,
    ) -> None:
        self.provenance = provenance
        self.trunk = trunk
        self.sampler = sampler
        self._observed = observed
        self._noise = noise
        self._executed = executed
        self._kind = executor
        uncached = full_schedule(trunk.blocks, sampler.steps, provenance)
        self._executor = build_executor(uncached, trunk, sampler, provenance, executor)
        self._expected = self._actions(self._executor)

    def action_errors(self, schedule: CacheSchedule) -> np.ndarray:
        """Return float64[N]: per observation the mean absolute difference of the executed actions, normalised units."""
        schedule.require(self.provenance, self.trunk.blocks, self.sampler.steps)
        actions = self._actions(self._bound(schedule))
        return (actions - self._expected).abs().mean(dim=(1, 2)).cpu().numpy()

    def flops(self, schedule: CacheSchedule) -> int:
        """Return what a call of the schedule computes, FLOPs at batch 1."""
        return schedule_cost(schedule, self.trunk.cost).planned

    def _bound(self, schedule: CacheSchedule) -> Executor:
        if schedule.tokens is None and isinstance(self._executor, CompiledExecutor):
            return self._executor.with_plan(optimise(lower(schedule)))
        return build_executor(schedule, self.trunk, self.sampler, self.provenance, self._kind)

    def _actions(self, executor: Executor) -> Tensor:
        return executor(self._observed, self._noise)[:, self._executed].double()
