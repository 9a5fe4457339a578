"""Predictions by groups of channels: the schedule, its file, the plan's text, and what reaches the chunk."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import (
    BLOCKS,
    alike,
    random_inputs,
    random_schedule,
    sampler_step,
    schedule_of,
    small_network,
    with_groups,
)

from bac.errors import CorruptArtefact, InvalidInput
from bac.executors import EagerExecutor
from bac.passes import EXACT, fold_reused_runs, optimise
from bac.plan import Combine, CombineGroups, Fold, Plan, lower, simulate, verify
from bac.schedule import CacheSchedule
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, ddim

STEPS, WIDTH = 12, 16
SAMPLER = ddim(DiffusionProcess(train_steps=STEPS), STEPS)


def hand_made() -> CacheSchedule:
    """Return two blocks of three channels: group 0 holds, group 1 goes on in a line."""
    held, line = np.zeros((2, 4, 2)), np.zeros((2, 4, 2))
    held[:, :, 0] = 1
    line[:, 1] = [1, 0]
    line[:, 2:] = [[2, -1], [3, -2]]
    return replace(
        schedule_of("##..", "#.#."),
        forecast=np.stack((held, line), axis=-1),
        groups=np.array([[0, 1, 1], [1, 0, 0]]),
    )


TEXT = """
L0.sa=011
L0.ca=100
000: L0.sa>0 L0.ca>1
001: L0.sa>2 +1
002: +2*1.0|2.0+0*0.0|-1.0@L0.sa L0.ca>3
003: +2*1.0|3.0+0*0.0|-2.0@L0.sa +3*1.0|3.0+1*0.0|-2.0@L0.ca
""".strip()


def test_lowers_to_a_text_that_parses_back() -> None:
    plan = lower(hand_made())
    assert str(plan) == TEXT
    assert Plan.parse(TEXT, BLOCKS[:2]) == plan
    verify(plan, hand_made())
    # Where all groups have the same weights there is one weight: L0.ca at step 1 is held by both.
    assert hand_made().terms(1, 1) == ((0, 1.0),)
    assert hand_made().terms(0, 3) == ((1, (1.0, 3.0)), (0, (0.0, -2.0)))


@pytest.mark.parametrize(
    ("tampered", "told"),
    [
        (TEXT.replace("L0.ca=100", "L0.ca=101"), "plan at step 0: expected the schedule's groups of channels"),
        ("\n".join(TEXT.splitlines()[2:]), "plan at step 0: expected the schedule's groups of channels"),
        (TEXT.replace("+2*1.0|2.0+0*0.0|-1.0@L0.sa", "+2*1.0|2.5+0*0.0|-1.0@L0.sa"), "plan at step 2: expected feat"),
        (TEXT.replace("+3*1.0|3.0+1*0.0|-2.0@L0.ca", "+3*1.0|3.0+1*0.0|-2.0@L0.sa"), "the groups of L0.sa, got .*1"),
    ],
)
def test_verify_refuses_other_groups(tampered: str, told: str) -> None:
    assert tampered != TEXT
    with pytest.raises(InvalidInput, match=told):
        verify(Plan.parse(tampered, BLOCKS[:2]), hand_made())


def test_an_operation_by_groups_needs_groups() -> None:
    with pytest.raises(InvalidInput, match=r"plan at step 2: expected blocks with the groups of L0\.sa"):
        simulate(Plan.parse("\n".join(TEXT.splitlines()[2:]), BLOCKS[:2]))


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("L0.ca=100\n", ""),
        TEXT.replace("L0.ca=100", "L0.ca=10"),
        TEXT.replace("L0.ca=100", "L0.sa=100"),
        TEXT.replace("@L0.sa", ""),
        TEXT.replace("@L0.sa", "@L9.sa"),
        TEXT.replace("1.0|2.0", "1.0|"),
    ],
)
def test_refuses_other_texts(text: str) -> None:
    with pytest.raises(CorruptArtefact, match="plan text"):
        Plan.parse(text, BLOCKS[:2])


@pytest.mark.parametrize("seed", range(10))
def test_plans_do_what_the_schedule_says(seed: int) -> None:
    schedule = with_groups(random_schedule(seed, STEPS), WIDTH, seed)
    for plan in (lower(schedule), optimise(lower(schedule))):
        assert any(isinstance(op, CombineGroups) for op in plan.operations())
        verify(plan, schedule)
        assert Plan.parse(str(plan), BLOCKS) == plan


def test_folds_where_groups_and_weights_are_equal() -> None:
    schedule = alike(with_groups(random_schedule(5, STEPS), WIDTH))
    folded = fold_reused_runs(lower(schedule))
    verify(folded, schedule)
    for step, operations in enumerate(folded.steps):
        assert sum(not isinstance(op, Fold) for op in operations) == (len(BLOCKS) if schedule.mask[0, step] else 1)
    assert schedule.groups is not None
    groups = schedule.groups.copy()
    groups[3] = groups[3] + 1
    other = replace(schedule, groups=groups % 3)
    apart = fold_reused_runs(lower(other))
    verify(apart, other)
    by_groups = [sum(isinstance(op, CombineGroups) for op in operations) for operations in apart.steps]
    # Blocks 0 to 2, block 3, blocks 4 and 5.
    assert set(by_groups) == {0, 3}


@pytest.mark.parametrize("make", [lambda schedule: schedule, alike])
def test_a_plan_predicts_every_channel_by_its_group(make: Callable[[CacheSchedule], CacheSchedule]) -> None:
    schedule = make(with_groups(random_schedule(3, STEPS), WIDTH))
    assert schedule.forecast is not None
    assert schedule.groups is not None
    trunk, (observation, noise) = DiffusionTransformerTrunk(small_network()), random_inputs(1, batch=2, steps=STEPS)
    condition, sample = trunk.condition(observation), noise.initial
    kept: list[deque] = [deque(maxlen=3) for _ in BLOCKS]
    for step, table in enumerate(trunk.step_tables(SAMPLER.timesteps)):
        stream = trunk.embed(sample)
        for block, features in enumerate(kept):
            if schedule.mask[block, step]:
                features.appendleft(trunk.branch(block, stream, table, condition))
                stream = stream + features[0]
                continue
            predicted = torch.zeros_like(stream)
            for channel, group in enumerate(schedule.groups[block]):
                for place, feature in enumerate(features):
                    weight = float(schedule.forecast[block, step, place, group])
                    predicted[..., channel] += weight * feature[..., channel]
            stream = stream + predicted
        sample = sampler_step(SAMPLER, step, sample, trunk.head(stream), noise.steps[step])
    for passes in (EXACT, (fold_reused_runs, *EXACT)):
        chunk = EagerExecutor(optimise(lower(schedule), passes), trunk, SAMPLER)(observation, noise)
        # A float32 network; sums of products in another order.
        torch.testing.assert_close(chunk, sample, rtol=0, atol=1e-5)
    one = replace(schedule, groups=np.zeros_like(schedule.groups))
    assert (EagerExecutor(lower(one), trunk, SAMPLER)(observation, noise) - chunk).abs().max() > 0.01


def test_one_group_is_no_groups() -> None:
    schedule = with_groups(random_schedule(4, STEPS), WIDTH, count=1)
    assert schedule.forecast is not None
    plain = replace(schedule, forecast=schedule.forecast[..., 0], groups=None)
    assert lower(schedule).steps == lower(plain).steps
    assert any(isinstance(op, Combine) for op in lower(plain).operations())


def test_file_keeps_the_groups_and_the_digest_knows_them(tmp_path: Path) -> None:
    schedule = with_groups(random_schedule(1, STEPS), WIDTH)
    assert schedule.groups is not None
    schedule.save(tmp_path / "s.json")
    assert '    "L0.sa": "' in (tmp_path / "s.json").read_text()
    for read in (
        CacheSchedule.from_json(json.loads(json.dumps(schedule.to_json()))),
        CacheSchedule.load(tmp_path / "s.json"),
    ):
        assert np.array_equal(read.groups, schedule.groups)
        assert np.array_equal(read.forecast, schedule.forecast)
        assert read.digest == schedule.digest
    assert replace(schedule, groups=(schedule.groups + 1) % 3).digest != schedule.digest
    never = replace(schedule, mask=np.ones_like(schedule.mask))
    assert CacheSchedule.from_json(never.to_json()).digest == never.digest


@pytest.mark.parametrize(
    "groups",
    [
        lambda groups: groups - 1,
        lambda groups: groups + 1,
        lambda groups: groups.astype(float),
        lambda groups: groups[:5],
        lambda groups: groups[0],
        lambda groups: groups[:, :0],
    ],
    ids=["negative", "without weights", "not whole", "too few blocks", "one row", "no channels"],
)
def test_refuses_groups_that_cannot_be(groups: Callable[[np.ndarray], np.ndarray]) -> None:
    schedule = with_groups(random_schedule(1, STEPS), WIDTH)
    assert schedule.groups is not None
    told = r"schedule groups: expected int\[6 blocks, channels\] below 3, .* got .*; give every channel a group"
    with pytest.raises(InvalidInput, match=told):
        replace(schedule, groups=groups(schedule.groups))


def test_groups_and_weights_belong_together() -> None:
    schedule = with_groups(random_schedule(1, STEPS), WIDTH)
    assert schedule.forecast is not None
    with pytest.raises(InvalidInput, match=r"schedule groups: .* below 0"):
        replace(schedule, forecast=None)
    with pytest.raises(InvalidInput, match=r"history, groups\], got shape \(6, 12, 3\)"):
        replace(schedule, forecast=schedule.forecast[..., 0])
    with pytest.raises(InvalidInput, match=r"history\], got shape \(6, 12, 3, 3\)"):
        replace(schedule, groups=None)


def test_json_refuses_groups_that_are_none() -> None:
    document = with_groups(random_schedule(1, STEPS), WIDTH).to_json()
    for groups in ({}, {"L0.sa": "012"}, dict.fromkeys(map(str, BLOCKS), "01?"), dict.fromkeys(map(str, BLOCKS), 3)):
        with pytest.raises(CorruptArtefact, match="schedule: expected a bac-schedule-1 document"):
            CacheSchedule.from_json(document | {"groups": groups})
