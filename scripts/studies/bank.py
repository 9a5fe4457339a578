"""The schedule bank of a checkpoint, and its latencies on this device: ``scripts/calibrate.py bank=true``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bac.control import DeviceProfile
from bac.executors import Selection
from bac.results import run_provenance, write_results
from configs.methods import default_method
from configs.schema import CalibrateConfig
from configs.tasks import demonstrations
from policies.bank import (
    BANK_FILE,
    Member,
    accelerated,
    bank_errors,
    bank_of,
    device_path,
    measure_bank,
    members,
)
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import bank_folder
from studies.rows import markdown_table

_COLUMNS = ("schedule", "GFLOPs", "action error", "p50 ms", "p99 ms")


def calibrate_bank(config: CalibrateConfig, policy: DiffusionPolicy, folder: Path) -> None:
    """Make the family's schedules, judge and time them; write bank and device profile beside the checkpoint."""
    demos = demonstrations(config.task, config.demonstrations)
    family = _family(config, policy)
    executor = config.executor.select(family[0].schedule, policy.trunk)
    candidates = {
        each.name: accelerated(policy, each, executor.kind, executor.weights)
        for each in tqdm(family, desc="build", unit="schedule")
    }
    spread = demos.spread_observations(config.observations, policy.observation_steps, config.seed)
    judged = bank_errors(candidates[family[0].name], candidates, spread, config.seed)
    errors = dict(tqdm(judged, desc="action error", unit="schedule", total=len(family)))
    bank = bank_of(policy, family, errors)
    one = {key: values[0] for key, values in spread.items()}
    device = timed_bank(candidates, one, config.family.calls, executor)

    home = bank_folder(policy)
    for each in family:
        each.schedule.save(home / f"{each.name}.json")
    bank.save(home / BANK_FILE)
    device.save(kept := device_path(home, policy.trunk.device, executor))
    on = bank.on(device)
    rows = [
        (
            e.name,
            f"{e.gflops:.2f}",
            f"{e.action_error:.4f}",
            f"{on.latency(e).p50_ms:.1f}",
            f"{on.latency(e).p99_ms:.1f}",
        )
        for e in sorted(bank.entries, key=lambda entry: entry.action_error)
    ]
    results = {
        "bank": asdict(bank),
        "device": asdict(device),
        "executor": executor.to_json(),
        "provenance": run_provenance(torch.device(config.device), asdict(config)),
    }
    write_results(folder / "results.json", results)
    print(f"{markdown_table(_COLUMNS, rows)}\nwrote {home / BANK_FILE} and {kept}")


def timed_bank(
    candidates: Mapping[str, DiffusionPolicy], observation: Mapping[str, np.ndarray], calls: int, executor: Selection
) -> DeviceProfile:
    """Time ``calls`` rounds of all candidates with a progress bar, as ``policies.bank.measure_bank`` does."""
    with tqdm(desc="time", unit="chunk", total=calls * len(candidates)) as bar:
        return measure_bank(candidates, observation, calls, executor, bar.update)


def _family(config: CalibrateConfig, policy: DiffusionPolicy) -> list[Member]:
    methods = {
        each.label: each
        for name in config.family.methods
        for updates in config.family.updates
        if (each := default_method(name).with_budget(updates))
    }
    return members(policy, list(methods.values()), config.family.ddim)
