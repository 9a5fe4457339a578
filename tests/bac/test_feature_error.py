"""Feature errors against arithmetic written out on features that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import BLOCKS, PROVENANCE, random_inputs, schedule_of, small_network

from bac.errors import Unavailable
from bac.feature_error import feature_errors
from bac.methods import full_schedule
from bac.profiler import record_features
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, ddpm


def test_error_is_relative_and_a_mean_over_blocks_and_rows() -> None:
    # Two blocks, three steps, two rows of one token and two channels.
    first = torch.tensor([[[[3.0, 4.0]], [[1.0, 0.0]]], [[[3.0, 4.0]], [[2.0, 0.0]]], [[[6.0, 8.0]], [[4.0, 0.0]]]])
    second = torch.ones(3, 2, 1, 2)
    schedule = schedule_of("#..", "#.#")
    # Step 1: (0 and 1/2) and 0; step 2: (5/10 and 3/4) and 0, halved by the second block.
    assert feature_errors(schedule, [first, second]) == pytest.approx([0, 0.125, 0.3125])


def test_predictions_count_with_their_weights() -> None:
    forecast = np.zeros((1, 3, 2))
    forecast[0, 2] = [2, -1]
    schedule = replace(schedule_of("##."), forecast=forecast)
    linear = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    assert feature_errors(schedule, [linear]) == pytest.approx([0, 0, 0])
    assert feature_errors(replace(schedule, forecast=None), [linear]) == pytest.approx([0, 0, 1 / 3])


def test_groups_of_channels_are_predicted_apart() -> None:
    forecast = np.zeros((1, 3, 2, 2))
    forecast[0, 2, :, 0] = [2, -1]  # extrapolates
    forecast[0, 2, :, 1] = [1, 0]  # holds
    schedule = replace(schedule_of("##."), forecast=forecast, groups=np.array([[0, 1]]))
    both = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]).view(3, 1, 1, 2)
    assert feature_errors(schedule, [both]) == pytest.approx([0, 0, 0])
    swapped = replace(schedule, groups=np.array([[1, 0]]))
    assert feature_errors(swapped, [both]) == pytest.approx([0, 0, 1 / 34**0.5])


def test_partial_updates_err_by_the_tokens_that_are_not_computed() -> None:
    # One block, one row, three tokens of one channel: 10 s + t at step s.
    true = 10 * torch.arange(1.0, 5).view(4, 1, 1, 1) + torch.arange(3.0).view(1, 1, 3, 1)
    maps = [[[0, 1, 2], [0, 0, -1], [0, 0, 0], [0, -1, 2]]]
    schedule = replace(schedule_of("##.#"), tokens=maps)
    # Held after each step: 10 11 12; 20 20 12; the same; 40 20 42.
    expected = [0.0, np.hypot(1, 10) / norm(20, 21, 22), norm(10, 11, 20) / norm(30, 31, 32), 21 / norm(40, 41, 42)]
    assert feature_errors(schedule, [true]) == pytest.approx(expected)


def norm(*values: float) -> float:
    return float(np.linalg.norm(values))


def test_recalled_features_are_of_another_chunk() -> None:
    schedule = replace(schedule_of("##"), recall=[[[0, 1]], [[0, 0]]])
    with pytest.raises(Unavailable, match=r"feature error: expected a schedule of whole updates, got .* with recalls"):
        feature_errors(schedule, [torch.ones(2, 1, 1, 1)])


def test_recorded_features_are_those_of_an_uncached_call() -> None:
    trunk, sampler = DiffusionTransformerTrunk(small_network()), ddpm(DiffusionProcess(train_steps=4))
    observation, noise = random_inputs(0, batch=2, steps=4)
    features = record_features(trunk, sampler, observation, noise)
    assert [feature.shape for feature in features] == [(4, 2, 4, 16)] * len(BLOCKS)
    stream = trunk.embed(noise.initial)
    table, condition = trunk.step_tables(sampler.timesteps)[0], trunk.condition(observation)
    for block, feature in enumerate(features):
        expected = trunk.branch(block, stream, table, condition)
        assert torch.equal(feature[0], expected)
        stream = stream + expected
    assert (feature_errors(full_schedule(trunk.blocks, 4, PROVENANCE), features) == 0).all()
