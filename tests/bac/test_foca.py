"""FoCa against its own loop, step by step on features, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import BLOCKS, PROVENANCE, random_inputs, random_profile, sampler_step, small_network

from bac.errors import InvalidInput
from bac.executors import EagerExecutor
from bac.methods import FoCa, LastStep
from bac.methods.foca import unrolled
from bac.passes import optimise
from bac.plan import Combine, lower, verify
from bac.schedule import CacheSchedule
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, ddim


class Loop:
    """The online algorithm, of one block: it remembers two features and two computed ones, not weights."""

    def __init__(self) -> None:
        self.features: list = []
        self.computed: list = []
        self.steps: list[int] = []

    def update(self, feature: object) -> None:
        self.features.append(feature)
        self.computed.append(feature)
        self.steps.append(len(self.features) - 1)

    def predict(self) -> object:
        if len(self.computed) < 2:
            self.features.append(self.features[-1])
            return self.features[-1]
        gap = self.steps[-1] - self.steps[-2]
        secant = (self.computed[-1] - self.computed[-2]) / gap
        first_slope = len(self.computed) == 2 and len(self.features) - 1 == self.steps[-1]
        latest, before = self.features[-1], self.features[-1] - secant if first_slope else self.features[-2]
        predicted = 2 * latest - before
        self.features.append(predicted + ((secant - (latest - before)) / 2))
        return self.features[-1]


def test_weights_by_hand() -> None:
    #                               0     1     2      3      4     5      6     7
    forecast = unrolled(np.array([True, False, True, False, False, True, False, False]))
    assert forecast[1].tolist() == [1, 0, 0]
    # The second update: slope and secant are both (F2 - F0) / 2.
    assert forecast[3].tolist() == [1.5, -0.5, 0]
    assert forecast[4].tolist() == [2, -1, 0]
    # The third: the slope is F5 - (2 F2 - F0), the secant (F5 - F2) / 3, and their mean is added to F5.
    assert forecast[6] == pytest.approx([1 + 1 / 2 + 1 / 6, -1 - 1 / 6, 1 / 2])
    # A slope nears the secant by halves: slope + secant were twice the step before.
    assert forecast[7] == pytest.approx(forecast[6] + (forecast[6] - [1, 0, 0] + [1 / 3, -1 / 3, 0]) / 2)


@pytest.mark.parametrize("updates", [3, 5, 8, 20])
def test_is_the_loop_on_random_features(updates: int) -> None:
    schedule = FoCa(updates).schedule(random_profile(seed=0, steps=20))
    features = np.random.default_rng(updates).normal(size=(20, 7))
    loop = Loop()
    for step, update in enumerate(schedule.mask[2]):
        if update:
            loop.update(features[step])
        else:
            predicted = sum(weight * features[source] for source, weight in schedule.terms(2, step))
            # float64; weights of up to ten features that cancel.
            np.testing.assert_allclose(predicted, loop.predict(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("last_step", list(LastStep))
def test_a_linear_feature_is_predicted_exactly(last_step: LastStep) -> None:
    schedule = FoCa(4, last_step).schedule(random_profile(seed=0, steps=22))
    second = np.flatnonzero(schedule.mask[0])[1]
    reused = np.flatnonzero(~schedule.mask[0])
    assert (reused > second).sum() > 8
    for step in reused:
        predicted = sum(weight * (3 + 0.5 * source) for source, weight in schedule.terms(0, int(step)))
        assert predicted == pytest.approx(3 + 0.5 * step if step > second else 3)


def test_a_plan_is_the_loop() -> None:
    steps = 12
    sampler = ddim(DiffusionProcess(train_steps=steps), steps)
    schedule = FoCa(4).schedule(random_profile(seed=0, steps=steps))
    trunk, (observation, noise) = DiffusionTransformerTrunk(small_network()), random_inputs(1, batch=2, steps=steps)
    condition, sample, loops = trunk.condition(observation), noise.initial, [Loop() for _ in BLOCKS]
    for step, table in enumerate(trunk.step_tables(sampler.timesteps)):
        stream = trunk.embed(sample)
        for block, loop in enumerate(loops):
            if schedule.mask[block, step]:
                feature = trunk.branch(block, stream, table, condition)
                loop.update(feature)
            else:
                feature = loop.predict()
            stream = stream + feature
        sample = sampler_step(sampler, step, sample, trunk.head(stream), noise.steps[step])
    plan = optimise(lower(schedule))
    verify(plan, schedule)
    # All blocks share, so the many terms of a prediction are paid once per step and not per block.
    assert all(sum(isinstance(op, Combine) for op in operations) <= 1 for operations in plan.steps)
    chunk = EagerExecutor(plan, trunk, sampler)(observation, noise)
    # A float32 network; the weights of a prediction cancel, so that rounding shows a little more than in its features.
    torch.testing.assert_close(chunk, sample, rtol=0, atol=1e-5)
    held = EagerExecutor(lower(replace(schedule, forecast=None)), trunk, sampler)(observation, noise)
    assert (held - chunk).abs().max() > 0.01


def test_refuses_intervals_that_drift() -> None:
    profile = random_profile(seed=0, steps=20)
    told = r"cache\.updates: expected intervals of at most 8 steps, got 2 updates in 20 steps; choose at least 3\."
    with pytest.raises(InvalidInput, match=told):
        FoCa(2).schedule(profile)
    assert isinstance(FoCa(3).schedule(profile), CacheSchedule)
    assert FoCa(3).schedule(profile).provenance == PROVENANCE
