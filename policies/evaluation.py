"""What caching costs and saves, measured on two policies that differ by their denoiser alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bac.methods import full_schedule
from bac.plan import schedule_cost
from bac.schedule import CacheSchedule
from bac.timing import device_synchroniser, measure_interleaved
from policies.diffusion_policy import DiffusionPolicy


def action_errors(
    policy: DiffusionPolicy, reference: DiffusionPolicy, observation: Mapping[str, np.ndarray], batch: int = 32
) -> np.ndarray:
    """Return float64[N]: per observation, the mean absolute difference of the executed actions, normalised units.

    Normalised actions span [-1, 1] over the demonstrations. Both policies get the same noise.

    Args:
        policy: what is judged.
        reference: what it is compared to, with the same sampler.
        observation: key -> float32[N, To, channels], task units.
        batch: observations in one call.
    """
    observed = policy.observe(observation)
    errors = []
    for start in range(0, len(observed), batch):
        rows = observed[start : start + batch]
        noise = policy.draw_noise(len(rows), [(start + row, 0) for row in range(len(rows))])
        chunk, expected = (each.denoiser(rows, noise)[:, policy.spec.executed] for each in (policy, reference))
        errors.append((chunk.double() - expected.double()).abs().mean(dim=(1, 2)).cpu().numpy())
    return np.concatenate(errors)


def latency_and_flops(
    cached: DiffusionPolicy,
    schedule: CacheSchedule,
    uncached: DiffusionPolicy,
    observation: Mapping[str, np.ndarray],
    calls: int,
) -> dict[str, Any]:
    """Time ``predict`` of both in turn, and count their FLOPs.

    Args:
        cached: the accelerated policy.
        schedule: what it runs.
        uncached: the same policy, nothing cached.
        observation: what ``predict`` takes; its batch is the batch that is timed.
        calls: timed calls of each.

    Returns:
        JSON values: ``latency_ms.{cached,uncached}.{p50,p99,..}``, ``speedup`` (uncached p50 / cached p50),
        ``control_rate_hz`` (chunks per second at p99), ``gflops`` and, apart, ``gflops_hoisted`` per chunk at batch 1.
    """
    both = {"cached": cached, "uncached": uncached}
    latency = measure_interleaved(
        {name: lambda policy=policy: policy.predict(observation) for name, policy in both.items()},  # type: ignore[misc]
        calls=calls,
        synchronise=device_synchroniser(cached.trunk.device),
    )
    full = full_schedule(schedule.blocks, schedule.steps, schedule.provenance)
    flops = {
        name: schedule_cost(each, cached.trunk.cost) for name, each in {"cached": schedule, "uncached": full}.items()
    }
    return {
        "latency_ms": {name: each.to_json() for name, each in latency.items()},
        "speedup": latency["uncached"].p50_ms / latency["cached"].p50_ms,
        "control_rate_hz": {name: 1e3 / each.p99_ms for name, each in latency.items()},
        "gflops": {name: each.planned / 1e9 for name, each in flops.items()},
        "gflops_hoisted": {name: each.hoisted / 1e9 for name, each in flops.items()},
    }
