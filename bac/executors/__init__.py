"""Executors: a plan bound to weights, sampler table and device. One call, one action chunk."""

from bac.executors.base import ChunkNoise, Executor
from bac.executors.eager import EagerExecutor
from bac.executors.hooks import CacheHooks, SiteTable

__all__ = ["CacheHooks", "ChunkNoise", "EagerExecutor", "Executor", "SiteTable"]
