"""The full plan is the reference: the network as it is, driven by diffusers' scheduler, on the same noise."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

import bac
from bac.executors import ChunkNoise
from bac.methods import full_schedule
from bac.plan import cost, lower
from bac.schedule import CacheSchedule, Provenance
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.diffusion_trunk import (
    DiffusionTransformerTrunk,
    diffusion_transformer_blocks,
    diffusion_transformer_cost,
    diffusion_transformer_sites,
)
from policies.loading import load_policy
from policies.samplers import DiffusionProcess, Spacing, ddim
from tests.policies.networks import small_checkpoint, small_policy

# 100 steps of float32 with the products grouped differently (hoisted K, V; packed q, k, v; folded sums).
TOLERANCE = 1e-5
OFFICIAL = DiffusionTransformerConfig(action_dim=10, observation_dim=137, horizon=10)  # robomimic image (hybrid)


def _drive(
    network: DiffusionTransformer,
    scheduler: DDPMScheduler | DDIMScheduler,
    observation: torch.Tensor,
    noise: ChunkNoise,
    monkeypatch: pytest.MonkeyPatch,
) -> torch.Tensor:
    """The loop users run today."""
    fresh = iter(noise.steps)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(fresh))
    sample = noise.initial
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            sample = scheduler.step(network(sample, timestep, observation), timestep, sample).prev_sample
    return sample


def _inputs(policy: DiffusionPolicy, batch: int) -> tuple[torch.Tensor, ChunkNoise]:
    network = policy.spec.network
    generator = torch.Generator().manual_seed(0)
    observation = torch.rand(batch, network.observation_steps, network.observation_dim, generator=generator) * 2 - 1
    return observation, policy.draw_noise(batch, [(row, 0) for row in range(batch)])


def _ddpm(train_steps: int) -> DDPMScheduler:
    scheduler = DDPMScheduler(train_steps, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    scheduler.set_timesteps(train_steps)
    return scheduler


@pytest.mark.parametrize("batch", [1, 3])
def test_full_plan_equals_network_and_diffusers_ddpm(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy(train_steps=100)
    observation, noise = _inputs(policy, batch)
    expected = _drive(policy.checkpoint.network, _ddpm(100), observation, noise, monkeypatch)
    torch.testing.assert_close(policy.denoiser(observation, noise), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", list(Spacing))
def test_full_plan_equals_network_and_diffusers_ddim(spacing: Spacing, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = DiffusionPolicy(small_checkpoint(train_steps=100), ddim(DiffusionProcess(100), 10, spacing))
    observation, noise = _inputs(policy, 2)
    scheduler = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", timestep_spacing=str(spacing))
    scheduler.set_timesteps(10)
    expected = _drive(policy.checkpoint.network, scheduler, observation, noise, monkeypatch)
    torch.testing.assert_close(policy.denoiser(observation, noise), expected, rtol=0, atol=TOLERANCE)


def test_shipped_policy_equals_network_and_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy("push_t")
    observation, noise = _inputs(policy, 2)
    expected = _drive(policy.checkpoint.network, _ddpm(100), observation, noise, monkeypatch)
    torch.testing.assert_close(policy.denoiser(observation, noise), expected, rtol=0, atol=TOLERANCE)


def test_shipped_plan_and_hooks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy("push_t")
    schedule = CacheSchedule.load(policy.schedules / "bac-s10.json")
    observation, noise = _inputs(policy, 2)
    network = policy.checkpoint.network
    with bac.attach(diffusion_transformer_sites(network), schedule, policy.sampler.timesteps):
        hooked = _drive(network, _ddpm(100), observation, noise, monkeypatch)
    planned = bac.accelerate(policy, schedule).denoiser(observation, noise)
    torch.testing.assert_close(planned, hooked, rtol=0, atol=TOLERANCE)
    assert (planned - policy.denoiser(observation, noise)).abs().max() > 1e-3  # it did cache


def test_branches_are_the_networks_own_bit_for_bit() -> None:
    network = small_checkpoint().network
    trunk = DiffusionTransformerTrunk(network)
    stream, observation = torch.randn(2, 6, 16), torch.randn(2, 2, 5)
    table, condition = trunk.step_tables(torch.tensor([7]).numpy())[0], trunk.condition(observation)
    layer = network.decoder.layers[1]
    assert torch.equal(trunk.branch(5, stream, table, condition), layer._ff_block(layer.norm3(stream)))


def test_official_configuration_costs_what_the_paper_counts() -> None:
    blocks = diffusion_transformer_blocks(OFFICIAL)
    schedule = full_schedule(blocks, 100, Provenance("x", {}))
    flops = cost(lower(schedule), diffusion_transformer_cost(OFFICIAL))
    assert flops.original / 1e9 == pytest.approx(15.77, rel=0.005)
    assert flops.hoisted == flops.original - flops.planned > 0


def test_cached_cost_follows_the_published_linear_formula() -> None:
    # BAC: G = 0.4116 + 0.01048 FFN + 0.005294 SA + 0.003424 CA. Ours counts both products of attention, the published
    # one half of them (1 % of SA); its constant depends on the observation encoder, which the paper does not itemise.
    flops = diffusion_transformer_cost(OFFICIAL)
    sa, ca, ffn = (value / 1e9 for value in flops.original_branch[:3])
    assert (ffn, sa, ca) == (
        pytest.approx(0.01048, rel=2e-3),
        pytest.approx(0.005294, rel=1e-2),
        pytest.approx(0.003424, rel=5e-3),
    )
    mask = torch.rand(24, 100, generator=torch.Generator().manual_seed(0)).numpy() < 0.15
    mask[:, 0] = True
    schedule = CacheSchedule(mask, diffusion_transformer_blocks(OFFICIAL), Provenance("x", {}), "random")
    updates = [int(mask[kind::3].sum()) for kind in range(3)]
    counted = cost(lower(schedule), flops).original
    assert counted == 100 * flops.original_step + sum(
        n * c for n, c in zip(updates, flops.original_branch[:3], strict=True)
    )
    published = 0.4116 + 0.005294 * updates[0] + 0.003424 * updates[1] + 0.01048 * updates[2]
    assert counted / 1e9 == pytest.approx(published, rel=0.03)
