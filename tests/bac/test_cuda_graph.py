"""The CUDA graph executor: what may be captured, and that it is the eager executor where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from test_executor_contract import PROCESS, SMALL, TOLERANCE, graphed, grouped, inputs, plan_for, trunk_of
from toys import NoHostReads, random_schedule

from bac.errors import InvalidInput
from bac.executors import ChunkNoise, Committed, CudaGraphExecutor, EagerExecutor
from bac.passes import optimise
from bac.plan import lower
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import ddpm


def test_a_capture_reads_nothing_back_but_a_call_still_checks() -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    execute = graphed(plan_for(trunk, sampler, 0), trunk, sampler)
    observation, noise = inputs(SMALL, 1, 9)
    committed = Committed(torch.full((1, 3, 2), 0.5), 1)
    assert torch.equal(execute(observation, noise, committed)[:, 1:4], committed.actions)
    with pytest.raises(InvalidInput, match="committed actions: expected finite"):
        execute(observation, noise, Committed(torch.full((1, 3, 2), torch.nan), 1))
    # Guards the first assertion: what stands in for a capture must refuse the check itself.
    for inference in (True, False):
        with torch.inference_mode(inference), NoHostReads(), pytest.raises(RuntimeError, match="not permitted when"):
            committed.require(noise)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", [None, 3])
def test_is_the_eager_executor_on_the_gpu(count: int | None) -> None:
    trunk, sampler = DiffusionTransformerTrunk(trunk_of(SMALL)._network.to("cuda")), ddpm(PROCESS)
    for batch in (1, 3, 1):
        observation, noise = inputs(SMALL, batch, 9, batch)
        observation, noise = observation.cuda(), ChunkNoise(noise.initial.cuda(), noise.steps.cuda())
        committed = None if count is None else Committed(torch.full((batch, count, 2), 0.5, device="cuda"), 1)
        plan = optimise(lower(grouped(random_schedule(batch, 9, trunk.blocks))))
        expected = EagerExecutor(plan, trunk, sampler)(observation, noise, committed)
        chunk = CudaGraphExecutor(plan, trunk, sampler)(observation, noise, committed)
        torch.testing.assert_close(chunk, expected, rtol=0, atol=TOLERANCE)
