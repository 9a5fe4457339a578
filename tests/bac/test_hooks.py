"""Hooks on a network driven by its own loop, against the plan executor; and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import BLOCKS, drive, random_inputs, random_schedule, small_network

import bac
from bac.errors import InvalidInput, Mismatch
from bac.executors import CacheHooks, EagerExecutor, SiteTable
from bac.passes import optimise
from bac.plan import lower
from bac.sampler_table import SamplerTable
from policies.diffusion_transformer import DiffusionTransformer
from policies.diffusion_trunk import DiffusionTransformerTrunk, diffusion_transformer_sites
from policies.samplers import DiffusionProcess, ddim, ddpm

PROCESS = DiffusionProcess(train_steps=8)
DDPM = ddpm(PROCESS)
DDIM = ddim(PROCESS, 4)


def hooks_on(network: DiffusionTransformer, seed: int = 0, sampler: SamplerTable = DDPM) -> CacheHooks:
    return CacheHooks(diffusion_transformer_sites(network), random_schedule(seed, sampler.steps), sampler.timesteps)


def forward(network: DiffusionTransformer, timestep: int) -> Tensor:
    observation, noise = random_inputs(0, batch=1, steps=1)
    return network(noise.initial, torch.tensor(timestep), observation)


def in_another_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def own_attributes(network: DiffusionTransformer) -> list[dict[str, Any]]:
    owners = [network, *(owner for owner, _ in diffusion_transformer_sites(network).branches.values())]
    return [dict(vars(owner)) for owner in owners]


@pytest.mark.parametrize("sampler", [DDPM, DDIM], ids=["ddpm", "ddim"])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_plan_executor(seed: int, sampler: SamplerTable) -> None:
    network = small_network()
    plan = optimise(lower(random_schedule(seed, sampler.steps)))
    execute = EagerExecutor(plan, DiffusionTransformerTrunk(network), sampler)
    inputs = random_inputs(seed, batch=2, steps=sampler.steps)
    with hooks_on(network, seed, sampler):
        chunk = drive(network, sampler, *inputs)
    # The plan folds runs of reused features into sums and builds its condition in parts: other orders of addition.
    torch.testing.assert_close(chunk, execute(*inputs), rtol=0, atol=1e-5)
    assert (chunk - drive(network, sampler, *inputs)).abs().max() > 0.01, "without caching the chunk is another"


def test_computes_as_often_as_the_schedule_updates() -> None:
    network, calls = small_network(), []

    def counting(method: Callable[..., Tensor], block: bac.schedule.Block) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: calls.append(block) or method(*args, **kwargs)

    for block, (owner, name) in diffusion_transformer_sites(network).branches.items():
        setattr(owner, name, counting(getattr(owner, name), block))
    with hooks_on(network):
        drive(network, DDPM, *random_inputs(0, batch=1, steps=8))
    schedule = random_schedule(0, 8)
    assert [calls.count(block) for block in BLOCKS] == schedule.mask.sum(axis=1).tolist()
    assert len(calls) == schedule.updates


def test_repr_says_whether_attached() -> None:
    hooks = hooks_on(small_network())
    tail = f", 6 sites, {random_schedule(0, 8).updates} updates)"
    assert repr(hooks) == "CacheHooks(detached" + tail
    with hooks:
        assert repr(hooks) == "CacheHooks(attached" + tail
    assert repr(hooks) == "CacheHooks(detached" + tail


def test_detach_leaves_no_trace() -> None:
    network = small_network()
    before = own_attributes(network)
    hooks = bac.attach(diffusion_transformer_sites(network), random_schedule(0, 8), DDPM.timesteps)
    assert own_attributes(network) != before
    bac.detach(hooks)
    assert own_attributes(network) == before
    bac.detach(hooks)  # once more does nothing


def test_attach_refuses_another_checkpoint_and_sampler_if_told_what_runs() -> None:
    network, schedule = small_network(), random_schedule(0, 8)
    before = own_attributes(network)
    sites, mine = diffusion_transformer_sites(network), schedule.provenance
    for foreign, told in (
        (replace(mine, checkpoint="facade"), "schedule and checkpoint: expected checkpoint c0ffee, got facade"),
        (replace(mine, sampler={"name": "toy", "steps": 9}), "schedule and sampler: expected"),
    ):
        with pytest.raises(Mismatch, match=told):
            bac.attach(sites, schedule, DDPM.timesteps, provenance=foreign)
        assert own_attributes(network) == before
    with pytest.raises(Mismatch, match="expected 7 steps of 6 blocks"):
        bac.attach(sites, schedule, DDPM.timesteps[1:], provenance=mine)
    with bac.attach(sites, schedule, DDPM.timesteps, provenance=mine):
        assert own_attributes(network) != before


def test_detach_after_an_error_inside() -> None:
    network = small_network()
    before = own_attributes(network)
    wrong = torch.zeros(1, 4, 3)  # one action channel too many: the network itself fails, inside its forward
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), hooks_on(network):
        network(wrong, torch.tensor(7), torch.zeros(1, 2, 5))
    assert own_attributes(network) == before


def test_detach_restores_what_somebody_else_had_patched() -> None:
    network = small_network()
    layer = network.decoder.layers[1]
    theirs = layer._ff_block
    layer._ff_block = theirs  # now an attribute of the instance, as a profiler or another library leaves it
    with hooks_on(network):
        assert vars(layer)["_ff_block"] is not theirs
    assert vars(layer)["_ff_block"] is theirs


def test_attaches_again_after_detach() -> None:
    network, inputs = small_network(), random_inputs(1, batch=1, steps=8)
    hooks = hooks_on(network)
    with hooks:
        first = drive(network, DDPM, *inputs)
        forward(network, 7)
    with hooks:
        with pytest.raises(InvalidInput, match="time step of a cached network: expected 7"):
            forward(network, 6)  # would go on with the chunk that the first attachment abandoned
        assert torch.equal(drive(network, DDPM, *inputs), first)


def test_refuses_two_at_once() -> None:
    network = small_network()
    with hooks_on(network) as hooks:
        for second in (hooks, hooks_on(network, seed=1)):
            with pytest.raises(InvalidInput, match="network: expected no cache hooks, got hooks attached; detach"):
                second.attach()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([1], "7, the next of the schedule, or 7"),  # starting midway
        ([7], "7, the next of the schedule, or 7"),
        ([0, 2], "6, the next of the schedule, or 7"),
        ([0, 1, 1], "5, the next of the schedule, or 7"),
        ([0, 1, 2, 1], "4, the next of the schedule, or 7"),
        ([0, 1, 2, 3, 4, 5, 6, 7, 7], "7, the next of the schedule, or 7"),  # past the end
        ([0, 1, 2, 3, 4, 5, 6, 7, 1], "7, the next of the schedule, or 7"),
    ],
)
def test_refuses_time_steps_out_of_order(steps: list[int], expected: str) -> None:
    network = small_network()
    with hooks_on(network):
        for step in steps[:-1]:
            forward(network, int(DDPM.timesteps[step]))
        wrong = int(DDPM.timesteps[steps[-1]])
        with pytest.raises(
            InvalidInput, match=f"time step of a cached network: expected {expected}.*, got {wrong}; run"
        ):
            forward(network, wrong)


def test_refuses_a_second_thread_inside_a_chunk() -> None:
    network, inputs = small_network(), random_inputs(2, batch=1, steps=8)
    with hooks_on(network):
        undisturbed = drive(network, DDPM, *inputs)
        # Between chunks another thread may come in.
        assert torch.equal(in_another_thread(lambda: drive(network, DDPM, *inputs)), undisturbed)

        def disturbed(sample: Tensor, timestep: Tensor, observation: Tensor) -> Tensor:
            for intruder in (7, int(timestep)):
                if int(timestep) < 7:
                    with pytest.raises(InvalidInput, match="cached network: expected one chunk at a time from one"):
                        in_another_thread(lambda step=intruder: forward(network, step))
            return network(sample, timestep, observation)

        assert torch.equal(drive(disturbed, DDPM, *inputs), undisturbed)


def test_an_abandoned_chunk_does_not_reach_the_next() -> None:
    network, inputs = small_network(), random_inputs(3, batch=1, steps=8)
    with hooks_on(network):
        expected = drive(network, DDPM, *inputs)
        for timestep in DDPM.timesteps[:4]:
            forward(network, int(timestep))
        assert torch.equal(drive(network, DDPM, *inputs), expected)


def test_a_thread_that_died_inside_a_chunk_abandons_it() -> None:
    network, inputs = small_network(), random_inputs(3, batch=1, steps=8)
    with hooks_on(network):
        expected = drive(network, DDPM, *inputs)
        for _ in range(2):
            in_another_thread(lambda: [forward(network, int(timestep)) for timestep in DDPM.timesteps[:4]])
            with pytest.raises(InvalidInput, match=r"expected 7, the next of the schedule, or 7 for a new chunk, got"):
                forward(network, int(DDPM.timesteps[4]))  # what is left would be of the dead thread's chunk
            assert torch.equal(drive(network, DDPM, *inputs), expected)


@pytest.mark.parametrize(("steps", "blocks"), [(7, 6), (9, 6), (8, 3)])
def test_refuses_a_schedule_of_other_steps_or_blocks(steps: int, blocks: int) -> None:
    sites = diffusion_transformer_sites(small_network())
    with pytest.raises(Mismatch, match=rf"schedule: expected 8 steps of blocks \['L0.sa', .*, got {steps} steps of"):
        CacheHooks(sites, random_schedule(0, steps, BLOCKS[:blocks]), DDPM.timesteps)


def test_site_table_refuses_missing_methods() -> None:
    network = small_network()
    branches = {
        BLOCKS[0]: (network.decoder.layers[0], "_sa_block"),
        BLOCKS[1]: (network.decoder.layers[0], "_ca_block"),
    }
    with pytest.raises(InvalidInput, match=r"site table: expected a method for every block, got none for \['L0.ca'\]"):
        SiteTable(network, lambda *_: 0, branches)
