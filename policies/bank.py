"""From a schedule bank to policies and back: what ``bac.control.schedule_bank`` says, with weights and torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import bac
from bac.acceleration import select_for
from bac.control.schedule_bank import BankEntry, DeviceProfile, Measured, ScheduleBank
from bac.errors import TooLarge, sentence
from bac.executors import ChunkNoise, ExecutorKind, Selection, WeightType
from bac.methods import Method, full_schedule
from bac.plan import schedule_cost
from bac.profile import FeatureProfile
from bac.results import run_provenance
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule
from bac.timing import Latency, device_synchroniser, measure_interleaved
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import profile_path
from policies.samplers import ddim, sampler_named

BANK_FILE = "bank.json"
_BATCH = 32


@dataclass(frozen=True)
class Member:
    """A schedule that is to be in a bank, with the sampler it was made for."""

    schedule: CacheSchedule
    sampler: SamplerTable
    label: str

    @property
    def name(self) -> str:
        """Name in the bank, and, with ``.json``, its file."""
        return f"{self.sampler.name}/{self.label}"


def device_path(folder: Path, device: torch.device, executor: Selection) -> Path:
    """Return where a bank's latencies on this device, with as many threads as now, are kept."""
    about = run_provenance(device, {})
    words = f"{about['device']} {about['threads']} threads {executor.kind} {executor.weights}"
    return folder / "devices" / f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}.json"


def members(policy: DiffusionPolicy, methods: Sequence[Method], ddim_steps: Sequence[int]) -> list[Member]:
    """Return the uncached schedule first, then one per method, then uncached DDIM samplers.

    Raises:
        MissingArtefact: the policy was not calibrated for its sampler.
    """
    profile = FeatureProfile.load(profile_path(policy)) if methods else None
    short = [DiffusionPolicy(policy.checkpoint, ddim(policy.spec.process, steps)) for steps in ddim_steps]
    uncached = [Member(_full(each), each.sampler, "none") for each in (policy, *short)]
    made = [Member(each.schedule(profile), policy.sampler, each.label) for each in methods if profile is not None]
    return [uncached[0], *made, *uncached[1:]]


def accelerated(
    policy: DiffusionPolicy, member: Member, kind: ExecutorKind | str, weights: WeightType | str
) -> DiffusionPolicy:
    """Return the policy over a member's sampler and schedule."""
    base = DiffusionPolicy(policy.checkpoint, member.sampler)
    return bac.accelerate(base, member.schedule, select_for(member.schedule, base.trunk, kind, weights))


def bank_errors(
    reference: DiffusionPolicy,
    candidates: Mapping[str, DiffusionPolicy],
    observation: Mapping[str, np.ndarray],
    seed: int,
) -> Iterator[tuple[str, float]]:
    """Yield each candidate's mean absolute difference to the executed actions of the reference, normalised units.

    Args:
        reference: a policy of the most denoising steps.
        candidates: name -> policy of the same checkpoint, of any sampler.
        observation: key -> float32[N, To, channels], task units.
        seed: of the noise; a sampler of K steps gets the first K of the reference's.
    """
    observed = reference.observe(observation)
    noise = reference.draw_noise(len(observed), [(seed, row) for row in range(len(observed))])
    batches = [slice(start, start + _BATCH) for start in range(0, len(observed), _BATCH)]
    executed = reference.spec.executed
    expected = [reference.denoiser(observed[rows], _rows(noise, rows, None)) for rows in batches]
    for name, policy in candidates.items():
        chunks = [policy.denoiser(observed[rows], _rows(noise, rows, policy.sampler.steps)) for rows in batches]
        differences = [(chunk - other)[:, executed].abs() for chunk, other in zip(chunks, expected, strict=True)]
        yield name, float(torch.cat(differences).mean())


def bank_of(policy: DiffusionPolicy, family: Sequence[Member], errors: Mapping[str, float]) -> ScheduleBank:
    """Return the bank of a family, the first member its reference."""
    entries = (
        BankEntry(
            name=each.name,
            schedule=f"{each.name}.json",
            sampler=dict(each.sampler.identity),
            action_error=errors[each.name],
            gflops=schedule_cost(each.schedule, policy.trunk.cost).planned / 1e9,
        )
        for each in family
    )
    return ScheduleBank(policy.checkpoint.digest, family[0].name, tuple(entries))


