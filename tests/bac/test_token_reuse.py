"""Partial updates: what token maps say, and that a trunk follows them as a loop over tokens would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import (
    BLOCKS,
    COST,
    PROVENANCE,
    ToyTrunk,
    random_inputs,
    random_schedule,
    sampler_step,
    schedule_of,
    small_network,
    toy_sampler,
)

import bac
from bac.acceleration import select_for
from bac.errors import InvalidInput, Mismatch, Unavailable
from bac.executors import ChunkNoise, EagerExecutor, ExecutorKind
from bac.onnx_graph import onnx_graph
from bac.passes import optimise
from bac.plan import lower, schedule_cost
from bac.schedule import CacheSchedule
from bac.token_reuse import TokenReuseTrunk
from bac.trials import Trials
from policies.diffusion_trunk import DiffusionTransformerTrunk, diffusion_transformer_sites
from policies.samplers import DiffusionProcess, ddpm

STEPS, TOKENS = 8, 4
SAMPLER = ddpm(DiffusionProcess(train_steps=STEPS))
TRUNK = DiffusionTransformerTrunk(small_network())
ALL = (0, 1, 2, 3)
EVERY = np.broadcast_to(np.arange(TOKENS), (len(BLOCKS), STEPS, TOKENS))
# Products of other shapes add in another order, carried through eight steps; chunks are of size 1 to 10.
TOLERANCE = 1e-4


def with_maps(**maps: tuple[int, ...]) -> CacheSchedule:
    """Return the schedule ``#.#`` of three blocks with these maps at step 2, for instance ``L0_ca=(0, -1, 2, 3)``."""
    schedule = schedule_of("#.#", "#.#", "#.#")
    tokens = np.broadcast_to(np.arange(TOKENS), (3, 3, TOKENS)).copy()
    for name, each in maps.items():
        tokens[[str(block) for block in BLOCKS].index(name.replace("_", ".")), 2] = each
    return replace(schedule, tokens=tokens)


def random_maps(seed: int) -> CacheSchedule:
    """Return a random schedule; at its updates each token is computed, merged into a computed one, or kept."""
    draw, schedule = np.random.default_rng(seed), random_schedule(seed, STEPS)
    tokens = np.zeros((*schedule.mask.shape, TOKENS), dtype=int)
    for block, step in np.argwhere(schedule.mask):
        computed = draw.permutation(TOKENS)[: draw.integers(1, TOKENS + 1)]
        others = np.append(computed, [-1] if step else [])
        tokens[block, step] = draw.choice(others, TOKENS)
        tokens[block, step, computed] = computed
    return replace(schedule, tokens=tokens)


def naive(mask: np.ndarray, tokens: np.ndarray, observation: Tensor, noise: ChunkNoise) -> Tensor:
    """Run a schedule token by token, every update of all tokens and then thrown away where the map says so."""
    condition, sample = TRUNK.condition(observation), noise.initial
    features: dict[int, Tensor] = {}
    for step, table in enumerate(TRUNK.step_tables(SAMPLER.timesteps)):
        stream = TRUNK.embed(sample)
        for block in range(len(BLOCKS)):
            if mask[block, step]:
                fresh = TRUNK.branch(block, stream, table, condition)
                known = features.get(block, fresh)
                rows = [
                    known[:, token] if source == -1 else fresh[:, source]
                    for token, source in enumerate(tokens[block, step].tolist())
                ]
                features[block] = torch.stack(rows, dim=1)
            stream = stream + features[block]
        sample = sampler_step(SAMPLER, step, sample, TRUNK.head(stream), noise.steps[step])
    return sample


def bound(schedule: CacheSchedule) -> EagerExecutor:
    return EagerExecutor(
        optimise(lower(schedule.plain())),
        TokenReuseTrunk(TRUNK, schedule.tokens) if schedule.tokens is not None else TRUNK,
        SAMPLER,
    )


@pytest.mark.parametrize("seed", range(6))
def test_is_a_loop_over_tokens(seed: int) -> None:
    schedule, inputs = random_maps(seed), random_inputs(seed, batch=3, steps=STEPS)
    assert schedule.tokens is not None
    chunk = bound(schedule)(*inputs)
    torch.testing.assert_close(chunk, naive(schedule.mask, schedule.tokens, *inputs), rtol=0, atol=TOLERANCE)
    assert (chunk - bound(schedule.plain())(*inputs)).abs().max() > 0.01, "the maps should show in the chunk"


def test_a_map_of_all_tokens_is_the_plain_trunk_to_the_bit() -> None:
    schedule, inputs = random_schedule(0, STEPS), random_inputs(0, batch=2, steps=STEPS)
    plan = optimise(lower(schedule))
    mapped = EagerExecutor(plan, TokenReuseTrunk(TRUNK, EVERY), SAMPLER)(*inputs)
    assert torch.equal(mapped, EagerExecutor(plan, TRUNK, SAMPLER)(*inputs))
    assert replace(schedule, tokens=EVERY).tokens is None
    assert replace(schedule, tokens=EVERY).digest == schedule.digest


