"""Typed configuration of control: whether the world waits, what a loop does if not, and what a bank holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from bac.choices import Choice, choice
from bac.control import ActionLimits, Fallback, LoopSettings, Seam, repeat, ticks_for
from bac.control.process import Hygiene
from bac.errors import InvalidInput, sentence
from envs.robomimic_tasks import TASKS, is_absolute

if TYPE_CHECKING:
    from configs.schema import TaskConfig


class ControlMode(Choice):
    """``none``: the world waits. ``realtime``: it goes on, on a virtual clock. ``wallclock``: it goes on, really."""

    NONE = "none"
    REALTIME = "realtime"
    WALLCLOCK = "wallclock"


@dataclass(kw_only=True, slots=True)
class HygieneConfig:
    """What ``control=wallclock`` asks of the system while it plays; see ``bac.control.process.Hygiene``.

    Attributes:
        cores: of the loop's thread, which steps the environment too; null leaves them.
        inference_cores: of the inference thread; null leaves it those of the loop.
        torch_threads: of torch's products; null leaves what ``threads`` says.
        freeze_gc: no garbage collection.
        lock_memory: keep all pages in memory.
        switch_interval_ms: how long one Python thread may keep the interpreter from another; null leaves Python's 5 ms.
        priority: SCHED_FIFO priority of the loop's thread, in [1, 99]; null leaves its scheduler.
    """

    cores: list[int] | None
    inference_cores: list[int] | None
    torch_threads: int | None
    freeze_gc: bool
    lock_memory: bool
    switch_interval_ms: float | None
    priority: int | None

    def of_loop(self) -> Hygiene:
        """Return what the process asks for, and the loop's thread for itself.

        Raises:
            InvalidInput: a value that is out of its range.
        """
        return Hygiene(
            cores=self.cores,
            torch_threads=self.torch_threads,
            freeze_gc=self.freeze_gc,
            lock_memory=self.lock_memory,
            switch_interval_ms=self.switch_interval_ms,
            priority=self.priority,
        )

    def of_inference(self) -> Hygiene:
        """Return what the inference thread asks for.

        Raises:
            InvalidInput: a value that is out of its range.
        """
        return Hygiene(cores=self.inference_cores, torch_threads=self.torch_threads)


@dataclass(kw_only=True, slots=True)
class ControlConfig:
    """See ``bac.control.LoopSettings``; of the guards only that of finite actions is on unless others are given.

    Attributes:
        mode: a ``ControlMode``.
        seam: how a new chunk takes over.
        fallback: what to do at a tick without an action.
        replan_ticks: null takes the actions that are executed of a chunk.
        deadline_ticks: null takes the ticks that the 99th percentile of the latencies needs.
        observation_age_ms: an older newest observation stops motion; null never does. A simulator's is of its tick.
        stall_ms: an inference that takes longer is given up; null never gives one up.
        restarts: of an inference that died or stalled.
        action_low, action_high: limits of each channel of an action, task units; a chunk that is outside is refused.
            Empty for none.
        hygiene: of the process, ``control=wallclock`` alone.
    """

    mode: str
    seam: str
    fallback: str
    replan_ticks: int | None
    deadline_ticks: int | None
    observation_age_ms: float | None
    stall_ms: float | None
    restarts: int
    action_low: list[float]
    action_high: list[float]
    hygiene: HygieneConfig

    @property
    def chosen(self) -> list[str]:
        """Names of the settings of a loop that are not what they are unless they are given."""
        usual: dict[str, object] = {each.name: None for each in fields(self) if each.name not in {"mode", "hygiene"}}
        usual |= {"seam": Seam.REPLACE, "fallback": Fallback.HOLD, "restarts": 0, "action_low": [], "action_high": []}
        return [name for name, value in usual.items() if getattr(self, name) != value]

    def settings(self, rate_hz: float, action_steps: int, p99_ms: float) -> LoopSettings:
        """Return the loop's settings where a chunk takes ``p99_ms``.

        Only the robot moves things in a simulator: while it rests, no observation becomes too old.
        """
        return LoopSettings(
            rate_hz=rate_hz,
            replan_ticks=action_steps if self.replan_ticks is None else self.replan_ticks,
            deadline_ticks=ticks_for(p99_ms, rate_hz) if self.deadline_ticks is None else self.deadline_ticks,
            seam=choice("control.seam", self.seam, Seam),
            fallback=choice("control.fallback", self.fallback, Fallback),
            observation_age_ms=self.observation_age_ms,
            rest_age_ms=math.inf,
            stall_ms=self.stall_ms,
            restarts=self.restarts,
        )

    def limits(self, action_dim: int) -> ActionLimits | None:
        """Return the limits of actions, or None for none.

        Raises:
            InvalidInput: they are not ``action_dim`` low ones and as many higher ones.
        """
        if not self.action_low and not self.action_high:
            return None
        if not len(self.action_low) == len(self.action_high) == action_dim:
            raise InvalidInput(
                sentence(
                    "control.action_low and control.action_high",
                    expected=f"{action_dim} channels each, as the task's actions have",
                    got=f"{self.action_low} and {self.action_high}",
                    mend="give a limit of each channel",
                )
            )
        return ActionLimits(np.array(self.action_low), np.array(self.action_high))


@dataclass(kw_only=True, slots=True)
class FamilyConfig:
    """What is in a schedule bank, beside the uncached policy.

    Attributes:
        methods: names of ``cache=``, each with the defaults of its YAML file.
        updates: budgets of each.
        ddim: step counts of uncached DDIM samplers.
        calls: timed batch-1 calls of each; by fewer than 100 no bank selects.
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
