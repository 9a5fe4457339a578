"""Executors: a plan bound to weights, sampler table and device. One call, one action chunk."""

from bac.executors.base import ChunkNoise, Executor
from bac.executors.committed import Committed
from bac.executors.compiled import CompiledExecutor, WeightType
from bac.executors.cross_chunk import CrossChunkExecutor
from bac.executors.cuda_graph import CudaGraphExecutor
from bac.executors.eager import EagerExecutor
from bac.executors.hooks import CacheHooks, SiteTable
from bac.executors.onnx import OnnxExecutor
from bac.executors.selection import ExecutorKind, Selection, select

__all__ = [
    "CacheHooks",
    "ChunkNoise",
    "Committed",
    "CompiledExecutor",
    "CrossChunkExecutor",
    "CudaGraphExecutor",
    "EagerExecutor",
    "Executor",
    "ExecutorKind",
    "OnnxExecutor",
    "Selection",
    "SiteTable",
    "WeightType",
    "select",
]
