"""``control=`` composes, becomes loop settings, and knows what holds a task's robot where it is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bac.control import Fallback, LoopSettings, Seam
from bac.control.process import Hygiene
from bac.errors import InvalidInput
from configs import schema
from configs.controls import ControlMode, hold_of
from configs.tasks import loop_rate
from tests.composing import FOLDER, composed


def config(*overrides: str) -> schema.EvalConfig:
    return composed("eval", *overrides)


@pytest.mark.parametrize("mode", ControlMode)
def test_every_mode_composes(mode: ControlMode) -> None:
    assert config(f"control={mode}").control.mode == mode
    assert {path.stem for path in (FOLDER / "control").glob("*.yaml")} == set(ControlMode)


def test_settings_follow_task_policy_and_latency() -> None:
    made = config("control=realtime").control.settings(10.0, 8, 451.0)
    # Nothing but the robot moves in a simulator: no observation of a robot at rest is too old.
    assert made == LoopSettings(rate_hz=10.0, replan_ticks=8, deadline_ticks=5, rest_age_ms=math.inf)
    overrides = ["seam=inpaint", "fallback=stop", "replan_ticks=4", "deadline_ticks=2", "stall_ms=900", "restarts=3"]
    overrides.append("observation_age_ms=250")
    made = config("control=realtime", *(f"control.{each}" for each in overrides)).control.settings(20.0, 8, 10.0)
    assert made == LoopSettings(
        20.0,
        4,
        2,
        Seam.INPAINT,
        fallback=Fallback.STOP,
        observation_age_ms=250.0,
        rest_age_ms=math.inf,
        stall_ms=900.0,
        restarts=3,
    )


def test_limits_are_of_every_channel_or_of_none() -> None:
    assert config("control=realtime").control.limits(2) is None
    made = config("control=realtime", "control.action_low=[0,-1]", "control.action_high=[512,1]").control.limits(2)
    assert (made.low.tolist(), made.high.tolist()) == ([0, -1], [512, 1])
    for low, high in [([0.0], [512.0]), ([0.0, 0.0], []), ([], [512.0, 512.0]), ([0.0] * 3, [512.0] * 3)]:
        given = config(f"control.action_low={low}", f"control.action_high={high}").control
        with pytest.raises(InvalidInput, match=r"^control\.action_low and control\.action_high: expected 2 channels"):
            given.limits(2)
    swapped = config("control.action_low=[1,0]", "control.action_high=[0,1]").control
    with pytest.raises(InvalidInput, match=r"^action limits: expected low and high as two vectors"):
        swapped.limits(2)


def test_hygiene_is_of_the_loop_and_of_inference() -> None:
    given = ["cores=[0]", "inference_cores=[1]", "torch_threads=2", "freeze_gc=true", "lock_memory=true"]
    given += ["switch_interval_ms=0.5", "priority=50"]
    made = config("control=wallclock", *(f"control.hygiene.{each}" for each in given)).control.hygiene
    assert made.of_loop() == Hygiene([0], 2, True, True, 0.5, 50)
    assert made.of_inference() == Hygiene([1], 2)
    with pytest.raises(InvalidInput, match=r"^process hygiene: expected cores, "):
        config("control=wallclock", "control.hygiene.inference_cores=[]").control.hygiene.of_inference()


def test_the_rate_is_the_tasks() -> None:
    task = config().task
    assert loop_rate(task, None) == loop_rate(task, 10.0) == 10.0
    with pytest.raises(InvalidInput, match=r"^rate_hz: expected 10, the rate of push_t, got 20\.0; leave it out\.$"):
        loop_rate(task, 20.0)


@pytest.mark.parametrize(("task", "rate_hz"), [("push_t", 10), ("can", 20), ("can_image", 20)])
def test_the_rate_is_the_environments_whatever_the_task_says(task: str, rate_hz: int) -> None:
    assert loop_rate(config(f"task={task}").task, None) == rate_hz
    told = rf"^task\.rate_hz: expected {rate_hz}, the rate of {task}, got 50\.0; leave it out\.$"
    with pytest.raises(InvalidInput, match=told):
        loop_rate(config(f"task={task}", "task.rate_hz=50").task, None)


def test_absolute_targets_are_repeated_and_deltas_end_but_for_the_gripper() -> None:
    action = np.arange(1, 15, dtype=np.float32)
    assert hold_of(config().task)(action[:2]).tolist() == [1, 2]
    assert hold_of(config("task=can").task)(action[:10]).tolist() == list(range(1, 11))
    held = hold_of(config("task=can", "task.action_dim=7").task)(action[:7])
    assert (held.tolist(), held.dtype) == ([0, 0, 0, 0, 0, 0, 7], np.float32)
    held = hold_of(config("task=can_image", "task.action_dim=7").task)(action[:7])
    assert held.tolist() == [0, 0, 0, 0, 0, 0, 7]
    assert hold_of(config("task=can_image").task)(action[:10]).tolist() == list(range(1, 11))
    two_arms = hold_of(config("task=transport", "task.action_dim=14").task)(action)
    assert np.flatnonzero(two_arms).tolist() == [6, 13]
