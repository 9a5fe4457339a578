"""The eager executor: what it computes, what it reuses, and that nothing survives a call."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from toys import (
    BLOCKS,
    PROVENANCE,
    ToyTrunk,
    decode,
    drive,
    latest_update,
    random_inputs,
    random_schedule,
    small_network,
    toy_noise,
    toy_observation,
    toy_sampler,
)

from bac.errors import InvalidInput, Mismatch
from bac.executors import ChunkNoise, EagerExecutor
from bac.methods import full_schedule
from bac.passes import DEFAULT, EXACT, Pass, optimise
from bac.plan import lower
from bac.sampler_table import SamplerTable
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, ddim, ddpm

STEPS = 12
PROCESS = DiffusionProcess(train_steps=STEPS)


def toy_executor(seed: int, passes: tuple[Pass, ...] = DEFAULT, trunk: ToyTrunk | None = None) -> EagerExecutor:
    plan = optimise(lower(random_schedule(seed, STEPS)), passes)
    return EagerExecutor(plan, ToyTrunk() if trunk is None else trunk, toy_sampler(STEPS))


def small_executor(seed: int) -> EagerExecutor:
    plan = optimise(lower(random_schedule(seed, STEPS)))
    return EagerExecutor(plan, DiffusionTransformerTrunk(small_network()), ddpm(PROCESS))


@pytest.mark.parametrize("passes", [(), EXACT, DEFAULT], ids=["plain", "exact", "default"])
@pytest.mark.parametrize("seed", range(4))
def test_computes_what_is_scheduled_and_reuses_the_rest(seed: int, passes: tuple[Pass, ...]) -> None:
    schedule, trunk = random_schedule(seed, STEPS), ToyTrunk()
    toy_executor(seed, passes, trunk)(toy_observation(7), toy_noise(1, STEPS))
    expected = [(block, step) for step in range(STEPS) for block in range(len(BLOCKS)) if schedule.mask[block, step]]
    assert trunk.calls == expected
    for step, stream in enumerate(trunk.streams):
        assert decode(stream) == ([latest_update(row, step) for row in schedule.mask], [7] * len(BLOCKS))


def test_chunk_is_what_the_sampler_makes_of_the_estimates() -> None:
    trunk = ToyTrunk()
    chunk = toy_executor(0, trunk=trunk)(toy_observation(7), toy_noise(1, STEPS))
    assert torch.equal(chunk, torch.stack(trunk.streams).sum(dim=0))


@pytest.mark.parametrize("sampler", [ddpm(PROCESS), ddim(PROCESS, 4)], ids=["ddpm", "ddim"])
def test_full_plan_is_the_network_in_its_own_loop(sampler: SamplerTable) -> None:
    network = small_network()
    observation, noise = random_inputs(1, batch=2, steps=sampler.steps)
    plan = optimise(lower(full_schedule(BLOCKS, sampler.steps, PROVENANCE)))
    chunk = EagerExecutor(plan, DiffusionTransformerTrunk(network), sampler)(observation, noise)
    # float32: the tables are built in other batch shapes than the network's own condition memory.
    torch.testing.assert_close(chunk, drive(network, sampler, observation, noise), rtol=0, atol=1e-5)


def test_caching_shows_in_the_small_network() -> None:
    # Guards the tests below: on a network whose branches add nothing they could not fail.
    inputs = random_inputs(2, batch=1, steps=STEPS)
    assert (small_executor(0)(*inputs) - small_executor(1)(*inputs)).abs().max() > 0.01


@pytest.mark.parametrize("network", ["toy", "small"])
def test_nothing_survives_a_call(network: str) -> None:
    if network == "toy":
        calls = [(toy_observation(tag), toy_noise(1, STEPS)) for tag in (3, 90)]
        make = toy_executor
    else:
        calls = [random_inputs(seed, batch=1, steps=STEPS) for seed in (3, 4)]
        make = small_executor
    forwards = [execute(*call) for execute in [make(5)] for call in calls]
    backwards = [execute(*call) for execute in [make(5)] for call in reversed(calls)]
    assert torch.equal(forwards[0], backwards[1])
    assert torch.equal(forwards[1], backwards[0])
    assert not torch.equal(forwards[0], forwards[1])


def test_two_threads_do_not_see_each_other() -> None:
    # The barrier makes the calls enter every step together: without it one may end before the other begins.
    barrier = threading.Barrier(2, timeout=60)
    together = toy_executor(6, trunk=ToyTrunk(meet=barrier.wait))
    tags = (3, 90)
    with ThreadPoolExecutor(2) as pool:
        chunks = list(pool.map(lambda tag: together(toy_observation(tag), toy_noise(1, STEPS)), tags))
    alone = toy_executor(6)
    for tag, chunk in zip(tags, chunks, strict=True):
        assert torch.equal(chunk, alone(toy_observation(tag), toy_noise(1, STEPS)))


def test_a_batch_is_its_rows() -> None:
    execute = small_executor(7)
    observation, noise = random_inputs(8, batch=3, steps=STEPS)
    batch = execute(observation, noise)
    for row in range(3):
        only = slice(row, row + 1)
        alone = execute(observation[only], ChunkNoise(noise.initial[only], noise.steps[:, only]))
        # float32 matrix products of another batch size may add in another order, and twelve steps carry it on.
        torch.testing.assert_close(batch[only], alone, rtol=0, atol=1e-6)


def test_inputs_stay_as_they_are() -> None:
    observation, noise = random_inputs(9, batch=2, steps=STEPS)
    before = [tensor.clone() for tensor in (observation, noise.initial, noise.steps)]
    small_executor(0)(observation, noise)
    assert all(map(torch.equal, before, (observation, noise.initial, noise.steps)))


def test_result_needs_no_gradient() -> None:
    network = small_network().requires_grad_(True)
    plan = lower(random_schedule(0, STEPS))
    chunk = EagerExecutor(plan, DiffusionTransformerTrunk(network), ddpm(PROCESS))(*random_inputs(1, 1, STEPS))
    assert not chunk.requires_grad


@pytest.mark.parametrize(("steps", "blocks"), [(STEPS + 1, 6), (STEPS - 1, 6), (STEPS, 3)])
def test_refuses_a_plan_of_other_steps_or_blocks(steps: int, blocks: int) -> None:
    plan = lower(random_schedule(0, steps, BLOCKS[:blocks]))
    expected = f"plan: expected {STEPS} steps of 6 blocks, got {steps} steps of {blocks} blocks; lower the schedule"
    with pytest.raises(Mismatch, match=expected):
        EagerExecutor(plan, ToyTrunk(), toy_sampler(STEPS))


@pytest.mark.parametrize(("batch", "steps", "observations"), [(2, STEPS, 1), (1, STEPS - 1, 1), (1, STEPS, 2)])
def test_refuses_noise_of_another_batch_or_sampler(batch: int, steps: int, observations: int) -> None:
    with pytest.raises(InvalidInput, match=rf"chunk noise: expected \[{observations}, T, Da\] and \[{STEPS}, "):
        toy_executor(0)(toy_observation(*range(observations)), toy_noise(batch, steps))


def test_refuses_initial_and_step_noise_of_different_shapes() -> None:
    noise = ChunkNoise(toy_noise(1, STEPS).initial, torch.from_numpy(np.zeros((STEPS, 1, 1, 3))))
    with pytest.raises(InvalidInput, match=r"chunk noise: .* got \(1, 1, 2\) and \(12, 1, 1, 3\); draw it for this"):
        toy_executor(0)(toy_observation(1), noise)
