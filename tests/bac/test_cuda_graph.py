"""The CUDA graph executor: what may be captured, and that it is the eager executor where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_executor_contract import (
    PROCESS,
    SMALL,
    TOLERANCE,
    graphed,
    grouped,
    inputs,
    plan_for,
    record_on_cpu,
    trunk_of,
)
from toys import NoHostReads, random_schedule

from bac.decoder import visible_prefix
from bac.errors import InvalidInput
from bac.executors import ChunkNoise, Committed, CudaGraphExecutor, EagerExecutor
from bac.executors.cuda_graph import record_cuda_graph
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


class FakeStream:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waited: list[torch.device] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other.device)


class FakeCuda:
    """Two devices, of which each thread of work has a current one and a current stream, as torch.cuda has them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = torch.device("cuda:0")
        self.streams = [FakeStream(torch.device("cuda", index)) for index in range(2)]
        self.captured: list[FakeStream] = []
        monkeypatch.setattr(torch.cuda, "device", self._device)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: FakeStream(device or self.current))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device=None: self.streams[(device or self.current).index]
        )
        monkeypatch.setattr(torch.cuda, "stream", self._stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", self._graph)

    @contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    @contextmanager
    def _stream(self, stream: FakeStream) -> Iterator[None]:
        with self._device(stream.device):
            yield

    @contextmanager
    def _graph(self, graph: FakeGraph, stream: FakeStream | None = None) -> Iterator[None]:
        # What is not told a stream takes the one that the process captured on first.
        self.captured.append(stream or self.streams[0])
        yield


class FakeGraph:
    def replay(self) -> None: ...


def test_a_capture_is_of_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, met = FakeCuda(monkeypatch), []
    second = torch.device("cuda:1")
    record_cuda_graph(lambda: met.append(cuda.current) or torch.zeros(1), second)
    assert met == [second] * 4
    (stream,) = cuda.captured
    assert (stream.device, stream.waited, cuda.streams[1].waited) == (second, [second], [second])
    assert (cuda.streams[0].waited, cuda.current) == ([], torch.device("cuda:0"))


def counting(recorded: list[int]) -> Callable[..., Any]:
    """Return a recorder that notes the batch size of everything it records."""

    def record(run: Callable[[], torch.Tensor], device: torch.device) -> Any:
        chunk, replay = record_on_cpu(run, device)
        recorded.append(len(chunk))
        return chunk, replay

    return record


def test_the_latest_recordings_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bac.executors.cuda_graph._MOST_RECORDINGS", 2)
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    plan, recorded = plan_for(trunk, sampler, 0), []
    execute = CudaGraphExecutor(plan, trunk, sampler, counting(recorded))
    eager = EagerExecutor(plan, trunk, sampler)
    for batch in (3, 2, 3, 1, 3, 2):
        call = inputs(SMALL, batch, 9, batch)
        assert torch.equal(execute(*call), eager(*call))
    # 2 went for 1, since 3 had been used after it.
    assert recorded == [3, 2, 1, 2]
    assert len(execute._recordings) == 2


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU: nothing on the host goes with it until it is brought there."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.Tensor.cpu:
                return args[0].as_subclass(torch.Tensor).clone()
            if any(type(each) is torch.Tensor for each in args):
                raise RuntimeError(f"Expected all tensors to be on the same device: {function}")
            result = function(*args, **(kwargs or {}))
            return result.as_subclass(cls) if isinstance(result, torch.Tensor) else result


def test_a_mask_on_a_device_is_read() -> None:
    mask = torch.full((3, 4), -torch.inf).triu(2)
    assert visible_prefix(mask.as_subclass(OnDevice)) == visible_prefix(mask) == (2, 3, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_mask_on_the_gpu_is_read() -> None:
    assert visible_prefix(torch.full((3, 4), -torch.inf, device="cuda").triu(2)) == (2, 3, 4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
def test_every_call_on_a_second_gpu_is_computed() -> None:
    trunk, sampler = DiffusionTransformerTrunk(trunk_of(SMALL)._network.to("cuda:1")), ddpm(PROCESS)
    plan = plan_for(trunk, sampler, 0)
    execute, eager = CudaGraphExecutor(plan, trunk, sampler), EagerExecutor(plan, trunk, sampler)
    for seed in range(3):
        observation, noise = inputs(SMALL, 1, 9, seed)
        call = observation.to("cuda:1"), ChunkNoise(noise.initial.to("cuda:1"), noise.steps.to("cuda:1"))
        torch.testing.assert_close(execute(*call), eager(*call), rtol=0, atol=TOLERANCE)


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
