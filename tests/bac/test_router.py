"""The router: its rollout, its gradient, and what it learns where the answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import PROVENANCE, random_inputs, small_network

from bac.errors import InvalidInput
from bac.executors import ChunkNoise, EagerExecutor
from bac.methods import full_schedule
from bac.plan import lower
from bac.router import gated_chunk, train_router
from bac.schedule import CacheSchedule
from bac.trunk import Block, BlockKind, TrunkCost
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, ddpm

STEPS = 6
SAMPLER = ddpm(DiffusionProcess(train_steps=STEPS))
EXECUTED = slice(1, 3)


class PlantedTrunk:
    """Three branches in float64: one says the same at every step, one changes with the step, one with the stream."""

    blocks = tuple(Block(0, kind) for kind in BlockKind)
    cost = TrunkCost(branch=(1, 1, 2), step=0, call=0, original_branch=(1, 1, 2), original_step=0)
    device = torch.device("cpu")

    def step_tables(self, timesteps: np.ndarray) -> range:
        return range(len(timesteps))

    def condition(self, observation: Tensor) -> Tensor:
        return observation.mean(dim=(1, 2), keepdim=True)

    def embed(self, sample: Tensor) -> Tensor:
        return sample

    def branch(self, block: int, stream: Tensor, table: int, condition: Tensor) -> Tensor:
        match block:
            case 0:
                return condition.expand_as(stream)
            case 1:
                return (condition * (-1) ** table).expand_as(stream)
            case _:
                return (stream + condition).sin() * 0.3

    def head(self, stream: Tensor) -> Tensor:
        return stream * 0.5


def exact_inputs(seed: int, batch: int = 2) -> tuple[Tensor, ChunkNoise]:
    observation, noise = random_inputs(seed, batch, STEPS)
    return observation.double(), ChunkNoise(noise.initial.double(), noise.steps.double())


def batches(count: int = 2) -> list[tuple[Tensor, ChunkNoise]]:
    return [exact_inputs(seed) for seed in range(count)]


def train(trunk: Any = None, inputs: list[tuple[Tensor, ChunkNoise]] | None = None, **changes: Any) -> np.ndarray:
    values = {"iterations": 4, "penalty": 0.02, "rate": 0.3, "seed": 0} | changes
    return train_router(trunk or PlantedTrunk(), SAMPLER, batches() if inputs is None else inputs, EXECUTED, **values)


def eager(trunk: DiffusionTransformerTrunk, schedule: CacheSchedule, inputs: tuple[Tensor, ChunkNoise]) -> Tensor:
    return EagerExecutor(lower(schedule), trunk, SAMPLER)(*inputs)


def test_open_gates_are_the_uncached_call() -> None:
    trunk, inputs = DiffusionTransformerTrunk(small_network()), random_inputs(1, batch=2, steps=STEPS)
    expected = eager(trunk, full_schedule(trunk.blocks, STEPS, PROVENANCE), inputs)
    gates = torch.ones(len(trunk.blocks), STEPS)
    assert torch.equal(gated_chunk(trunk, SAMPLER, *inputs, gates), expected)


def test_gates_of_0_and_1_are_a_schedule() -> None:
    trunk, inputs = DiffusionTransformerTrunk(small_network()), random_inputs(2, batch=2, steps=STEPS)
    mask = np.random.default_rng(0).random((len(trunk.blocks), STEPS)) < 0.4
    gates = torch.tensor(mask, dtype=torch.float32)
    mask[:, 0] = True
    expected = eager(trunk, CacheSchedule(mask, trunk.blocks, PROVENANCE, "toy"), inputs)
    assert torch.equal(gated_chunk(trunk, SAMPLER, *inputs, gates), expected)
    uncached = eager(trunk, full_schedule(trunk.blocks, STEPS, PROVENANCE), inputs)
    assert not torch.allclose(expected, uncached, atol=1e-3)


def test_the_cached_feature_is_the_mixture() -> None:
    trunk = PlantedTrunk()
    observation, noise = exact_inputs(3, batch=1)
    gates = torch.tensor(np.random.default_rng(1).random((3, STEPS)))
    condition, sample = trunk.condition(observation), noise.initial
    held = [torch.zeros(())] * 3
    for step in range(STEPS):
        stream = sample
        for block in range(3):
            gate = 1 if step == 0 else gates[block, step]
            held[block] = gate * trunk.branch(block, stream, step, condition) + (1 - gate) * held[block]
            stream = stream + held[block]
        clean = SAMPLER.recover_sample[step] * sample + SAMPLER.recover_estimate[step] * trunk.head(stream)
        sample = SAMPLER.to_original[step] * clean.clip(-SAMPLER.clip, SAMPLER.clip) + SAMPLER.to_sample[step] * sample
        sample = sample + SAMPLER.to_noise[step] * noise.steps[step]
    assert gated_chunk(trunk, SAMPLER, observation, noise, gates).numpy() == pytest.approx(sample.numpy(), rel=1e-12)


@pytest.mark.parametrize(("block", "step"), [(1, 1), (1, STEPS - 1), (2, 3)])
def test_gradient_of_a_gate_is_the_finite_difference(block: int, step: int) -> None:
    trunk, inputs = PlantedTrunk(), exact_inputs(4)
    goal = gated_chunk(trunk, SAMPLER, *inputs, torch.ones(3, STEPS))
    gates = torch.full((3, STEPS), 0.4, dtype=torch.float64)

    def loss(gates: Tensor) -> Tensor:
        return (gated_chunk(trunk, SAMPLER, *inputs, gates) - goal)[:, EXECUTED].square().mean()

    (gradient,) = torch.autograd.grad(loss(gates.requires_grad_()), [gates])
    nudge = torch.zeros_like(gates)
    nudge[block, step] = 1e-5
    with torch.no_grad():
        difference = (loss(gates + nudge) - loss(gates - nudge)) / 2e-5
    # Central differences of a smooth function in float64: the error is of the order of the nudge squared.
    assert float(gradient[block, step]) == pytest.approx(float(difference), rel=1e-6)
    assert abs(float(difference)) > 1e-5
    assert (gradient[:, 0] == 0).all()


def test_closes_what_never_changes_and_keeps_what_does() -> None:
    start = train(iterations=0)[0, -1]
    gates = train(iterations=25, rate=0.1, penalty=0.002)
    assert gates[0, 1:].max() < start / 5
    assert gates[1:, 1:].min() > start / 5
    assert gates[1:, 1:].mean() > start


def test_penalty_closes_gates() -> None:
    shares = [(train(iterations=25, penalty=penalty) @ np.ones(STEPS)).sum() for penalty in (0.0, 0.01, 0.1)]
    assert shares[0] > shares[1] > shares[2]
    # Where the penalty is all that counts, every gate closes, and those of step 0 stay.
    gates, start = train(iterations=1, penalty=1e6), train(iterations=0)
    assert (gates[:, 1:] < start[:, 1:]).all()
    assert (gates[:, 0] == 1).all()


def test_gates_are_probabilities_and_step_0_is_open() -> None:
    gates = train()
    assert gates.dtype == np.float64
    assert gates.shape == (3, STEPS)
    assert ((gates >= 0) & (gates <= 1)).all()
    assert (gates[:, 0] == 1).all()


def test_is_deterministic_by_seed() -> None:
    inputs = batches(3)
    assert np.array_equal(train(inputs=inputs), train(inputs=inputs))
    assert not np.array_equal(train(inputs=inputs), train(inputs=inputs, seed=1))


def test_every_batch_has_its_turn() -> None:
    inputs = batches(3)
    errors: list[float] = []
    # At rate 0 the gates stay, so an error tells its batch.
    train(inputs=inputs, iterations=6, rate=0.0, on_iteration=lambda error, share: errors.append(error))
    assert len(set(errors[:3])) == 3
    assert set(errors[3:]) == set(errors[:3])


def test_reports_the_error_and_the_share_of_the_flops() -> None:
    told: list[tuple[float, float]] = []
    train(iterations=1, on_iteration=lambda error, share: told.append((error, share)))
    ((error, share),) = told
    gates = train(iterations=0)
    assert share == pytest.approx(float(np.array([1, 1, 2]) @ gates.sum(axis=1)) / (4 * STEPS))
    trunk, inputs = PlantedTrunk(), batches()[np.random.default_rng(0).permutation(2)[-1]]
    chunks = [gated_chunk(trunk, SAMPLER, *inputs, torch.tensor(g)) for g in (gates, np.ones_like(gates))]
    assert error == pytest.approx(float((chunks[0] - chunks[1])[:, EXECUTED].square().mean().sqrt()))


def test_leaves_the_network_alone() -> None:
    network = small_network().requires_grad_()
    before = [parameter.clone() for parameter in network.parameters()]
    train(DiffusionTransformerTrunk(network), [random_inputs(0, batch=2, steps=STEPS)], iterations=2)
    for parameter, value in zip(network.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, value)


@pytest.mark.parametrize(
    "changes", [{"inputs": []}, {"iterations": -1}, {"penalty": -1.0}, {"penalty": float("nan")}, {"rate": -0.1}]
)
def test_refuses_what_cannot_be_trained(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="router: expected calibration observations, and iterations, penalty"):
        train(**changes)
