"""Sensitivity against a network whose gain is known, and against a loop written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import random_inputs, sampler_step, small_network

from bac.executors import ChunkNoise
from bac.sampler_table import SamplerTable
from bac.sensitivity import step_sensitivity
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, ddim, ddpm

STEPS = 6
ALL = slice(None)


class BlindTrunk(DiffusionTransformerTrunk):
    """Its noise estimate is 0 whatever it sees, so an error travels through the sampler alone."""

    def head(self, stream: Tensor) -> Tensor:
        return torch.zeros(*stream.shape[:2], 2)


@pytest.mark.parametrize("make", [ddpm, ddim])
def test_gain_of_a_blind_network_is_the_samplers(make: Any) -> None:
    sampler: SamplerTable = make(DiffusionProcess(train_steps=STEPS, clip=1e9), STEPS)
    carried = sampler.to_original * sampler.recover_sample + sampler.to_sample
    entered = sampler.to_original * sampler.recover_estimate + sampler.to_estimate
    expected = [abs(entered[step] * np.prod(carried[step + 1 :])) for step in range(STEPS)]
    batches = [random_inputs(seed, batch=2, steps=STEPS) for seed in (1, 2)]
    gains = step_sensitivity(BlindTrunk(small_network()), sampler, batches, ALL)
    # The difference of two float32 chunks, of an error of 0.1.
    assert gains == pytest.approx(expected, rel=1e-3)


def test_gain_counts_the_executed_actions_alone() -> None:
    sampler = ddim(DiffusionProcess(train_steps=STEPS), STEPS)
    trunk, (observation, noise) = DiffusionTransformerTrunk(small_network()), random_inputs(3, batch=1, steps=STEPS)
    first, others = slice(0, 1), slice(1, 4)
    whole, *parts = (
        step_sensitivity(trunk, sampler, [(observation, noise)], executed) ** 2 for executed in (ALL, first, others)
    )
    assert whole == pytest.approx((parts[0] + 3 * parts[1]) / 4)
    assert (abs(parts[0] - parts[1]) > 1e-3 * whole).all()


def test_gain_equals_two_calls_with_an_error_between_them() -> None:
    sampler = ddpm(DiffusionProcess(train_steps=STEPS))
    trunk, (observation, noise) = DiffusionTransformerTrunk(small_network()), random_inputs(4, batch=3, steps=STEPS)
    gains = step_sensitivity(trunk, sampler, [(observation, noise)], ALL, seed=7)
    draw = torch.Generator().manual_seed(8)  # the seed of the first batch
    base = _chunk(trunk, sampler, observation, noise, {})
    for step in range(STEPS):
        error = torch.randn(3, 4, 2, generator=draw)
        error *= 0.1 / error.square().mean(dim=(1, 2), keepdim=True).sqrt()
        change = _chunk(trunk, sampler, observation, noise, {step: error}) - base
        # The same arithmetic in batches of another size.
        assert gains[step] == pytest.approx(float(change.square().mean().sqrt()) / 0.1, rel=1e-3)


def _chunk(
    trunk: DiffusionTransformerTrunk,
    sampler: SamplerTable,
    observation: Tensor,
    noise: ChunkNoise,
    errors: dict[int, Tensor],
) -> Tensor:
    condition, sample = trunk.condition(observation), noise.initial
    for step, table in enumerate(trunk.step_tables(sampler.timesteps)):
        stream = trunk.embed(sample)
        for block in range(len(trunk.blocks)):
            stream = stream + trunk.branch(block, stream, table, condition)
        estimate = trunk.head(stream) + errors.get(step, 0.0)
        sample = sampler_step(sampler, step, sample, estimate, noise.steps[step])
    return sample.double()
