"""Committed actions come out as they went in and are seen at their noise level; none of them change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_executor_contract import PROCESS, SMALL, TOLERANCE, compiled, graphed, inputs, plan_for, trunk_of
from toys import toy_sampler

from bac.errors import InvalidInput, Unavailable
from bac.executors import ChunkNoise, Committed, EagerExecutor, OnnxExecutor
from bac.executors.committed import CommittedPaths, path_operator
from bac.sampler_table import SamplerTable
from policies.samplers import ddim, ddpm, dpm_solver

SAMPLERS = pytest.mark.parametrize(
    "sampler", [ddpm(PROCESS), ddim(PROCESS, 4), dpm_solver(PROCESS, 5)], ids=lambda s: s.name
)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    patch = pytest.MonkeyPatch()
    patch.setenv("BAC_CACHE", str(tmp_path_factory.mktemp("compiled")))
    yield
    patch.undo()


def given(batch: int, count: int, first: int = 1, seed: int = 0) -> Committed:
    draw = torch.Generator().manual_seed(seed)
    return Committed(torch.rand(batch, count, SMALL.action_dim, generator=draw) * 2 - 1, first)


# Where K does not divide the training steps, DDIM itself arrives beside its level (policies/samplers.py).
@pytest.mark.parametrize("sampler", [ddpm(PROCESS), ddim(PROCESS, 3), dpm_solver(PROCESS, 5)], ids=lambda s: s.name)
def test_each_step_sees_the_action_at_its_own_noise_level(sampler: SamplerTable) -> None:
    """x_k = signal_k c + noise of variance 1 - signal_k^2, the forward process the network was trained on."""
    operator = path_operator(sampler)
    signal = 1 / sampler.recover_sample
    np.testing.assert_allclose(operator[:-1, 0], signal, atol=1e-12)
    np.testing.assert_allclose((operator[:-1, 1:] ** 2).sum(axis=1), 1 - signal**2, atol=1e-12)
    np.testing.assert_allclose(operator[-1, 0], 1, atol=1e-12)
    # DDPM's "fixed small" variance has a floor; nothing else is left of the noise.
    np.testing.assert_allclose(operator[-1, 1:], 0, atol=1e-9)


def test_ddim_keeps_the_noise_of_the_beginning() -> None:
    operator = path_operator(ddim(PROCESS, 4))
    assert (operator[:, 2:] == 0).all()


@SAMPLERS
def test_the_path_is_the_samplers_own_step_under_the_true_clean_action(sampler: SamplerTable) -> None:
    _, noise = inputs(SMALL, 2, sampler.steps)
    committed = given(2, 3)
    path = CommittedPaths(sampler, torch.device("cpu"))(committed, noise)
    assert path.shape == (sampler.steps + 1, 2, 3, SMALL.action_dim)
    assert torch.equal(path[-1], committed.actions)
    signal = 1 / sampler.recover_sample
    sigma = np.sqrt(1 - signal**2)
    clean = committed.actions.double()
    sample = signal[0] * clean + sigma[0] * noise.initial[:, 1:4].double()
    for step in range(sampler.steps):
        torch.testing.assert_close(path[step].double(), sample, rtol=0, atol=1e-5)
        estimate = (sample - signal[step] * clean) / sigma[step]
        sample = (
            sampler.to_original[step] * clean
            + sampler.to_sample[step] * sample
            + sampler.to_estimate[step] * estimate
            + sampler.to_noise[step] * noise.steps[step][:, 1:4].double()
            + sampler.to_previous[step] * clean
        )


@pytest.mark.parametrize("make", [EagerExecutor, compiled, graphed], ids=["eager", "compiled", "cuda_graph"])
@SAMPLERS
def test_executors_agree_and_keep_what_was_committed_exactly(make: object, sampler: SamplerTable) -> None:
    trunk = trunk_of(SMALL)
    for seed, (batch, count, first) in enumerate([(1, 3, 1), (2, 5, 0), (5, 1, 15), (2, 16, 0), (1, 4, 1)]):
        plan, (observation, noise) = plan_for(trunk, sampler, seed), inputs(SMALL, batch, sampler.steps, seed)
        committed = given(batch, count, first, seed)
        expected = EagerExecutor(plan, trunk, sampler)(observation, noise, committed)
        executor = make(plan, trunk, sampler)
        chunk = executor(observation, noise, committed)
        torch.testing.assert_close(chunk, expected, rtol=0, atol=TOLERANCE)
        assert torch.equal(chunk[:, committed.place], committed.actions)
        # Others at the same place come out by the same recording.
        other = given(batch, count, first, seed + 100)
        assert torch.equal(executor(observation, noise, other)[:, other.place], other.actions)


@pytest.mark.parametrize("make", [EagerExecutor, compiled, graphed, OnnxExecutor])
def test_no_committed_action_changes_no_bit(make: object) -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    plan, (observation, noise) = plan_for(trunk, sampler, 0), inputs(SMALL, 3, sampler.steps)
    before = noise.initial.clone()
    executor = make(plan, trunk, sampler)
    without = executor(observation, noise)
    assert torch.equal(executor(observation, noise, given(3, 0)), without)
    assert torch.equal(executor(observation, noise, None), without)
    assert torch.equal(noise.initial, before)


@pytest.mark.parametrize("committed", [None, given(5, 3)], ids=["free", "committed"])
def test_rows_shared_out_among_threads_are_the_same_rows(
    committed: Committed | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    plan, (observation, noise) = plan_for(trunk, sampler, 0), inputs(SMALL, 5, sampler.steps)
    executor, chunks = compiled(plan, trunk, sampler), []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        chunks.append(executor(observation, noise, committed))
    torch.testing.assert_close(chunks[1], chunks[0], rtol=0, atol=TOLERANCE)
    if committed is not None:
        assert torch.equal(chunks[1][:, committed.place], committed.actions)


def test_the_rest_of_the_chunk_answers_to_what_was_committed() -> None:
    trunk, sampler = trunk_of(SMALL), ddim(PROCESS, 4)
    plan, (observation, noise) = plan_for(trunk, sampler, 0), inputs(SMALL, 1, sampler.steps)
    executor = EagerExecutor(plan, trunk, sampler)
    low, high = (executor(observation, noise, Committed(torch.full((1, 4, 2), x), 1)) for x in (-1.0, 1.0))
    assert (low[:, 5:] - high[:, 5:]).abs().max() > 1e-3


def test_the_noise_of_a_call_is_left_as_it_was() -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    plan, (observation, noise) = plan_for(trunk, sampler, 0), inputs(SMALL, 2, sampler.steps)
    before = noise.initial.clone(), noise.steps.clone()
    for make in (EagerExecutor, compiled):
        make(plan, trunk, sampler)(observation, noise, given(2, 3))
        assert torch.equal(noise.initial, before[0])
        assert torch.equal(noise.steps, before[1])


def test_refusals() -> None:
    trunk, sampler = trunk_of(SMALL), ddim(PROCESS, 4)
    plan, (observation, noise) = plan_for(trunk, sampler, 0), inputs(SMALL, 2, sampler.steps)
    executor = EagerExecutor(plan, trunk, sampler)
    nan = Committed(torch.full((2, 1, 2), float("nan")), 0)
    for bad in (given(1, 2), given(2, 17, 0), given(2, 2, 15), given(2, 2, -1), nan):
        with pytest.raises(
            InvalidInput, match=r"^committed actions: expected finite float\[2, n, 2\] within 16 places"
        ):
            executor(observation, noise, bad)
    with pytest.raises(Unavailable, match=r"^executor onnx: expected no committed actions, got 2; use executor=compil"):
        OnnxExecutor(plan, trunk, sampler)(observation, noise, given(2, 2))
    toy = ChunkNoise(torch.zeros(1, 1, 2), torch.zeros(12, 1, 1, 2))
    with pytest.raises(Unavailable, match=r"^committed actions: expected a sampler that estimates the clean chunk"):
        CommittedPaths(toy_sampler(12), torch.device("cpu"))(Committed(torch.zeros(1, 1, 2), 0), toy)
