"""Recalled updates: what a schedule says of them, and that they come from the chunk before and no other."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import (
    BLOCKS,
    COST,
    PROVENANCE,
    random_inputs,
    random_schedule,
    sampler_step,
    schedule_of,
    small_network,
    toy_sampler,
)

import bac
from bac.acceleration import select_for
from bac.errors import InvalidInput, Unavailable
from bac.executors import ChunkNoise, CrossChunkExecutor, EagerExecutor, ExecutorKind, Selection
from bac.passes import optimise
from bac.plan import lower, schedule_cost
from bac.schedule import CacheSchedule
from bac.trials import Trials
from policies.diffusion_trunk import DiffusionTransformerTrunk, diffusion_transformer_sites
from policies.samplers import DiffusionProcess, ddpm

STEPS, TOKENS = 8, 4
SAMPLER = ddpm(DiffusionProcess(train_steps=STEPS))
TRUNK = DiffusionTransformerTrunk(small_network())
# Products of other batch sizes add in another order, carried through eight steps; chunks are of size 1 to 10.
TOLERANCE = 1e-4


def recalling(seed: int) -> CacheSchedule:
    """Return a random schedule; of its updates a third are always computed, the others by even or by odd chunks."""
    schedule = random_schedule(seed, STEPS)
    kinds = np.random.default_rng(seed).integers(3, size=schedule.mask.shape)
    return replace(schedule, recall=np.stack([schedule.mask & (kinds == half) for half in (0, 1)]))


SCHEDULE = recalling(0)


def bound(schedule: CacheSchedule = SCHEDULE, executed: int = 2) -> CrossChunkExecutor:
    execute = bac.build_executor(schedule, TRUNK, SAMPLER, PROVENANCE, action_steps=executed)
    assert isinstance(execute, CrossChunkExecutor)
    return execute


def tick(episode: int, number: int) -> tuple[Tensor, ChunkNoise]:
    """Return what a call takes for one chunk of an episode, always the same."""
    observation, noise = random_inputs(100 * episode + number, batch=1, steps=STEPS)
    return observation, replace(noise, keys=((episode, number),))


def together(*ticks: tuple[Tensor, ChunkNoise]) -> tuple[Tensor, ChunkNoise]:
    observations, noises = zip(*ticks, strict=True)
    return torch.cat(observations), ChunkNoise(
        torch.cat([noise.initial for noise in noises]),
        torch.cat([noise.steps for noise in noises], dim=1),
        tuple(key for noise in noises for key in noise.keys),
    )


def plain(episode: int, number: int, schedule: CacheSchedule = SCHEDULE) -> Tensor:
    return EagerExecutor(optimise(lower(schedule.plain())), TRUNK, SAMPLER)(*tick(episode, number))


def naive(schedule: CacheSchedule, episode: int, numbers: range, executed: int) -> list[Tensor]:
    """Run the chunks of an episode one after the other, written out."""
    chunks = []
    before: dict[tuple[int, int], Tensor] | None = None
    for number in numbers:
        observation, noise = tick(episode, number)
        condition, sample = TRUNK.condition(observation), noise.initial
        now: dict[tuple[int, int], Tensor] = {}
        added: dict[int, Tensor] = {}
        for step, table in enumerate(TRUNK.step_tables(SAMPLER.timesteps)):
            stream = TRUNK.embed(sample)
            for block in range(len(BLOCKS)):
                if schedule.mask[block, step]:
                    if before is not None and schedule.recall[number % 2, block, step]:
                        old = before[block, step]
                        moved = [old[:, min(token + executed, TOKENS - 1)] for token in range(TOKENS)]
                        added[block] = torch.stack(moved, dim=1)
                    else:
                        added[block] = now[block, step] = TRUNK.branch(block, stream, table, condition)
                stream = stream + added[block]
            sample = sampler_step(SAMPLER, step, sample, TRUNK.head(stream), noise.steps[step])
        chunks.append(sample)
        before = now
    return chunks


def test_the_first_chunk_is_the_plain_schedule_to_the_bit() -> None:
    for number in (0, 1, 6):
        assert torch.equal(bound()(*tick(1, number)), plain(1, number))


@pytest.mark.parametrize("executed", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 3])
def test_later_chunks_recall_the_one_before(executed: int, first: int) -> None:
    for seed in range(3):
        schedule, numbers = recalling(seed), range(first, first + 4)
        execute, differences = bound(schedule, executed), []
        for number, expected in zip(numbers, naive(schedule, 1, numbers, executed), strict=True):
            chunk = execute(*tick(1, number))
            torch.testing.assert_close(chunk, expected, rtol=0, atol=TOLERANCE)
            differences.append(float((chunk - plain(1, number, schedule)).abs().max()))
        assert differences[0] == 0
        assert min(differences[1:]) > 2 * TOLERANCE, "every recall should show in its chunk"
        assert max(differences) > 0.01


def test_rows_in_different_states_are_rows_on_their_own() -> None:
    execute = bound()
    # Two that recall as odd chunks, one as an even one, a new episode, a chunk whose predecessor is missing.
    calls = [[(7, 0), (8, 2), (9, 1), (6, 0)], [(7, 1), (9, 2), (10, 0), (8, 3), (6, 2)]]
    chunks = [execute(*together(*(tick(*key) for key in keys))) for keys in calls]
    for episode, number in calls[1]:
        alone = bound()
        if (episode, number - 1) in calls[0]:
            alone(*tick(episode, number - 1))
        row = calls[1].index((episode, number))
        expected = alone(*tick(episode, number))
        torch.testing.assert_close(chunks[1][row : row + 1], expected, rtol=0, atol=TOLERANCE)


class Counting:
    """A trunk of one block whose feature says which observation and which token it is of."""

    blocks, cost, device = BLOCKS[:1], COST, torch.device("cpu")

    def step_tables(self, timesteps: np.ndarray) -> range:
        return range(len(timesteps))

    def condition(self, observation: Tensor) -> Tensor:
        return observation

    def embed(self, sample: Tensor) -> Tensor:
        return torch.zeros_like(sample)

    def branch(self, block: int, stream: Tensor, table: int, condition: Tensor) -> Tensor:
        return 100 * condition + torch.arange(TOKENS).reshape(1, TOKENS, 1)

    def head(self, stream: Tensor) -> Tensor:
        return stream


def test_tokens_move_on_by_the_executed_actions() -> None:
    recall = np.array([[[False, False]], [[False, True]]])
    plan = lower(schedule_of("##"))
    execute = CrossChunkExecutor(plan, Counting(), toy_sampler(2), recall, action_steps=2)
    chunks = []
    for number, tag in enumerate((1.0, 2.0, 3.0)):
        noise = ChunkNoise(torch.zeros(1, TOKENS, 1), torch.zeros(2, 1, TOKENS, 1), ((0, number),))
        chunks.append(execute(torch.full((1, 1, 1), tag), noise).flatten().tolist())
    # A chunk is the sum of its two steps; chunk 1 recalls the second of them from chunk 0, tokens 2, 3, 3, 3.
    assert chunks == [
        [200, 202, 204, 206],
        [200 + 102, 201 + 103, 202 + 103, 203 + 103],
        [600, 602, 604, 606],
    ]


@pytest.mark.parametrize(
    ("between", "then"),
    [
        ([], (6, 1)),  # another episode
        ([], (5, 2)),  # a chunk is missing
        ([], (5, 0)),  # the episode begins again
        ([(6, 0)], (5, 1)),  # another call came between
        ([(5, 1)], (5, 1)),  # the same chunk once more
    ],
)
def test_a_stale_feature_is_never_used(between: list[tuple[int, int]], then: tuple[int, int]) -> None:
    execute = bound()
    for key in [(5, 0), *between]:
        execute(*tick(*key))
    assert torch.equal(execute(*tick(*then)), plain(*then))


def test_threads_never_get_features_of_others() -> None:
    execute, episodes = bound(), range(8)

    def play(episode: int) -> list[Tensor]:
        return [execute(*tick(episode, number)) for number in (0, 1)]

    with ThreadPoolExecutor(4) as pool:
        played = list(pool.map(play, episodes))
    for episode, (first, second) in zip(episodes, played, strict=True):
        assert torch.equal(first, plain(episode, 0))
        # Another thread's call may have come between, and then all is computed.
        recalled = naive(SCHEDULE, episode, range(2), 2)[1]
        assert any(torch.allclose(second, each, rtol=0, atol=TOLERANCE) for each in (recalled, plain(episode, 1)))


def test_share_is_the_mean_of_even_and_odd_chunks() -> None:
    schedule = replace(
        schedule_of("####", "#.##", "####"),
        recall=[[[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]], [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]],
    )
    assert schedule.share.tolist() == [[1, 0.5, 0.5, 1], [1, 0, 0.5, 1], [1, 0.5, 1, 1]]
    assert schedule.grid().splitlines()[1:] == [" L0.sa #++#   4", " L0.ca #.+#   3", "L0.ffn #+##   4"]
    assert schedule_cost(schedule, COST).branches == 3 + 25 + 350


def test_text_round_trip_and_digest() -> None:
    read = CacheSchedule.from_json(json.loads(json.dumps(SCHEDULE.to_json())))
    assert np.array_equal(read.recall, SCHEDULE.recall)
    swapped = replace(SCHEDULE, recall=SCHEDULE.recall[::-1])
    assert len({SCHEDULE.digest, swapped.digest, SCHEDULE.plain().digest}) == 3
    assert read.digest == SCHEDULE.digest
    nothing = replace(SCHEDULE, recall=np.zeros((2, *SCHEDULE.mask.shape), dtype=bool))
    assert nothing.recall is None
    assert nothing.digest == SCHEDULE.plain().digest


def test_last_step_forced_is_computed_by_all() -> None:
    schedule = replace(schedule_of("###"), recall=[[[0, 0, 1]], [[0, 1, 0]]])
    assert schedule.with_last_step().recall.astype(int).tolist() == [[[0, 0, 0]], [[0, 1, 0]]]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recall": [[[0, 1, 0]]]}, r"schedule recall: expected bool\[2, 1 blocks, 3 steps\], got shape \(1, 1, 3\)"),
        ({"recall": [[[0, 1, 0]], [[0, 0, 0]]]}, "got 1 recalls without an update and 0 updates that no chunk"),
        ({"recall": [[[0, 0, 1]], [[0, 0, 1]]]}, "got 0 recalls without an update and 1 updates that no chunk"),
        (
            {"recall": [[[0, 0, 1]], [[0, 0, 0]]], "tokens": [[[0, 1], [0, 1], [0, 0]]]},
            "schedule: expected token maps or recalls, got both",
        ),
    ],
)
def test_refuses_recalls_that_cannot_be(changes: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        replace(schedule_of("#.#"), **changes)


def test_auto_is_eager_and_others_refuse() -> None:
    chosen = select_for(SCHEDULE, TRUNK)
    assert (chosen.kind, str(chosen.because)[:23]) == (ExecutorKind.EAGER, "only the eager executor")
    assert select_for(SCHEDULE, TRUNK, "eager") == Selection(ExecutorKind.EAGER)
    told = "executor compiled: expected eager for a schedule that recalls features .*, got compiled; use executor=eager"
    with pytest.raises(Unavailable, match=told):
        select_for(SCHEDULE, TRUNK, "compiled")
    with pytest.raises(Unavailable, match=told):
        bac.build_executor(SCHEDULE, TRUNK, SAMPLER, PROVENANCE, Selection(ExecutorKind.COMPILED), 2)


def test_nothing_drops_the_recalls_in_silence() -> None:
    told = "expected a schedule of whole updates, got one of random with recalls; give it to bac.build_executor"
    with pytest.raises(Unavailable, match="plan: " + told):
        lower(SCHEDULE)
    with pytest.raises(Unavailable, match="hooks: " + told):
        bac.attach(diffusion_transformer_sites(small_network()), SCHEDULE, SAMPLER.timesteps)
    trials = Trials(TRUNK, SAMPLER, PROVENANCE, *random_inputs(0, 2, STEPS), slice(1, 3))
    with pytest.raises(Unavailable, match=r"trials: expected a schedule of single chunks, .* with scripts/eval\.py"):
        trials.action_errors(SCHEDULE)


def test_refuses_what_it_cannot_recall_by() -> None:
    observation, noise = tick(1, 0)
    with pytest.raises(InvalidInput, match=r"chunk noise: expected a key \(.*, got none; give noise_keys to predict"):
        bound()(observation, replace(noise, keys=None))
    with pytest.raises(InvalidInput, match="got 1 different ones of 2; give noise_keys"):
        bound()(*together(tick(1, 0), tick(1, 0)))
    with pytest.raises(InvalidInput, match="chunk noise: expected 1 keys, got 2"):
        bound()(observation, replace(noise, keys=((1, 0), (2, 0))))
    for executed in (None, 0):
        with pytest.raises(InvalidInput, match=f"executed actions: expected at least 1, .* got {executed}; give acti"):
            bound(executed=executed)
