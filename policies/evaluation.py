"""What caching costs and saves, measured on two policies that differ by their denoiser alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from bac.methods import full_schedule
from bac.plan import schedule_cost
from bac.schedule import CacheSchedule
from bac.timing import device_synchroniser, measure_interleaved
from policies.diffusion_policy import DiffusionPolicy


def action_errors(
    policy: DiffusionPolicy,
    reference: DiffusionPolicy,
    observation: Mapping[str, np.ndarray],
    batch: int = 32,
    before: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Return float64[N]: per observation, the mean absolute difference of the executed actions, normalised units.

    Normalised actions span [-1, 1] over the demonstrations. Both policies get the same noise.

    Args:
        policy: what is judged.
        reference: what it is compared to, with the same sampler.
        observation: key -> float32[N, To, channels], task units.
        batch: observations in one call.
        before: what was observed a chunk earlier; where it is given, ``policy`` first decides on this, and the chunks
            compared are the second ones of their episodes.
    """
    observed = policy.observe(observation)
    earlier = None if before is None else policy.observe(before)
    errors = []
    for start in range(0, len(observed), batch):
        rows = observed[start : start + batch]
        episodes = range(start, start + len(rows))
        if earlier is not None:
            first = policy.draw_noise(len(rows), [(episode, 0) for episode in episodes])
            policy.denoiser(earlier[start : start + batch], first)
        noise = policy.draw_noise(len(rows), [(episode, 0 if earlier is None else 1) for episode in episodes])
        chunk, expected = (each.denoiser(rows, noise)[:, policy.spec.executed] for each in (policy, reference))
        errors.append((chunk.double() - expected.double()).abs().mean(dim=(1, 2)).cpu().numpy())
    return np.concatenate(errors)


def latency_and_flops(
    cached: DiffusionPolicy,
    schedule: CacheSchedule,
    uncached: DiffusionPolicy,
    observation: Mapping[str, np.ndarray],
    calls: int,
    on_call: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Time ``predict`` of both in turn, and count their FLOPs.

    Args:
        cached: the accelerated policy.
        schedule: what it runs.
        uncached: the same policy, nothing cached.
        observation: what ``predict`` takes; its batch is the batch that is timed.
        calls: timed calls of each.
        on_call: called after every timed call, while no clock runs.

    Returns:
        JSON values: ``latency_ms.{cached,uncached}.{p50,p99,..}``, ``speedup`` (uncached p50 / cached p50),
        ``control_rate_hz`` (chunks per second at p99), ``gflops`` and, apart, ``gflops_hoisted`` per chunk at batch 1.
        Of an image policy also ``latency_ms.encoder`` and ``gflops.encoder``: the part of either side's chunk from
        images to observation tokens, which caching leaves as it is.
    """
    both = {"cached": cached, "uncached": uncached}
    candidates: dict[str, Callable[[], object]] = {
        name: _calls(policy, schedule, observation) for name, policy in both.items()
    }
    if cached.spec.vision is not None:
        candidates["encoder"] = partial(cached.observe, observation)
    latency = measure_interleaved(
        candidates,
        calls=calls,
        synchronise=device_synchroniser(cached.trunk.device),
        on_call=on_call,
    )
    full = full_schedule(schedule.blocks, schedule.steps, schedule.provenance)
    flops = {
        name: schedule_cost(each, cached.trunk.cost) for name, each in {"cached": schedule, "uncached": full}.items()
    }
    gflops = {name: each.planned / 1e9 for name, each in flops.items()}
    if cached.spec.vision is not None:
        gflops["encoder"] = _encoder_gflops(cached, observation)
    return {
        "latency_ms": {name: each.to_json() for name, each in latency.items()},
        "speedup": latency["uncached"].p50_ms / latency["cached"].p50_ms,
        "control_rate_hz": {name: 1e3 / latency[name].p99_ms for name in both},
        "gflops": gflops,
        "gflops_hoisted": {name: each.hoisted / 1e9 for name, each in flops.items()},
    }


def _encoder_gflops(policy: DiffusionPolicy, observation: Mapping[str, np.ndarray]) -> float:
    """Count the encoder's matrix products and convolutions per chunk at batch 1, as those of the plan are counted."""
    with FlopCounterMode(display=False) as counter:
        rows = len(policy.observe(observation))
    return float(counter.get_total_flops()) / rows / 1e9


def _calls(
    policy: DiffusionPolicy, schedule: CacheSchedule, observation: Mapping[str, np.ndarray]
) -> Callable[[], np.ndarray]:
    """Return what calls ``predict``, each time as an episode's next chunk if the schedule recalls the one before."""
    if schedule.recall is None:
        return lambda: policy.predict(observation)
    rows, numbers = len(next(iter(observation.values()))), count()

    def call() -> np.ndarray:
        number = next(numbers)
        return policy.predict(observation, [(row, number) for row in range(rows)])

    return call
