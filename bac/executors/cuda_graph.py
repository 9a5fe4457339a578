"""CUDA graph executor: the whole denoising loop, sampler arithmetic included, replayed as one graph.

Captured from the eager executor's own operations, so it needs neither Triton nor a compiler and runs on a Jetson. One
graph per batch size; inputs are copied into buffers of fixed address, the loop never meets the host.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bac.executors.base import ChunkNoise
from bac.executors.committed import Committed
from bac.executors.eager import EagerExecutor
from bac.plan import Plan
from bac.sampler_table import SamplerTable
from bac.trunk import ResidualTrunk

_WARMUP_CALLS = 3
_MOST_RECORDINGS = 16
"""A robot's committed actions are none to 15 of its one row; each batch of a rollout that shrinks comes only once."""

Recorder = Callable[[Callable[[], Tensor], torch.device], tuple[Tensor, Callable[[], object]]]
"""Runs a function of a device once; returns its result and what computes it again into the same memory."""


def record_cuda_graph(run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], object]]:
    """Capture ``run`` as a CUDA graph of ``device``, where all its tensors are."""
    with torch.cuda.device(device):
        # Libraries choose kernels and allocate workspaces at their first calls, which must not be captured.
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARMUP_CALLS):
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Left to itself, torch captures on one stream per process, that of whatever device came first.
        with torch.cuda.graph(graph, stream=side):
            result = run()
    return result, graph.replay


@dataclass(frozen=True)
class _Recording:
    """Fixed buffers and what recomputes ``chunk`` from the others."""

    observation: Tensor
    noise: ChunkNoise
    committed: Committed | None
    chunk: Tensor
    replay: Callable[[], object]


class CudaGraphExecutor:
    """Runs a plan on a CUDA device. Calls from several threads take turns: they share buffers.

    The graphs of the latest 16 kinds of call are kept, each with the memory of its batch.

    Args:
        plan: operations per step.
        trunk: the weights; the graph reads them in place.
        sampler: K steps, as many as the plan.
        record: how a batch size is captured, at its first call.

    Raises:
        Mismatch: plan, trunk and sampler do not belong together.
    """

    def __init__(
        self, plan: Plan, trunk: ResidualTrunk, sampler: SamplerTable, record: Recorder = record_cuda_graph
    ) -> None:
        self.plan = plan
        self._trunk = trunk
        self._eager = EagerExecutor(plan, trunk, sampler)
        self._steps = sampler.steps
        self._record = record
        self._recordings: OrderedDict[tuple[torch.Size, torch.Size, int, int], _Recording] = OrderedDict()
        self._turn = threading.Lock()

    @torch.inference_mode()
    def __call__(self, observation: Tensor, noise: ChunkNoise, committed: Committed | None = None) -> Tensor:
        """Return the normalised action chunk float32[B, T, Da] for normalised observations float32[B, To, Do].

        The graph is of one number and place of committed actions, too: each asks for a recording of its own.
        """
        noise.require(observation.shape[0], self._steps)
        if committed is not None:
            committed.require(noise)
        place = slice(0) if committed is None else committed.place
        shapes = observation.shape, noise.initial.shape, place.start, place.stop
        with self._turn:
            if shapes not in self._recordings:
                if len(self._recordings) == _MOST_RECORDINGS:
                    self._recordings.popitem(last=False)
                self._recordings[shapes] = self._recorded(
                    observation.clone(),
                    noise.initial.clone(),
                    noise.steps.clone(),
                    None if committed is None else Committed(committed.actions.clone(), committed.first),
                )
            self._recordings.move_to_end(shapes)
            recording = self._recordings[shapes]
            recording.observation.copy_(observation)
            recording.noise.initial.copy_(noise.initial)
            recording.noise.steps.copy_(noise.steps)
            if committed is not None and recording.committed is not None:
                recording.committed.actions.copy_(committed.actions)
            recording.replay()
            return recording.chunk.clone()

    def _recorded(self, observation: Tensor, initial: Tensor, steps: Tensor, committed: Committed | None) -> _Recording:
        noise = ChunkNoise(initial, steps)
        chunk, replay = self._record(
            lambda: self._eager.denoise(self._trunk.condition(observation), noise, committed), observation.device
        )
        return _Recording(observation, noise, committed, chunk, replay)