def branches(trunk: TokenReuseTrunk, seed: int) -> Iterator[Tensor]:
    """Yield the features of all blocks and steps of a call, each computed on a stream of its own."""
    condition = trunk.condition(random_inputs(seed, 1, STEPS)[0])
    draw = torch.Generator().manual_seed(seed)
    for table in trunk.step_tables(SAMPLER.timesteps):
        for block in range(len(BLOCKS)):
            yield trunk.branch(block, torch.randn(1, TOKENS, 16, generator=draw), table, condition)


def test_merged_and_kept_tokens_have_the_very_features_they_are_given() -> None:
    tokens = EVERY.copy()
    tokens[:, 1] = 0, 0, -1, 3
    schedule = replace(schedule_of(*["#" * STEPS] * len(BLOCKS)), tokens=tokens)
    first, second = torch.stack(list(branches(TokenReuseTrunk(TRUNK, schedule.tokens), 0))).split(len(BLOCKS))[:2]
    assert torch.equal(second[:, :, 1], second[:, :, 0])
    assert torch.equal(second[:, :, 2], first[:, :, 2])
    assert not torch.isclose(second[:, :, [0, 3]], first[:, :, [0, 3]]).all(dim=-1).any()


def test_interleaved_calls_do_not_see_each_other() -> None:
    trunk = TokenReuseTrunk(TRUNK, random_maps(1).tokens)
    alone = [list(branches(trunk, seed)) for seed in (0, 1)]
    together = list(zip(branches(trunk, 0), branches(trunk, 1), strict=True))
    for mine, theirs, (one, other) in zip(*alone, together, strict=True):
        assert torch.equal(one, mine)
        assert torch.equal(other, theirs)


def test_threads_do_not_see_each_other() -> None:
    execute, calls = bound(random_maps(2)), [random_inputs(seed, 1, STEPS) for seed in range(8)]
    alone = [execute(*call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: execute(*call), calls))
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("block", range(6))
def test_single_tokens_are_those_of_the_whole_branch(block: int) -> None:
    stream, tokens = torch.randn(2, TOKENS, 16), torch.tensor([1, 3])
    table, condition = TRUNK.step_tables(SAMPLER.timesteps)[3], TRUNK.condition(torch.randn(2, 2, 5))
    whole = TRUNK.branch(block, stream, table, condition)
    part = TRUNK.branch_tokens(block, stream, table, condition, tokens)
    torch.testing.assert_close(part, whole[:, tokens])
    if block % 3:
        # Outside self-attention the other tokens are not even read.
        stream[:, [0, 2]] = torch.nan
        assert torch.equal(TRUNK.branch_tokens(block, stream, table, condition, tokens), part)


def test_attention_received_is_what_the_network_gives() -> None:
    network, stream = small_network(), torch.randn(3, TOKENS, 16)
    for number, layer in enumerate(network.decoder.layers):
        normed = layer.norm1(stream)
        _, weights = layer.self_attn(normed, normed, normed, attn_mask=network.mask, average_attn_weights=False)
        torch.testing.assert_close(TRUNK.attention_received(number, stream), weights.sum(dim=(1, 2)))


def test_share_counts_computed_tokens_and_the_keys_and_values_of_all() -> None:
    schedule = with_maps(L0_sa=(0, 0, -1, -1), L0_ca=(0, 1, 1, 3), L0_ffn=(-1, -1, -1, 3))
    # One of four, but half of a self-attention is keys and values.
    assert schedule.share.tolist() == [[1, 0, 0.625], [1, 0, 0.75], [1, 0, 0.25]]
    counted = schedule_cost(schedule, COST)
    assert counted.branches == round(1.625 + 17.5 + 125)
    assert counted.planned == counted.branches + 3 * 10**6 + 10**7
    assert counted.original == 2 * counted.branches + 15 * 10**6
    assert schedule_cost(schedule.plain(), COST).branches == 222


def test_grid_tells_partial_updates_apart() -> None:
    lines = with_maps(L0_ca=(0, -1, 2, 3)).grid().splitlines()
    assert lines[1:] == [" L0.sa #.#   2", " L0.ca #.+   2", "L0.ffn #.#   2"]


def test_json_round_trip(tmp_path: Path) -> None:
    schedule = random_maps(3)
    schedule.save(tmp_path / "s.json")
    for read in (
        CacheSchedule.load(tmp_path / "s.json"),
        CacheSchedule.from_json(json.loads(json.dumps(schedule.to_json()))),
    ):
        assert np.array_equal(read.tokens, schedule.tokens)
        assert read.tokens.dtype == np.int8
        assert read.digest == schedule.digest
    assert (schedule.tokens[~schedule.mask] == -1).all()


def test_digest_names_the_maps() -> None:
    schedules = [
        with_maps(),
        with_maps(L0_ca=(0, -1, 2, 3)),
        with_maps(L0_sa=(0, -1, 2, 3)),
        with_maps(L0_ca=(0, 0, 2, 3)),
    ]
    assert len({each.digest for each in schedules}) == 4


