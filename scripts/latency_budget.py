"""Hold this device to a latency budget: ``python scripts/latency_budget.py task=push_t budget_ms=80 rate_hz=10``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from bac.control import DeviceProfile, LatencyBudget, ScheduleBank
from bac.device import use_threads
from bac.executors import Selection
from bac.results import run_provenance, write_results
from bac.timing import device_synchroniser
from configs.budgets import LatencyBudgetConfig
from configs.entry import script
from configs.tasks import require_task
from policies.bank import BANK_FILE, device_path, load_candidates, load_device_profile, load_entry, measure_bank
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import bank_folder, load_policy


def main(config: LatencyBudgetConfig, folder: Path) -> None:
    """Select from the bank, time it, print histogram and verdict; end with status 1 if the budget is exceeded."""
    budget = LatencyBudget(config.budget_ms, config.rate_hz)
    use_threads(config.threads)
    policy = load_policy(config.checkpoint or config.task.name, device=config.device)
    require_task(config.task, policy.spec)
    home = bank_folder(policy)
    bank = ScheduleBank.load(home / BANK_FILE)
    executor = config.executor.select_plain(policy.trunk)
    device = _device_profile(config, policy, bank, executor)
    entry = bank.on(device).select(config.budget_ms)
    fast = load_entry(policy, home, entry, executor.kind, executor.weights)
    observation = policy.spec.blank_observation()
    synchronise = device_synchroniser(policy.trunk.device)

    def chunk() -> None:
        fast.predict(observation)
        synchronise()

    print(f"{entry.name} (action error {entry.action_error:.4f}), {config.calls} chunks on {device.device}")
    verdict = budget.measure(chunk, calls=config.calls, warmup=config.warmup)
    results = {
        "task": config.task.name,
        "entry": asdict(entry),
        "expected": asdict(bank.on(device).latency(entry)),
        "verdict": verdict.to_json(),
        "executor": executor.to_json(),
        "provenance": run_provenance(policy.trunk.device, asdict(config)),
    }
    write_results(folder / "results.json", results)
    print(f"{verdict.histogram()}\n{verdict}\nresults in {folder}")
    if not verdict.kept:
        sys.exit(1)


def _device_profile(
    config: LatencyBudgetConfig, policy: DiffusionPolicy, bank: ScheduleBank, executor: Selection
) -> DeviceProfile:
    """Return what the bank's schedules take on this device, timed and kept if they were not yet.

    Raises:
        Mismatch: what is kept under this device's name was measured on another, or under another version of torch.
        TooLarge: the executor cannot hold every schedule.
    """
    home = bank_folder(policy)
    path = device_path(home, policy.trunk.device, executor)
    if path.is_file() and not config.measure:
        return load_device_profile(home, policy.trunk.device, executor)
    loaded = load_candidates(policy, home, bank, executor)
    candidates = dict(tqdm(loaded, desc="build", unit="schedule", total=len(bank.entries)))
    blank = policy.spec.blank_observation()
    with tqdm(desc="time", unit="chunk", total=config.measure_calls * len(candidates)) as bar:
        device = measure_bank(candidates, blank, config.measure_calls, executor, bar.update)
    device.save(path)
    print(f"wrote {path}")
    return device


if __name__ == "__main__":
    script("latency_budget", LatencyBudgetConfig)(main)()
