"""Measure how a policy's features change and make its cache schedules: ``python scripts/calibrate.py task=push_t``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from bac.errors import InvalidInput, sentence
from bac.methods import BlockAdaptive
from bac.methods.base import require_updates
from bac.passes import optimise
from bac.pictures import save_figure, schedule_grid, similarity_maps
from bac.plan import cost, lower
from bac.profile import FeatureProfile
from bac.profiler import profile_features
from bac.results import run_provenance, write_results
from bac.schedule import CacheSchedule
from configs.entry import script
from configs.schema import CalibrateConfig
from configs.tasks import demonstrations
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import load_policy, locate_checkpoint, profile_path, schedule_folder


def main(config: CalibrateConfig, folder: Path) -> None:
    """Write profile and schedules beside the checkpoint, pictures and JSON into ``folder``."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    method = config.cache.build()
    if not isinstance(method, BlockAdaptive):
        raise InvalidInput(
            sentence(
                "cache", expected="bac", got=method.name, mend="only bac is made from a profile; calibrate with it"
            )
        )
    checkpoint = locate_checkpoint(config.checkpoint or config.task.name)
    policy = load_policy(checkpoint, sampler=config.sampler.build, device=config.device)
    budgets = sorted({*config.budgets, method.updates})
    for updates in budgets:
        require_updates(updates, policy.sampler.steps)
    profile = _profile(config, policy)
    profile.save(profile_path(checkpoint, policy.sampler))

    schedules = {}
    for updates in budgets:
        budget = replace(method, updates=updates)
        schedules[updates] = budget.schedule(profile)
        schedules[updates].save(schedule_folder(checkpoint, policy.sampler) / f"bac-s{updates}.json")
    chosen = schedules[method.updates]
    print(chosen.grid())
    save_figure(similarity_maps(profile, method.metric, chosen), folder / "similarity.png")
    save_figure(schedule_grid(chosen), folder / "schedule.png")
    results = {
        "observations": profile.observations,
        "reuse_error": {str(b): float(e) for b, e in zip(profile.blocks, profile.reuse_error(), strict=True)},
        "schedules": {f"bac-s{updates}": _summary(schedule, policy) for updates, schedule in schedules.items()},
        "provenance": run_provenance(torch.device(config.device), asdict(config)),
    }
    write_results(folder / "results.json", results)
    print(f"wrote {profile_path(checkpoint, policy.sampler)} and {len(schedules)} schedules; pictures in {folder}")


def _profile(config: CalibrateConfig, policy: DiffusionPolicy) -> FeatureProfile:
    demos = demonstrations(config.task)
    spread = demos.spread_observations(config.observations, policy.observation_steps, config.seed)
    joined = torch.from_numpy(policy.spec.concatenate(spread)).to(config.device)
    observations = policy.checkpoint.observation_normalizer.normalize(joined)
    batches = []
    for start in range(0, config.observations, config.batch):
        rows = observations[start : start + config.batch]
        batches.append((rows, policy.draw_noise(len(rows), [(config.seed, start + row) for row in range(len(rows))])))
    with tqdm(total=len(batches), desc="calibrate", unit="batch") as bar:
        return profile_features(policy.trunk, policy.sampler, policy.provenance, batches, lambda _: bar.update())


def _summary(schedule: CacheSchedule, policy: DiffusionPolicy) -> dict[str, object]:
    flops = cost(optimise(lower(schedule)), policy.trunk.cost)
    return {
        "digest": schedule.digest,
        "block_updates": schedule.updates,
        "gflops": flops.planned / 1e9,
        "gflops_original_network": flops.original / 1e9,
    }


if __name__ == "__main__":
    script("calibrate", CalibrateConfig)(main)()
