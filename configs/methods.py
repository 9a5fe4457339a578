"""Typed configuration of the caching methods: one schema per YAML file of ``configs/cache``."""

from __future__ import annotations

from dataclasses import dataclass

from bac.choices import choice
from bac.methods import (
    AdamsBashforth,
    BlockAdaptive,
    Downstream,
    IntervalScore,
    LastStep,
    Late,
    Method,
    NoCache,
    Objective,
    ProfilingDit,
    Search,
    SensitivityWeighted,
    Sharing,
    SkipCache,
    TaylorSeer,
    Uniform,
)
from bac.profile import Metric


@dataclass(kw_only=True, slots=True)
class NoCacheConfig:
    """Every block at every step."""

    def build(self) -> Method:
        """Return the method."""
        return NoCache()


@dataclass(kw_only=True, slots=True)
class UniformConfig:
    """See ``bac.methods.Uniform``."""

    updates: int
    last_step: str

    def build(self) -> Method:
        """Return the method."""
        return Uniform(self.updates, choice("cache.last_step", self.last_step, LastStep))


@dataclass(kw_only=True, slots=True)
class BacConfig:
    """See ``bac.methods.BlockAdaptive``."""

    updates: int
    upstream_blocks: int
    metric: str
    score: str
    downstream: str
    last_step: str

    def build(self) -> Method:
        """Return the method."""
        return BlockAdaptive(
            updates=self.updates,
            upstream_blocks=self.upstream_blocks,
            metric=choice("cache.metric", self.metric, Metric),
            score=choice("cache.score", self.score, IntervalScore),
            downstream=choice("cache.downstream", self.downstream, Downstream),
            last_step=choice("cache.last_step", self.last_step, LastStep),
        )


@dataclass(kw_only=True, slots=True)
class LateConfig:
    """See ``bac.methods.Late``."""

    updates: int
    power: float
    last_step: str

    def build(self) -> Method:
        """Return the method."""
        return Late(self.updates, self.power, choice("cache.last_step", self.last_step, LastStep))


@dataclass(kw_only=True, slots=True)
class BacWeightedConfig:
    """See ``bac.methods.SensitivityWeighted``."""

    updates: int
    sharing: str
    upstream_blocks: int
    downstream: str
    last_step: str

    def build(self) -> Method:
        """Return the method."""
        return SensitivityWeighted(
            updates=self.updates,
            sharing=choice("cache.sharing", self.sharing, Sharing),
            upstream_blocks=self.upstream_blocks,
            downstream=choice("cache.downstream", self.downstream, Downstream),
            last_step=choice("cache.last_step", self.last_step, LastStep),
        )


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """See ``bac.methods.Search``."""

    gflops: float
    trials: int
    objective: str
    seed: int
    last_step: str

    def build(self) -> Method:
        """Return the method."""
        return Search(
            gflops=self.gflops,
            trials=self.trials,
            objective=choice("cache.objective", self.objective, Objective),
            seed=self.seed,
            last_step=choice("cache.last_step", self.last_step, LastStep),
        )


@dataclass(kw_only=True, slots=True)
class TaylorSeerConfig:
    """See ``bac.methods.TaylorSeer``."""

    updates: int
    order: int
    first_steps: int
    last_step: str

    def build(self) -> Method:
        """Return the method."""
        last_step = choice("cache.last_step", self.last_step, LastStep)
        return TaylorSeer(self.updates, self.order, self.first_steps, last_step)


@dataclass(kw_only=True, slots=True)
class AbCacheConfig:
    """See ``bac.methods.AdamsBashforth``."""

    updates: int
    slopes: int
    last_step: str

    def build(self) -> Method:
        """Return the method."""
        return AdamsBashforth(self.updates, self.slopes, choice("cache.last_step", self.last_step, LastStep))


@dataclass(kw_only=True, slots=True)
class SkipCacheConfig:
    """See ``bac.methods.SkipCache``."""

    updates: int
    last_step: str

    def build(self) -> Method:
        """Return the method."""
        return SkipCache(self.updates, choice("cache.last_step", self.last_step, LastStep))


@dataclass(kw_only=True, slots=True)
class ProfilingDitConfig:
    """See ``bac.methods.ProfilingDit``."""

    updates: int
    cached_layers: int
    last_step: str

    def build(self) -> Method:
        """Return the method."""
        return ProfilingDit(self.updates, self.cached_layers, choice("cache.last_step", self.last_step, LastStep))


METHODS: dict[str, type] = {
    "none": NoCacheConfig,
    "uniform": UniformConfig,
    "bac": BacConfig,
    "late": LateConfig,
    "bac_weighted": BacWeightedConfig,
    "taylorseer": TaylorSeerConfig,
    "ab_cache": AbCacheConfig,
    "skip_cache": SkipCacheConfig,
    "profilingdit": ProfilingDitConfig,
    "search": SearchConfig,
}
"""The choices of ``cache=``."""
