"""The profiler against naive arithmetic on features recorded without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import BLOCKS, PROVENANCE, random_inputs, sampler_step, small_network

from bac.errors import InvalidInput
from bac.executors import ChunkNoise
from bac.methods import Uniform
from bac.profile import FeatureProfile, Metric
from bac.profiler import profile_features
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, ddim, ddpm

STEPS = 6
SAMPLER = ddpm(DiffusionProcess(train_steps=STEPS))


def profile(trunk: DiffusionTransformerTrunk, *batches: tuple[Tensor, ChunkNoise]) -> FeatureProfile:
    return profile_features(trunk, SAMPLER, PROVENANCE, batches)


def rows(inputs: tuple[Tensor, ChunkNoise], part: slice) -> tuple[Tensor, ChunkNoise]:
    observation, noise = inputs
    return observation[part], ChunkNoise(noise.initial[part], noise.steps[:, part])


def record(trunk: DiffusionTransformerTrunk, observation: Tensor, noise: ChunkNoise) -> np.ndarray:
    """Return the features of an uncached call as float64[B, blocks, K, T d]."""
    condition, sample, features = trunk.condition(observation), noise.initial, []
    for step, table in enumerate(trunk.step_tables(SAMPLER.timesteps)):
        stream = trunk.embed(sample)
        for block in range(len(BLOCKS)):
            feature = trunk.branch(block, stream, table, condition)
            features.append(feature.double().flatten(1).numpy())
            stream = stream + feature
        sample = sampler_step(SAMPLER, step, sample, trunk.head(stream), noise.steps[step])
    return np.stack(features, axis=1).reshape(len(observation), STEPS, len(BLOCKS), -1).swapaxes(1, 2)


def streams_of(
    trunk: DiffusionTransformerTrunk, observation: Tensor, noise: ChunkNoise, features: np.ndarray
) -> np.ndarray:
    """Return the stream before each block and the head as float64[B, blocks + 1, K, T d]."""
    condition, sample, embedded = trunk.condition(observation), noise.initial, []
    for step, table in enumerate(trunk.step_tables(SAMPLER.timesteps)):
        stream = trunk.embed(sample)
        embedded.append(stream.double().flatten(1).numpy())
        for block in range(len(BLOCKS)):
            stream = stream + trunk.branch(block, stream, table, condition)
        sample = sampler_step(SAMPLER, step, sample, trunk.head(stream), noise.steps[step])
    first = np.stack(embedded, axis=1)[:, None]
    return first + np.concatenate([np.zeros_like(first), np.cumsum(features, axis=1)], axis=1)


def compare(metric: Metric, one: np.ndarray, other: np.ndarray) -> float:
    match metric:
        case Metric.COSINE:
            return one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        case Metric.L1:
            return np.abs(one - other).mean()
        case Metric.L2:
            return np.linalg.norm(one - other)
        case Metric.MSE:
            return np.square(one - other).mean()


def test_equals_naive_arithmetic() -> None:
    trunk, inputs = DiffusionTransformerTrunk(small_network()), random_inputs(1, batch=2, steps=STEPS)
    measured, features = profile(trunk, inputs), record(trunk, *inputs)
    assert (measured.blocks, measured.observations, measured.provenance) == (BLOCKS, 2, PROVENANCE)
    for metric in Metric:
        expected = [
            [
                [np.mean([compare(metric, f[b, s], f[b, t]) for f in features]) for t in range(STEPS)]
                for s in range(STEPS)
            ]
            for b in range(len(BLOCKS))
        ]
        # The profile is float32, and its l1 sums float32 differences.
        np.testing.assert_allclose(measured.values[metric], expected, rtol=1e-5, atol=1e-5)


def test_token_statistics_equal_naive_arithmetic() -> None:
    trunk, (observation, noise) = DiffusionTransformerTrunk(small_network()), random_inputs(1, batch=3, steps=STEPS)
    parts = [rows((observation, noise), slice(0, 1)), rows((observation, noise), slice(1, 3))]
    measured = profile(trunk, *parts)
    features = record(trunk, observation, noise).reshape(3, len(BLOCKS), STEPS, 4, 16)
    alike = [[[[cosine(f[t], f[t + 1]) for t in range(3)] for f in steps] for steps in row] for row in features]
    np.testing.assert_allclose(measured.token_likeness, np.mean(alike, axis=0), rtol=1e-5, atol=1e-6)
    assert measured.attention.shape == (2, STEPS, 4)
    # At step 0 the stream of the first block is the embedded noise.
    received = trunk.attention_received(0, trunk.embed(noise.initial)).mean(dim=0)
    np.testing.assert_allclose(measured.attention[0, 0], received, rtol=1e-5)
    # Every query of both heads gives away 1.
    np.testing.assert_allclose(measured.attention.sum(axis=2), 4 * 2, rtol=1e-5)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return compare(Metric.COSINE, one, other)


def test_stream_statistics_equal_naive_arithmetic() -> None:
    trunk, inputs = DiffusionTransformerTrunk(small_network()), random_inputs(1, batch=2, steps=STEPS)
    measured, features = profile(trunk, inputs), record(trunk, *inputs)
    streams = streams_of(trunk, *inputs, features)  # [B, points, K, T d]
    points = range(len(BLOCKS) + 1)
    for point in points:
        for step in range(1, STEPS):
            now, before = streams[:, point, step], streams[:, point, step - 1]
            ratio = np.abs(now - before).sum(axis=1) / np.abs(before).sum(axis=1)
            assert measured.stream_change[point, step] == pytest.approx(ratio.mean(), rel=1e-5)
    assert (measured.stream_change[:, 0] == 0).all()
    residuals = streams[:, -1] - streams[:, 0]
    centred = residuals.reshape(2, STEPS, 4, 16)
    centred = (centred - centred.mean(axis=3, keepdims=True)).reshape(2, STEPS, -1)
    for step in range(STEPS):
        for other in range(STEPS):
            one, two = residuals[:, step], residuals[:, other]
            ratio = np.abs(two - one).sum(axis=1) / np.abs(one).sum(axis=1)
            assert measured.residual_change[step, other] == pytest.approx(ratio.mean(), rel=1e-5, abs=1e-6)
            x, y = centred[:, step].ravel(), centred[:, other].ravel()
            slope = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
            assert measured.residual_slope[step, other] == pytest.approx(slope, rel=1e-5, abs=1e-5)


def test_mean_does_not_depend_on_the_batches() -> None:
    trunk, inputs = DiffusionTransformerTrunk(small_network()), random_inputs(2, batch=3, steps=STEPS)
    whole = profile(trunk, inputs)
    done: list[int] = []
    parts = [rows(inputs, slice(0, 1)), rows(inputs, slice(1, 3))]
    parted = profile_features(trunk, SAMPLER, PROVENANCE, parts, done.append)
    assert (parted.observations, done) == (3, [1, 2])
    for metric in Metric:
        np.testing.assert_allclose(parted.values[metric], whole.values[metric], rtol=1e-4, atol=1e-5)
    # A mean of the batches' means would pass if the observations were alike.
    first = profile(trunk, parts[0])
    assert np.abs(first.values[Metric.L1] - whole.values[Metric.L1]).max() > 0.01


def test_refuses_nan() -> None:
    observation, noise = random_inputs(3, batch=1, steps=STEPS)
    observation[0, 1, 2] = torch.nan
    with pytest.raises(InvalidInput, match="NaN or infinite values; check the checkpoint and the calibration"):
        profile(DiffusionTransformerTrunk(small_network()), (observation, noise))


def test_refuses_a_dead_branch() -> None:
    network = small_network()
    network.decoder.layers[1].linear2.weight.zero_()
    with pytest.raises(InvalidInput, match=r"constant statistics for \['L1.ffn'\]; check that these branches"):
        profile(DiffusionTransformerTrunk(network), random_inputs(4, batch=2, steps=STEPS))


def test_a_sampler_of_one_step_is_profiled() -> None:
    trunk, sampler = DiffusionTransformerTrunk(small_network()), ddim(DiffusionProcess(train_steps=6), 1)
    profile = profile_features(trunk, sampler, PROVENANCE, [random_inputs(0, batch=2, steps=1)])
    assert profile.steps == 1
    assert profile.values[Metric.COSINE] == pytest.approx(np.ones((len(trunk.blocks), 1, 1)))
    assert not profile.values[Metric.L1].any()
    assert profile.residual_slope == pytest.approx(np.ones((1, 1)))
    assert np.array_equal(Uniform(1).schedule(profile).mask, np.ones((len(trunk.blocks), 1)))
