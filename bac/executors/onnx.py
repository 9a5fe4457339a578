"""ONNX executor: the chunk as one graph in onnxruntime, mostly to prove what ``scripts/export.py`` writes."""

from __future__ import annotations

import torch
from torch import Tensor

from bac.errors import TooLarge, Unavailable, sentence
from bac.executors.base import ChunkNoise
from bac.executors.committed import Committed
from bac.onnx_graph import onnx_graph
from bac.plan import Plan
from bac.sampler_table import SamplerTable
from bac.trunk import ResidualTrunk

_MOST_NODES = 10_000
"""onnxruntime keeps a few kilobytes per node: more would break an executor's bound, weights x 2 + 64 MB."""


class OnnxExecutor:
    """Runs a plan in onnxruntime on the CPU. Safe to call from several threads at once, as its sessions are.

    Plans of many updates are refused: their unrolled graphs, which ``scripts/export.py`` writes all the same, take more
    memory than an executor may, and many seconds to start.

    Args:
        plan: operations per step.
        trunk: the weights, of the plain form that ``bac.decoder`` describes; shared with the session.
        sampler: K steps, as many as the plan.

    Raises:
        Mismatch: plan, trunk and sampler do not belong together.
        Unavailable: onnx or onnxruntime is missing, or a trunk of another form.
        TooLarge: a graph of too many nodes.
    """

    def __init__(self, plan: Plan, trunk: ResidualTrunk, sampler: SamplerTable) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise Unavailable(
                sentence(
                    "executor onnx",
                    expected="the package onnxruntime",
                    got="none",
                    mend="pip install 'onnx' 'onnxruntime', or use executor=compiled",
                )
            ) from error
        graph = onnx_graph(plan, trunk, sampler)
        if len(graph.model.graph.node) > _MOST_NODES:
            raise TooLarge(
                sentence(
                    "executor onnx",
                    expected=f"a graph of at most {_MOST_NODES} nodes",
                    got=len(graph.model.graph.node),
                    mend="use executor=compiled, or fewer updates",
                )
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # The first call says what stands for the weights that the graph leaves out, the second that they need no copy.
        self._weights = {name: onnxruntime.OrtValue.ortvalue_from_numpy(each) for name, each in graph.weights.items()}
        options.add_external_initializers(list(self._weights), list(self._weights.values()))
        for name, value in self._weights.items():
            options.add_initializer(name, value)
        self.plan = plan
        self._steps = sampler.steps
        self._shape = graph.chunk_shape
        content = graph.model.SerializeToString()
        del graph  # as large as the session itself
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def __call__(self, observation: Tensor, noise: ChunkNoise, committed: Committed | None = None) -> Tensor:
        """Return the normalised action chunk float32[B, T, Da] for normalised observations float32[B, To, Do].

        Raises:
            Unavailable: there are committed actions; the graph has no input for them.
        """
        if committed is not None and committed.count:
            raise Unavailable(
                sentence(
                    "executor onnx",
                    expected="no committed actions",
                    got=committed.count,
                    mend="use executor=compiled, or another seam than inpaint",
                )
            )
        noise.require(observation.shape[0], self._steps)
        noise.require_float32(*self._shape)
        inputs = {"observation": observation, "initial_noise": noise.initial, "step_noise": noise.steps}
        (chunk,) = self._session.run(["chunk"], {name: values.numpy() for name, values in inputs.items()})
        return torch.from_numpy(chunk)
