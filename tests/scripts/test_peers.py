"""The caches of other packages on the small network: exact where they cache nothing, cheaper where they do."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from studies import peers
from studies.latency import reference_loop
from studies.rows import REFERENCE, require_package, started

from bac.errors import Unavailable
from bac.executors import ChunkNoise
from bac.timing import Latency
from configs.studies import PeersConfig
from policies.benchmark import Row, StartedRow, noise_of, random_policy
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from tests.policies.networks import observation, small_policy


def _has(package: str) -> bool:
    try:
        require_package("the test", package, package)
    except Unavailable:
        return False
    return True


CACHE_DIT = pytest.param("cache-dit", marks=pytest.mark.skipif(not _has("cache_dit"), reason="needs cache-dit"))
PACKAGES = ["diffusers", CACHE_DIT]
COMMON = {"magcache_skipped": 9, "calibration_observations": 2}
NEVER = PeersConfig(first_block=[0], taylorseer=[1], magcache=[0], dbcache=[0], **COMMON)
OFTEN = PeersConfig(first_block=[9], taylorseer=[5], magcache=[9], dbcache=[2], **COMMON)


def _built(package: str, values: PeersConfig, policy: DiffusionPolicy) -> list[StartedRow]:
    calibration = policy.observe(observation(values.calibration_observations, seed=1))
    rows = [row for row in peers.peer_rows(values, policy, calibration) if row.name.startswith(package)]
    assert len(rows) == {"diffusers": 3, "cache-dit": 2}[package]
    built, refused = started(rows, policy)
    assert refused == {}
    return built


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_cached_is_the_reference_bit_for_bit(package: str) -> None:
    policy = small_policy()
    judged = peers.judge(policy, _built(package, NEVER, policy), policy.observe(observation(3)), {})
    assert set(judged.values()) == {peers.Judged(computed=1, error=0, error_p95=0)}


@pytest.mark.parametrize("package", PACKAGES)
def test_much_cached_computes_less_and_moves_the_actions(package: str) -> None:
    policy = small_policy()
    for name, row in peers.judge(policy, _built(package, OFTEN, policy), policy.observe(observation(3)), {}).items():
        assert 0 < row.computed < 1, name
        assert 0 < row.error <= row.error_p95, name


@pytest.mark.parametrize("package", PACKAGES)
def test_a_chunk_does_not_depend_on_the_one_before(package: str) -> None:
    policy = small_policy()
    observed, noise = policy.observe(observation(2)), noise_of(policy, policy.sampler.steps, 2)
    for each in _built(package, OFTEN, policy):
        both = peers.one_by_one(each.denoise, observed, noise)
        backwards = peers.one_by_one(
            each.denoise, observed.flip(0), ChunkNoise(noise.initial.flip(0), noise.steps.flip(1))
        )
        assert torch.equal(backwards, both.flip(0)), each.row.name


def test_layers_are_counted_and_left_as_they_were() -> None:
    policy = small_policy()
    (first_block, taylorseer, _) = _built("diffusers", OFTEN, policy)
    judged = peers.judge(policy, [first_block, taylorseer], policy.observe(observation(3)), {})
    # 2 layers, 10 steps: the first layer at all of them and the second at step 0 alone; both at steps 0, 1, 2, 4 and 9.
    assert [row.computed for row in judged.values()] == [11 / 20, 10 / 20]
    assert not any(layer._forward_hooks for each in (first_block, taylorseer) for layer in each.denoise.layers)


def test_a_package_that_refuses_is_reported_in_the_table() -> None:
    one_layer = DiffusionTransformerConfig(action_dim=2, observation_dim=5, layers=1, heads=2, width=16)
    policy = random_policy(one_layer, steps=5)
    calibration = torch.zeros(1, policy.observation_steps, 5)
    rows = [
        Row(REFERENCE, partial(reference_loop, steps=5), 5, None),
        next(peers.peer_rows(OFTEN, policy, calibration)),  # FirstBlockCache wants a first and a last block
    ]
    built, refused = started(rows, policy)
    judged = peers.judge(policy, built, calibration, {})
    table = peers.peers_markdown([row.name for row in rows], judged, {REFERENCE: Latency(2, 3, 2, 0, 1)}, refused)
    assert "| reference | 100% | 0.0000 | 0.0000 | 2.0 | 3.0 | 1.0x |\n" in table
    assert "| diffusers FirstBlockCache 9 | refused | - | - | - | - | - |\n" in table
    said = (
        "\n- diffusers FirstBlockCache 9: the package: expected no refusal of the decoder in scripts/studies/peers.py, "
    )
    assert f"{said}got IndexError, pop from empty list; see" in table


def test_a_missing_package_is_reported_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    policy = small_policy()
    rows = list(peers.peer_rows(OFTEN, policy, policy.observe(observation(2))))
    built, refused = started(rows, policy)
    assert [each.row.name.split()[0] for each in built] == ["diffusers"] * 3
    assert list(refused) == ["cache-dit DBCache 2", "cache-dit DBCache 2, TaylorSeer"]
    assert all(reason.endswith("; pip install cache-dit.") for reason in refused.values())


def test_a_cache_that_does_not_forget_is_refused() -> None:
    def leaky(_: DiffusionPolicy, network: DiffusionTransformer) -> Callable[[], AbstractContextManager[None]]:
        calls = iter(range(1_000))
        network.head.register_forward_hook(lambda _module, _arguments, noise: noise + 1e-3 * next(calls))
        return nullcontext

    with pytest.raises(
        Unavailable, match="the package: expected the same chunk from two identical calls, got chunks up to"
    ):
        peers.cached_by(small_policy(), attach=leaky)
