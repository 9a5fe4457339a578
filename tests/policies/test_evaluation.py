from dataclasses import replace

import numpy as np
import pytest
import torch

import bac
from bac.executors import ChunkNoise
from bac.methods import full_schedule
from bac.plan import Plan, lower
from bac.schedule import CacheSchedule
from policies.diffusion_policy import DiffusionPolicy
from policies.evaluation import action_errors, latency_and_flops
from tests.policies.networks import observation, small_policy


class Shifted:
    """An executor whose chunks are off by a known amount: row i by i / 10 in the first action channel."""

    plan = Plan((), ())

    def __init__(self, policy: DiffusionPolicy) -> None:
        self._policy = policy
        self._rows = 0

    def __call__(self, seen: torch.Tensor, noise: ChunkNoise) -> torch.Tensor:
        chunk = self._policy.denoiser(seen, noise)
        off = torch.arange(self._rows, self._rows + len(chunk)) / 10
        self._rows += len(chunk)
        return chunk + torch.stack([off, torch.zeros_like(off)], dim=1)[:, None]


def _sparse(policy: DiffusionPolicy) -> CacheSchedule:
    mask = np.zeros((len(policy.trunk.blocks), policy.sampler.steps), dtype=bool)
    mask[:, ::5] = True
    return CacheSchedule(mask, policy.trunk.blocks, policy.provenance, "sparse")


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_action_error_is_the_mean_absolute_difference_of_executed_actions(batch: int) -> None:
    policy = small_policy()
    errors = action_errors(policy.with_denoiser(Shifted(policy)), policy, observation(7), batch)
    # Half of the channels is off; float32 chunks near 1.
    np.testing.assert_allclose(errors, np.arange(7) / 20, atol=1e-6)


def test_a_policy_does_not_err_against_itself_and_a_cached_one_does() -> None:
    policy = small_policy()
    assert (action_errors(policy, policy, observation(3)) == 0).all()
    assert (action_errors(bac.accelerate(policy, _sparse(policy)), policy, observation(3)) > 0).all()


def test_latency_and_flops_name_both_policies() -> None:
    policy = small_policy()
    schedule = _sparse(policy)
    cached = bac.accelerate(policy, schedule)
    measured = latency_and_flops(cached, schedule, policy, observation(1), calls=2)
    assert set(measured) == {"latency_ms", "speedup", "control_rate_hz", "gflops", "gflops_hoisted"}
    assert measured["latency_ms"]["uncached"]["calls"] == 2
    branches = sum(policy.trunk.cost.branch)
    saved = measured["gflops"]["uncached"] - measured["gflops"]["cached"]
    # Of 10 steps, 8 reuse every block.
    assert saved * 1e9 == pytest.approx(8 * branches)
    full = lower(full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance))
    assert sum(full.block_calls().values()) == 60


def _recalling(policy: DiffusionPolicy) -> CacheSchedule:
    recall = np.zeros((2, len(policy.trunk.blocks), policy.sampler.steps), dtype=bool)
    recall[1, :, 5] = True
    return replace(_sparse(policy), recall=recall)


def test_a_policy_that_recalls_is_judged_on_the_second_chunk() -> None:
    policy, seen, before = small_policy(), observation(3), observation(3, seed=1)
    recalling = _recalling(policy)
    errors = action_errors(bac.accelerate(policy, recalling), policy, seen, batch=2, before=before)
    for row, error in enumerate(errors):
        fast = bac.accelerate(policy, recalling)
        each, earlier = ({key: values[[row]] for key, values in part.items()} for part in (seen, before))
        fast.predict(earlier, [(row, 0)])
        chunk, expected = (one.denoiser(one.observe(each), one.draw_noise(1, [(row, 1)])) for one in (fast, policy))
        executed = (chunk - expected)[:, policy.spec.executed]
        assert error == pytest.approx(float(executed.abs().mean()), abs=1e-5)
    first = action_errors(bac.accelerate(policy, recalling), policy, seen)
    assert first == pytest.approx(action_errors(bac.accelerate(policy, _sparse(policy)), policy, seen), abs=1e-6)
    assert np.abs(first - errors).max() > 0.001


def test_latency_of_a_policy_that_recalls_is_of_chunks_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    recalling = _recalling(policy)
    cached = bac.accelerate(policy, recalling)
    keys: dict[int, list[object]] = {id(cached): [], id(policy): []}
    monkeypatch.setattr(DiffusionPolicy, "predict", lambda self, seen, noise_keys: keys[id(self)].append(noise_keys))
    measured = latency_and_flops(cached, recalling, policy, observation(1), calls=3)
    for each in keys.values():
        assert len(each) > 3
        assert each == [[(0, number)] for number in range(len(each))]
    branches = sum(policy.trunk.cost.branch)
    saved = measured["gflops"]["uncached"] - measured["gflops"]["cached"]
    # 8 of 10 steps reuse every block, and half of the chunks recall one of the other two.
    assert saved * 1e9 == pytest.approx(8.5 * branches)