def test_json_refuses_maps_of_another_length() -> None:
    document = with_maps(L0_ca=(0, -1, 2, 3), L0_sa=(0, 0, 2, 3)).to_json()
    document["tokens"]["L0.ca"][2] = [0]
    with pytest.raises(
        bac.BacError, match=r"schedule: expected a bac-schedule-1 .*, got ValueError token map \[0\] at step 2"
    ):
        CacheSchedule.from_json(document)


def test_last_step_forced_computes_all_tokens() -> None:
    forced = with_maps(L0_ca=(0, -1, 2, 3), L0_sa=(1, 1, 2, 3)).with_last_step()
    assert forced.tokens is None
    kept = replace(schedule_of("##."), tokens=[[ALL, (0, 0, -1, 3), ALL]]).with_last_step()
    assert kept.tokens[0].tolist() == [[0, 1, 2, 3], [0, 0, -1, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (np.zeros((1, 2, 4), int), r"\[1 blocks, 3 steps, T\], .* got int64 of shape \(1, 2, 4\), 0 to 0"),
        (np.zeros((1, 3, 0), int), r"got int64 of shape \(1, 3, 0\)"),
        (np.zeros((1, 3, 4)), "got float64"),
        ([[ALL, ALL, (0, 1, 2, 4)]], "each -1 to T - 1, T < 128, got .*, 0 to 4"),
        ([[ALL, ALL, (0, 1, 2, -2)]], "got .*, -2 to 3"),
        ([[ALL, (0, 0, 1, 3), ALL]], "expected tokens merged into computed ones, got a token that takes the feature"),
        ([[ALL, (0, -1, 1, 3), ALL]], "expected tokens merged into computed ones"),
        ([[ALL, (-1,) * 4, ALL]], "expected updates of at least one token, got one of none"),
        ([[(0, -1, 2, 3), ALL, ALL]], "expected every token at step 0, since nothing is cached before it"),
    ],
)  # fmt: skip
def test_refuses_maps_that_say_nothing(tokens: object, told: str) -> None:
    with pytest.raises(InvalidInput, match="schedule tokens: .*" + told):
        replace(schedule_of("###"), tokens=tokens)


MAPPED = random_maps(0)


def test_auto_is_eager_and_compiled_says_so() -> None:
    assert bac.build_executor(MAPPED, TRUNK, SAMPLER, replace(PROVENANCE)).plan == optimise(lower(MAPPED.plain()))
    chosen = select_for(MAPPED, TRUNK)
    told = "executor compiled: expected a pre-norm decoder on the CPU, got TokenReuseTrunk on cpu; use executor=eager."
    assert (chosen.kind, chosen.because) == (ExecutorKind.EAGER, told)
    with pytest.raises(Unavailable, match=told):
        bac.build_executor(MAPPED, TRUNK, SAMPLER, PROVENANCE, ExecutorKind.COMPILED)
    told = "ONNX graph: expected a pre-norm decoder, got TokenReuseTrunk; use executor=eager, which runs any trunk"
    with pytest.raises(Unavailable, match=told):
        onnx_graph(lower(MAPPED.plain()), TokenReuseTrunk(TRUNK, MAPPED.tokens), SAMPLER)


def test_nothing_drops_the_maps_in_silence() -> None:
    told = "expected a schedule of whole updates, got one of random with token maps; give it to bac.build_executor"
    with pytest.raises(Unavailable, match="plan: " + told):
        lower(MAPPED)
    with pytest.raises(Unavailable, match="hooks: " + told):
        bac.attach(diffusion_transformer_sites(small_network()), MAPPED, SAMPLER.timesteps)


def test_refuses_trunks_and_maps_that_do_not_fit() -> None:
    with pytest.raises(
        Unavailable, match=r"expected a trunk that computes single tokens .*, got ToyTrunk; use a method"
    ):
        bac.build_executor(random_maps(0), ToyTrunk(), toy_sampler(STEPS), PROVENANCE)
    with pytest.raises(Mismatch, match="schedule of tokens: expected 4 tokens of 6 blocks, got 3 tokens of 6 blocks"):
        TokenReuseTrunk(TRUNK, MAPPED.tokens[:, :, :3])


def test_trials_judge_partial_updates() -> None:
    observed, noise = random_inputs(5, batch=3, steps=STEPS)
    trials = Trials(TRUNK, SAMPLER, PROVENANCE, observed, noise, slice(1, 3))
    every = np.ones((len(BLOCKS), STEPS), dtype=bool), EVERY
    chunk, uncached = (naive(*each, observed, noise) for each in ((MAPPED.mask, MAPPED.tokens), every))
    expected = (chunk - uncached)[:, 1:3].abs().mean(dim=(1, 2))
    assert trials.action_errors(MAPPED) == pytest.approx(expected.numpy(), abs=TOLERANCE)
    assert trials.flops(MAPPED) == schedule_cost(MAPPED, TRUNK.cost).planned < trials.flops(MAPPED.plain())
