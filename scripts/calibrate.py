"""Measure how a policy's features change and make its cache schedules: ``python scripts/calibrate.py task=push_t``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from studies.bank import calibrate_bank
from studies.calibration import Calibration

from bac.device import use_threads
from bac.errors import InvalidInput, Mismatch, sentence
from bac.methods import BlockAdaptive, CrossChunk, Method, NoCache, Search
from bac.pictures import gate_map, save_figure, schedule_grid, sensitivity_curve, similarity_maps
from bac.plan import schedule_cost
from bac.profile import FeatureProfile, Metric
from bac.results import run_provenance, write_results
from bac.schedule import CacheSchedule
from configs.entry import script
from configs.schema import CalibrateConfig
from configs.tasks import demonstrations, require_task
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import load_policy, profile_path, require_free, schedule_path
from policies.realtime import goes_on
from policies.samplers import ddim


def main(config: CalibrateConfig, folder: Path) -> None:
    """Write profile and schedules beside the checkpoint, pictures and JSON into ``folder``."""
    use_threads(config.threads)
    method = config.cache.build()
    if not config.bank and isinstance(method, NoCache):
        raise InvalidInput(sentence("cache", expected="a method", got=method.name, mend="none needs no calibration"))
    policy = load_policy(
        config.checkpoint or config.task.name,
        sampler=config.sampler.build,
        device=config.device,
        weights=config.weights,
    )
    require_task(config.task, policy.spec)
    if config.bank:
        _require_family(config, policy)
        calibrate_bank(config, policy, folder)
        return
    methods = {each.label: each for each in (method, *map(method.with_budget, config.budgets))}
    calibration = Calibration(config, policy, demonstrations(config.task, config.demonstrations, config.filter_key))
    kept = _kept(config, profile_path(policy)) if config.reuse and not isinstance(method, Search) else None
    for each in methods.values():
        calibration.require_possible(each, kept)
        if not config.overwrite:
            require_free(each, policy)
    if isinstance(method, Search):
        beginning = calibration.kept_profile()
        schedules = {label: calibration.search(each, beginning) for label, each in methods.items()}
        found: dict[str, Any] = {}
    else:
        path = profile_path(policy)
        profile = calibration.completed(kept or calibration.features(), method)
        if profile is not kept:
            profile.save(path)
            print(f"wrote {path}")
        schedules = {label: each.schedule(profile) for label, each in methods.items()}
        _draw(profile, method, schedules[method.label], folder)
        found = _profile_summary(profile)
    for label, schedule in schedules.items():
        schedule.save(schedule_path(policy, label))
    chosen = schedules[method.label]
    print(chosen.grid())
    save_figure(schedule_grid(chosen), folder / "schedule.png")
    results = {
        **found,
        "schedules": {label: _summary(schedule, policy) for label, schedule in schedules.items()},
        "provenance": run_provenance(torch.device(config.device), asdict(config)),
    }
    write_results(folder / "results.json", results)
    print(f"wrote {', '.join(schedules)} to {policy.schedules}; pictures in {folder}")


def _kept(config: CalibrateConfig, path: Path) -> FeatureProfile:
    """Return the profile that an earlier run left, of as many observations as the command asks for."""
    profile = FeatureProfile.load(path)
    if profile.observations != config.observations:
        raise Mismatch(
            sentence(
                f"kept feature profile {path}",
                expected=f"{config.observations} observations",
                got=profile.observations,
                mend=f"give observations={profile.observations}, or reuse=false to measure anew",
            )
        )
    return profile


def _require_family(config: CalibrateConfig, policy: DiffusionPolicy) -> None:
    """Refuse budgets and samplers that the sampler's steps do not have, and chunks that no control loop can play."""
    steps = policy.sampler.steps
    if CrossChunk.name in config.family.methods:
        raise goes_on(f"family.methods with {CrossChunk.name}")
    wrong = [updates for updates in config.family.updates if not 1 <= updates <= steps]
    if wrong and config.family.methods:
        raise InvalidInput(
            sentence(
                "family.updates",
                expected=f"1 to {steps}, the steps of {policy.sampler.name}",
                got=wrong,
                mend="leave these out",
            )
        )
    known = all(1 <= each <= steps for each in config.family.ddim)
    names = [policy.sampler.name, *(ddim(policy.spec.process, each).name for each in config.family.ddim if known)]
    if not known or len(set(names)) < len(names):
        expected = f"step counts up to {steps}, each once, of other samplers than {policy.sampler.name}"
        raise InvalidInput(
            sentence("family.ddim", expected=expected, got=config.family.ddim, mend="leave the others out")
        )


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
