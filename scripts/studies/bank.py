"""The schedule bank of a checkpoint, and its latencies on this device: ``scripts/calibrate.py bank=true``."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from bac.errors import TooLarge, sentence
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
    """Make the family's schedules, judge and time them; write bank and device profile beside the checkpoint.

    Raises:
        TooLarge: the executor cannot hold the uncached policy, which every bank is judged against.
    """
    executor = config.executor.select_plain(policy.trunk)
    reference = _reference(policy, executor)
    demos = demonstrations(config.task, config.demonstrations, config.filter_key)
    family = _family(config, policy)
    candidates = {family[0].name: reference} | {
        each.name: accelerated(policy, each, executor.kind, executor.weights)
        for each in tqdm(family[1:], desc="build", unit="schedule")
    }
    spread = demos.spread_observations(config.observations, policy.observation_steps, config.seed)
    judged = bank_errors(reference, candidates, spread, config.seed)
    errors = dict(tqdm(judged, desc="action error", unit="schedule", total=len(family)))
    bank = bank_of(policy, family, errors)
    one = {key: values[0] for key, values in spread.items()}
    with tqdm(desc="time", unit="chunk", total=config.family.calls * len(candidates)) as bar:
        device = measure_bank(candidates, one, config.family.calls, executor, bar.update)

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


def _reference(policy: DiffusionPolicy, executor: Selection) -> DiffusionPolicy:
    """Return the uncached policy, whose plan is the family's largest."""
    (uncached,) = members(policy, [], [])
    try:
        return accelerated(policy, uncached, executor.kind, executor.weights)
    except TooLarge as error:
        raise TooLarge(
            sentence(
                "schedule bank",
                expected=f"an executor that holds the uncached policy, {policy.sampler.steps} steps of all blocks",
                got=executor.kind,
                mend="use executor=compiled, or a sampler of fewer steps",
            )
        ) from error


def _family(config: CalibrateConfig, policy: DiffusionPolicy) -> list[Member]:
    budgets = itertools.product(config.family.methods, config.family.updates)
    methods = [default_method(name).with_budget(updates) for name, updates in budgets]
    # A budget that is given twice is one member.
    return members(policy, list({each.label: each for each in methods}.values()), config.family.ddim)
