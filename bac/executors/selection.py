"""Which executor runs a plan: the one asked for, or the best this machine has."""

from __future__ import annotations

from dataclasses import dataclass

from bac.choices import Choice, choice
from bac.errors import InvalidInput, Unavailable, sentence
from bac.executors.base import Executor
from bac.executors.compiled import CompiledExecutor, WeightType, compile_for
from bac.executors.cuda_graph import CudaGraphExecutor
from bac.executors.eager import EagerExecutor
from bac.executors.onnx import OnnxExecutor
from bac.plan import Plan
from bac.sampler_table import SamplerTable
from bac.trunk import ResidualTrunk


class ExecutorKind(Choice):
    """The executors by name; ``auto`` is ``cuda_graph`` on a GPU, else ``compiled``, else ``eager``."""

    AUTO = "auto"
    EAGER = "eager"
    COMPILED = "compiled"
    CUDA_GRAPH = "cuda_graph"
    ONNX = "onnx"


@dataclass(frozen=True)
class Selection:
    """An executor that is known to work for a trunk.

    Attributes:
        kind: which one; never ``auto``.
        weights: how it stores weights.
        because: why ``auto`` did not take its first choice, or None.
    """

    kind: ExecutorKind
    weights: WeightType = WeightType.FP32
    because: str | None = None

    def build(self, plan: Plan, trunk: ResidualTrunk, sampler: SamplerTable) -> Executor:
        """Bind a plan."""
        match self.kind:
            case ExecutorKind.COMPILED:
                return CompiledExecutor(plan, trunk, sampler, self.weights)
            case ExecutorKind.CUDA_GRAPH:
                return CudaGraphExecutor(plan, trunk, sampler)
            case ExecutorKind.ONNX:
                return OnnxExecutor(plan, trunk, sampler)
            case _:
                return EagerExecutor(plan, trunk, sampler)

    def to_json(self) -> dict[str, str | None]:
        """Return what a result says of its executor."""
        return {"kind": self.kind, "weights": self.weights, "because": self.because}


def select(kind: ExecutorKind | str, trunk: ResidualTrunk, weights: WeightType | str = WeightType.FP32) -> Selection:
    """Find out what works, before anything is built.

    Raises:
        InvalidInput: no such executor or weight type, or an executor that does not store weights in that way.
        Unavailable: asked for by name, and this machine or this trunk does not have it.
    """
    kind, weights = choice("executor", kind, ExecutorKind), choice("executor weights", weights, WeightType)
    on_gpu = trunk.device.type == "cuda"
    if weights is not WeightType.FP32 and (on_gpu or kind not in {ExecutorKind.AUTO, ExecutorKind.COMPILED}):
        raise InvalidInput(
            sentence(
                "executor weights",
                expected=f"fp32 for executor {kind} on {trunk.device}",
                got=weights,
                mend="use executor=compiled on the CPU, or executor.weights=fp32",
            )
        )
    if kind is ExecutorKind.AUTO and on_gpu:
        return Selection(ExecutorKind.CUDA_GRAPH)
    if kind is ExecutorKind.CUDA_GRAPH and not on_gpu:
        raise Unavailable(
            sentence("executor cuda_graph", expected="a CUDA device", got=trunk.device, mend="use executor=compiled")
        )
    if kind is ExecutorKind.ONNX and on_gpu:
        raise Unavailable(sentence("executor onnx", expected="a CPU", got=trunk.device, mend="use executor=cuda_graph"))
    if kind in {ExecutorKind.AUTO, ExecutorKind.COMPILED}:
        try:
            compile_for(trunk, weights)
        except Unavailable as reason:
            # A float32 answer to a question about another type would be another answer.
            if kind is ExecutorKind.COMPILED or weights is not WeightType.FP32:
                raise
            return Selection(ExecutorKind.EAGER, because=str(reason))
        return Selection(ExecutorKind.COMPILED, weights)
    return Selection(kind)
