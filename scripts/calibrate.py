"""Measure how a policy's features change and make its cache schedules: ``python scripts/calibrate.py task=push_t``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from studies.bank import calibrate_bank
from torch import Tensor
from tqdm import tqdm

from bac.errors import InvalidInput, sentence
from bac.executors import ChunkNoise
from bac.methods import BlockAdaptive, HarmoniCa, Method, NoCache, Search
from bac.methods.base import ByUpdates, require_updates
from bac.pictures import gate_map, save_figure, schedule_grid, sensitivity_curve, similarity_maps
from bac.plan import schedule_cost
from bac.profile import FeatureProfile, Metric
from bac.profiler import profile_features
from bac.results import run_provenance, write_results
from bac.router import train_router
from bac.schedule import CacheSchedule
from bac.sensitivity import step_sensitivity
from bac.trials import Trials
from configs.entry import script
from configs.schema import CalibrateConfig
from configs.tasks import demonstrations
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import load_policy, locate_checkpoint, profile_path, schedule_folder

Batches = list[tuple[Tensor, ChunkNoise]]


def main(config: CalibrateConfig, folder: Path) -> None:
    """Write profile and schedules beside the checkpoint, pictures and JSON into ``folder``."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.bank:
        calibrate_bank(config, folder)
        return
    method = config.cache.build()
    if isinstance(method, NoCache):
        raise InvalidInput(sentence("cache", expected="a method", got=method.name, mend="none needs no calibration"))
    checkpoint = locate_checkpoint(config.checkpoint or config.task.name)
    policy = load_policy(checkpoint, sampler=config.sampler.build, device=config.device)
    methods = {each.label: each for each in (method, *map(method.with_budget, config.budgets))}
    for each in methods.values():
        if isinstance(each, ByUpdates):
            require_updates(each.updates, policy.sampler.steps)
    if isinstance(method, Search):
        schedules = _search(config, policy, methods, profile_path(checkpoint, policy.sampler))
        found: dict[str, Any] = {}
    else:
        profile = _profile(config, policy, method, profile_path(checkpoint, policy.sampler))
        schedules = {label: each.schedule(profile) for label, each in methods.items()}
        _draw(profile, method, schedules[method.label], folder)
        found = _profile_summary(profile)
    for label, schedule in schedules.items():
        schedule.save(schedule_folder(checkpoint, policy.sampler) / f"{label}.json")
    chosen = schedules[method.label]
    print(chosen.grid())
    save_figure(schedule_grid(chosen), folder / "schedule.png")
    results = {
        **found,
        "schedules": {label: _summary(schedule, policy) for label, schedule in schedules.items()},
        "provenance": run_provenance(torch.device(config.device), asdict(config)),
    }
    write_results(folder / "results.json", results)
    print(f"wrote {', '.join(schedules)} to {schedule_folder(checkpoint, policy.sampler)}; pictures in {folder}")


def _profile(config: CalibrateConfig, policy: DiffusionPolicy, method: Method, path: Path) -> FeatureProfile:
    """Return what the method needs to know, kept in ``path``: measured, or with ``config.reuse`` what is missing."""
    profile = FeatureProfile.load(path) if config.reuse else _features(config, policy)
    profile.provenance.require(policy.provenance, "feature profile")
    if profile.sensitivity is None and config.sensitivity_observations:
        profile = replace(profile, sensitivity=_sensitivity(config, policy))
    if profile.gates is None and isinstance(method, HarmoniCa):
        profile = replace(profile, gates=_gates(config, policy))
    profile.save(path)
    print(f"wrote {path}")
    return profile


def _features(config: CalibrateConfig, policy: DiffusionPolicy) -> FeatureProfile:
    batches = _batches(config, policy, config.observations)
    with tqdm(total=len(batches), desc="features", unit="batch") as bar:
        return profile_features(policy.trunk, policy.sampler, policy.provenance, batches, lambda _: bar.update())