def measure_bank(
    candidates: Mapping[str, DiffusionPolicy],
    observation: Mapping[str, np.ndarray],
    calls: int,
    executor: Selection,
    on_call: Callable[[], object] = lambda: None,
) -> DeviceProfile:
    """Time ``predict`` of all candidates in turn on one observation, as they are used on a robot.

    Args:
        candidates: name -> policy.
        observation: key -> float32[To, channels], task units.
        calls: timed calls of each.
        executor: what runs them.
        on_call: called after every timed call, while no clock runs.
    """
    any_policy = next(iter(candidates.values()))
    device = any_policy.trunk.device
    latency = measure_interleaved(
        {name: _calling(policy, observation) for name, policy in candidates.items()},
        calls=calls,
        synchronise=device_synchroniser(device),
        on_call=on_call,
    )
    about = run_provenance(device, {})
    return DeviceProfile(
        checkpoint=any_policy.checkpoint.digest,
        device=about["device"],
        threads=about["threads"],
        executor=executor.kind,
        dtype=executor.weights,
        versions=about["versions"],
        latency={name: _measured(each) for name, each in latency.items()},
    )


def load_device_profile(folder: Path, device: torch.device, executor: Selection) -> DeviceProfile:
    """Return what the schedules of the bank in ``folder`` take on this device, as it was measured.

    Raises:
        MissingArtefact: they were not timed here.
        CorruptArtefact: not a device profile.
        Mismatch: what is kept under this device's name was measured on another, or under another version of torch.
    """
    kept = DeviceProfile.load(device_path(folder, device, executor))
    about = run_provenance(device, {})
    kept.require(about["device"], about["threads"], executor.kind, executor.weights, about["versions"]["torch"])
    return kept


def load_member(policy: DiffusionPolicy, folder: Path, entry: BankEntry) -> Member:
    """Return the schedule of an entry of the bank in ``folder``, with its sampler.

    Raises:
        MissingArtefact: the schedule's file is gone.
        CorruptArtefact: it is none.
    """
    sampler = sampler_named(policy.spec.process, entry.sampler)
    label = entry.name.removeprefix(f"{sampler.name}/")
    return Member(CacheSchedule.load(folder / entry.schedule), sampler, label)


def load_entry(policy: DiffusionPolicy, folder: Path, entry: BankEntry, kind: str, weights: str) -> DiffusionPolicy:
    """Return the policy as an entry of the bank in ``folder`` has it.

    Raises:
        MissingArtefact: the schedule's file is gone.
        Mismatch: it is for another checkpoint or sampler.
    """
    return accelerated(policy, load_member(policy, folder, entry), kind, weights)


def load_candidates(
    policy: DiffusionPolicy, folder: Path, bank: ScheduleBank, executor: Selection
) -> Iterator[tuple[str, DiffusionPolicy]]:
    """Yield name and policy of every entry of the bank in ``folder``, to be timed.

    Raises:
        MissingArtefact: a schedule's file is gone.
        Mismatch: one is for another checkpoint or sampler.
        TooLarge: the executor cannot hold one of them, and a bank is timed as a whole.
    """
    for entry in bank.entries:
        try:
            yield entry.name, load_entry(policy, folder, entry, executor.kind, executor.weights)
        except TooLarge as error:
            raise TooLarge(
                sentence(
                    "schedule bank",
                    expected=f"an executor that holds each of its schedules, {entry.name} among them",
                    got=executor.kind,
                    mend="use executor=compiled, or make a bank on a sampler of fewer steps with scripts/calibrate.py",
                )
            ) from error


def _full(policy: DiffusionPolicy) -> CacheSchedule:
    return full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)


def _rows(noise: ChunkNoise, rows: slice, steps: int | None) -> ChunkNoise:
    return ChunkNoise(noise.initial[rows], noise.steps[:steps, rows])


def _calling(policy: DiffusionPolicy, observation: Mapping[str, np.ndarray]) -> Callable[[], object]:
    return lambda: policy.predict(observation)


def _measured(latency: Latency) -> Measured:
    return Measured(latency.p50_ms, latency.p99_ms, latency.calls)
