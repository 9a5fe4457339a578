"""Honest latency: warm-up apart, calls interleaved, clocks read after a device sync, percentiles with units."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bac.errors import InvalidInput, sentence

_FEWEST = 3
"""Calls that a time limit leaves."""


@dataclass(frozen=True)
class Latency:
    """Latency of repeated calls.

    Attributes:
        p50_ms, p99_ms, mean_ms: over the timed calls, milliseconds.
        warmup_s: duration of the warm-up calls, seconds; not part of the others.
        calls: number of timed calls.
    """

    p50_ms: float
    p99_ms: float
    mean_ms: float
    warmup_s: float
    calls: int

    def to_json(self) -> dict[str, float]:
        """Return the milliseconds under short names, for results that say ``latency_ms``."""
        return {
            "p50": self.p50_ms,
            "p99": self.p99_ms,
            "mean": self.mean_ms,
            "warmup_s": self.warmup_s,
            "calls": self.calls,
        }


def measure_interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    calls: int,
    warmup: int = 2,
    limit_s: float | None = None,
    synchronise: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    on_call: Callable[[], object] = lambda: None,
) -> dict[str, Latency]:
    """Time several callables in turn, round by round, so that a drift of the machine hits all of them alike.

    Args:
        candidates: name -> what to call.
        calls: timed calls of each, at least 1.
        warmup: untimed calls of each before the first round.
        limit_s: seconds after which no further round begins once there were a few; ``Latency.calls`` says how many.
        synchronise: waits until the device is done; called before every reading of the clock.
        clock: seconds, monotonic.
        on_call: called after every timed call, while no clock runs; for progress bars.
    """
    _require_calls(calls)

    def reading() -> float:
        synchronise()
        return clock()

    warmups = {}
    for name, call in candidates.items():
        start = reading()
        for _ in range(warmup):
            call()
        warmups[name] = reading() - start
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for done in range(calls):
        spent = sum(map(sum, seconds.values()))
        if limit_s is not None and done >= _FEWEST and spent > limit_s:
            break
        for name, call in candidates.items():
            start = reading()
            call()
            seconds[name].append(reading() - start)
            on_call()
    return {name: _latency(np.array(taken), warmups[name]) for name, taken in seconds.items()}


def measure_stages(
    stages: Mapping[str, Callable[[Any], Any]],
    value: Any,
    *,
    calls: int,
    warmup: int = 2,
    synchronise: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time a pipeline stage by stage; the stages of one call add up to that call.

    Args:
        stages: name -> function of what the stage before it gave, in order.
        value: what the first stage takes.
        calls: timed runs of the whole pipeline, at least 1.
        warmup: untimed runs before them.
        synchronise: waits until the device is done; called before every reading of the clock.
        clock: seconds, monotonic.

    Returns:
        One entry per stage, and ``total``.
    """
    _require_calls(calls)
    seconds = np.empty((warmup + calls, len(stages)))
    for row in seconds:
        passed = value
        synchronise()
        before = clock()
        for number, stage in enumerate(stages.values()):
            passed = stage(passed)
            synchronise()
            now = clock()
            row[number], before = now - before, now
    columns = dict(zip(stages, seconds.T, strict=True)) | {"total": seconds.sum(axis=1)}
    return {name: _latency(taken[warmup:], float(taken[:warmup].sum())) for name, taken in columns.items()}


def device_synchroniser(device: torch.device) -> Callable[[], object]:
    """Return what waits for ``device``; on a CPU nothing does."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None


def _require_calls(calls: int) -> None:
    if calls < 1:
        raise InvalidInput(sentence("latency calls", expected="at least 1", got=calls, mend="time more calls"))


def _latency(seconds: np.ndarray, warmup_s: float) -> Latency:
    p50, p99 = np.percentile(seconds * 1e3, [50, 99])
    return Latency(float(p50), float(p99), float(seconds.mean() * 1e3), warmup_s, len(seconds))
