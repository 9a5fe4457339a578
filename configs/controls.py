"""Typed configuration of control: whether the world waits, what a loop does if not, and what a bank holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bac.choices import Choice, choice
from bac.control import Fallback, LoopSettings, Seam, repeat, ticks_for
from envs.robomimic_tasks import TASKS, is_absolute

if TYPE_CHECKING:
    from configs.schema import TaskConfig


class ControlMode(Choice):
    """``none``: the world waits. ``realtime``: it goes on, on a virtual clock. ``wallclock``: it goes on, really."""

    NONE = "none"
    REALTIME = "realtime"
    WALLCLOCK = "wallclock"


@dataclass(kw_only=True, slots=True)
class ControlConfig:
    """See ``bac.control.LoopSettings``.

    Attributes:
        mode: a ``ControlMode``.
        seam: how a new chunk takes over.
        fallback: what to do at a tick without an action.
        replan_ticks: null takes the actions that are executed of a chunk.
        deadline_ticks: null takes the ticks that the 99th percentile of the latencies needs.
        stall_ms: null never gives an inference up.
        restarts: of an inference that died or stalled.
    """

    mode: str
    seam: str
    fallback: str
    replan_ticks: int | None
    deadline_ticks: int | None
    stall_ms: float | None
    restarts: int

    def settings(self, rate_hz: float, action_steps: int, p99_ms: float) -> LoopSettings:
        """Return the loop's settings where a chunk takes ``p99_ms``."""
        return LoopSettings(
            rate_hz=rate_hz,
            replan_ticks=action_steps if self.replan_ticks is None else self.replan_ticks,
            deadline_ticks=ticks_for(p99_ms, rate_hz) if self.deadline_ticks is None else self.deadline_ticks,
            seam=choice("control.seam", self.seam, Seam),
            fallback=choice("control.fallback", self.fallback, Fallback),
            stall_ms=self.stall_ms,
            restarts=self.restarts,
        )


@dataclass(kw_only=True, slots=True)
class FamilyConfig:
    """What is in a schedule bank, beside the uncached policy.

    Attributes:
        methods: names of ``cache=``, each with the defaults of its YAML file.
        updates: budgets of each.
        ddim: step counts of uncached DDIM samplers.
        calls: timed batch-1 calls of each.
    """

    methods: list[str]
    updates: list[int]
    ddim: list[int]
    calls: int


def hold_of(task: TaskConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Return what keeps the task's robot where it is, from its last action.

    Absolute targets are repeated; of deltas, only the gripper's channel is.
    """
    if task.world not in TASKS or is_absolute(task.world, task.action_dim):
        return repeat
    gripper = np.arange(task.action_dim) % 7 == 6
    return lambda action: np.where(gripper, action, 0).astype(action.dtype)
