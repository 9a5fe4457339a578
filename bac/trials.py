"""Trials: schedules judged by what they do to the action chunk, on calibration observations."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from bac.acceleration import build_executor
from bac.errors import Unavailable, sentence
from bac.executors import ChunkNoise, CompiledExecutor, Executor, ExecutorKind
from bac.methods.none import full_schedule
from bac.passes import optimise
from bac.plan import lower, schedule_cost
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule, Provenance
from bac.timing import device_synchroniser, measure_interleaved
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
        executor: what runs the trials. On a GPU ``cuda_graph`` is left to ``block_times``: a schedule is judged by a
            single call, which does not repay a capture, so eager makes it.
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
        captures = trunk.device.type == "cuda" and executor in {ExecutorKind.AUTO, ExecutorKind.CUDA_GRAPH}
        self._judging = ExecutorKind.EAGER if captures else executor
        uncached = full_schedule(trunk.blocks, sampler.steps, provenance)
        self._executor = build_executor(uncached, trunk, sampler, provenance, self._judging)
        self._expected = self._actions(self._executor, torch.arange(len(self)))

    def __len__(self) -> int:
        """Return the number of observations N."""
        return len(self._observed)

    def action_errors(self, schedule: CacheSchedule, rows: np.ndarray | None = None) -> np.ndarray:
        """Return float64[N]: per observation the mean absolute difference of the executed actions, normalised units.

        Args:
            schedule: what to judge.
            rows: bool[N], which of the observations; all if None.

        Raises:
            Unavailable: the schedule recalls features of the chunk before: the observations are of single chunks.
        """
        schedule.require(self.provenance, self.trunk.blocks, self.sampler.steps)
        if schedule.recall is not None:
            raise Unavailable(
                sentence(
                    "trials",
                    expected="a schedule of single chunks",
                    got=f"one of {schedule.method} that recalls the chunk before",
                    mend="judge it by episodes, with scripts/eval.py",
                )
            )
        chosen = torch.arange(len(self)) if rows is None else torch.from_numpy(np.flatnonzero(rows))
        actions = self._actions(self._bound(schedule, self._judging), chosen)
        return (actions - self._expected[chosen]).abs().mean(dim=(1, 2)).cpu().numpy()

    def block_times(self, calls: int = 15) -> tuple[np.ndarray, float]:
        """Measure this machine: milliseconds that an update of each block adds, float64[blocks], and of the rest.

        The rest is a call at batch 1 in which nothing updates. Blocks of one kind count alike: each kind is updated at
        every step in turn, the others at step 0 alone, and the medians are compared.
        """
        blocks = self.trunk.blocks
        masks = {"": np.zeros((len(blocks), self.sampler.steps), dtype=bool)}
        masks[""][:, 0] = True
        for kind in dict.fromkeys(block.kind for block in blocks):
            masks[kind] = masks[""] | np.array([[block.kind is kind] for block in blocks])
        taken = measure_interleaved(
            {
                kind: partial(self._actions, self._bound(self._schedule(mask), self._kind), torch.arange(1))
                for kind, mask in masks.items()
            },
            calls=calls,
            synchronise=device_synchroniser(self.trunk.device),
        )
        added = {kind: int(masks[kind].sum() - masks[""].sum()) for kind in masks if kind}
        each = {kind: (taken[kind].p50_ms - taken[""].p50_ms) / count for kind, count in added.items()}
        times = np.array([max(each[block.kind], 0.0) for block in blocks])
        return times, taken[""].p50_ms - float(times.sum())

    def flops(self, schedule: CacheSchedule) -> int:
        """Return what a call of the schedule computes, FLOPs at batch 1."""
        return schedule_cost(schedule, self.trunk.cost).planned

    def _schedule(self, mask: np.ndarray) -> CacheSchedule:
        return CacheSchedule(mask, self.trunk.blocks, self.provenance, "trial")

    def _bound(self, schedule: CacheSchedule, kind: ExecutorKind) -> Executor:
        if schedule.tokens is None and isinstance(self._executor, CompiledExecutor):
            return self._executor.with_plan(optimise(lower(schedule)))
        return build_executor(schedule, self.trunk, self.sampler, self.provenance, kind)

    def _actions(self, executor: Executor, rows: Tensor) -> Tensor:
        noise = ChunkNoise(self._noise.initial[rows], self._noise.steps[:, rows])
        return executor(self._observed[rows], noise)[:, self._executed].double()