def _sensitivity(config: CalibrateConfig, policy: DiffusionPolicy) -> np.ndarray:
    batches = _batches(replace(config, batch=1), policy, config.sensitivity_observations)
    with tqdm(total=len(batches), desc="sensitivity", unit="observation") as bar:
        return step_sensitivity(
            policy.trunk, policy.sampler, batches, policy.spec.executed, config.seed, lambda _: bar.update()
        )


def _gates(config: CalibrateConfig, policy: DiffusionPolicy) -> np.ndarray:
    batches = _batches(replace(config, batch=config.router_batch), policy, config.router_observations)
    with tqdm(total=config.router_iterations, desc="router", unit="rollout") as bar:

        def report(error: float, share: float) -> None:
            bar.set_postfix_str(f"action error {error:.4f} (rms) at {share:.0%} of the FLOPs")
            bar.update()

        return train_router(
            policy.trunk,
            policy.sampler,
            batches,
            policy.spec.executed,
            iterations=config.router_iterations,
            penalty=config.router_penalty,
            seed=config.seed,
            on_iteration=report,
        )


def _search(
    config: CalibrateConfig, policy: DiffusionPolicy, methods: dict[str, Method], measured: Path
) -> dict[str, CacheSchedule]:
    profile = FeatureProfile.load(measured) if measured.is_file() else None
    if profile is not None:
        profile.provenance.require(policy.provenance, "feature profile")
    ((observed, noise),) = _batches(replace(config, batch=config.trial_observations), policy, config.trial_observations)
    trials = Trials(policy.trunk, policy.sampler, policy.provenance, observed, noise, policy.spec.executed)
    schedules = {}
    for label, method in methods.items():
        assert isinstance(method, Search)
        with tqdm(total=method.trials, desc=label, unit="trial") as bar:

            def report(best: float, bar: Any = bar) -> None:
                bar.set_postfix_str(f"action error {best:.4f}")
                bar.update()

            schedules[label] = method.find(trials, profile, report)
    return schedules


def _batches(config: CalibrateConfig, policy: DiffusionPolicy, observations: int) -> Batches:
    """Return normalised observations from all over the demonstrations, with noise, in batches."""
    spread = demonstrations(config.task).spread_observations(observations, policy.observation_steps, config.seed)
    observed = policy.observe(spread)
    keys = [(config.seed, row) for row in range(observations)]
    starts = range(0, observations, config.batch)
    return [
        (observed[start : start + config.batch], policy.draw_noise(len(part), part))
        for start in starts
        if (part := keys[start : start + config.batch])
    ]


def _draw(profile: FeatureProfile, method: Method, chosen: CacheSchedule, folder: Path) -> None:
    metric = method.metric if isinstance(method, BlockAdaptive) else Metric.COSINE
    save_figure(similarity_maps(profile, metric, chosen), folder / "similarity.png")
    if profile.sensitivity is not None:
        save_figure(sensitivity_curve(profile.sensitivity), folder / "sensitivity.png")
    if profile.gates is not None:
        save_figure(gate_map(profile.gates, profile.blocks), folder / "gates.png")


def _profile_summary(profile: FeatureProfile) -> dict[str, Any]:
    gains = None if profile.sensitivity is None else profile.sensitivity.tolist()
    return {
        "observations": profile.observations,
        "reuse_error": {str(b): float(e) for b, e in zip(profile.blocks, profile.reuse_error(), strict=True)},
        "sensitivity": gains,
    }


def _summary(schedule: CacheSchedule, policy: DiffusionPolicy) -> dict[str, object]:
    flops = schedule_cost(schedule, policy.trunk.cost)
    return {
        "digest": schedule.digest,
        "block_updates": schedule.updates,
        "gflops": flops.planned / 1e9,
        "gflops_original_network": flops.original / 1e9,
    }


if __name__ == "__main__":
    script("calibrate", CalibrateConfig)(main)()
