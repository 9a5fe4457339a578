"""The schedule bank: a family of schedules of one checkpoint, what each errs and what each takes on this device.

Two files, because they travel apart: the bank goes with the checkpoint to every robot, the latencies hold for one
device, executor and number of threads. Neither needs torch to be read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bac.control.latency_budget import FEWEST_CALLS
from bac.errors import CorruptArtefact, InvalidInput, Mismatch, MissingArtefact, Unavailable, sentence
from bac.files import write_whole

_FORMAT = "bac-schedule-bank-1"
_DEVICE_FORMAT = "bac-device-profile-1"
_MEND = "run scripts/calibrate.py bank=true"
_MEASURE = "run scripts/latency_budget.py measure=true on this device"

_Artefact = TypeVar("_Artefact")


@dataclass(frozen=True)
class BankEntry:
    """A schedule of the bank.

    Attributes:
        name: unique in the bank, for instance ``ddpm-100/bac-s10``.
        schedule: its file, relative to the bank's folder.
        sampler: identity of its sampler, as ``SamplerTable.identity``.
        action_error: mean absolute difference of the executed actions to the bank's reference on calibration
            observations and the same noise, normalised units. Of another sampler than the reference's it holds the
            difference between two equally good chunks as well: it is never flattered.
        gflops: of a chunk at batch 1.
    """

    name: str
    schedule: str
    sampler: Mapping[str, str | int | float]
    action_error: float
    gflops: float

    def __post_init__(self) -> None:
        if not self.name or not np.isfinite([self.action_error, self.gflops]).all() or self.action_error < 0:
            raise InvalidInput(
                sentence("bank entry", expected="a name and finite figures of at least 0", got=self, mend="calibrate")
            )


@dataclass(frozen=True)
class Measured:
    """Latency of one entry on a device, batch 1, observation in to actions out: p50 and p99 in ms over ``calls``.

    Of fewer than 100 calls it can be shown, not selected by.
    """

    p50_ms: float
    p99_ms: float
    calls: int

    def __post_init__(self) -> None:
        if not 0 < self.p50_ms <= self.p99_ms < np.inf or self.calls < 1:
            raise InvalidInput(
                sentence("latency", expected="0 < p50 <= p99, finite, of at least 1 call", got=self, mend="measure")
            )


@dataclass(frozen=True)
class DeviceProfile:
    """What the entries of a bank take on one device.

    Attributes:
        checkpoint: digest of the bank's checkpoint.
        device: its name.
        threads: CPU threads.
        executor: kind of executor.
        dtype: how it stores weights.
        versions: package -> version, torch among them.
        latency: entry name -> what was measured.
    """

    checkpoint: str
    device: str
    threads: int
    executor: str
    dtype: str
    versions: Mapping[str, str]
    latency: Mapping[str, Measured]

    def save(self, path: Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        _write(path, {"format": _DEVICE_FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> DeviceProfile:
        """Read what ``save`` wrote.

        Raises:
            MissingArtefact: no such file.
            CorruptArtefact: not a device profile.
        """

        def read(document: dict[str, Any]) -> DeviceProfile:
            latency = {str(name): Measured(**each) for name, each in document.pop("latency").items()}
            return cls(**document, latency=latency)

        return _read("device profile", path, _DEVICE_FORMAT, _MEASURE, read)

    def require(self, device: str, threads: int, executor: str, dtype: str, torch: str) -> None:
        """Refuse to stand for another device, or for another version of torch on this one.

        Raises:
            Mismatch: it was measured under something else.
        """
        own = self.device, self.threads, self.executor, self.dtype, self.versions.get("torch")
        asked = device, threads, executor, dtype, torch
        if own != asked:
            told = "{}, {} thread(s), executor {} {}, torch {}"
            raise Mismatch(
                sentence(
                    "device profile",
                    expected=f"one of {told.format(*asked)}",
                    got=told.format(*own),
                    mend=_MEASURE,
                )
            )


@dataclass(frozen=True)
class ScheduleBank:
    """Schedules of one checkpoint.

    Attributes:
        checkpoint: its digest.
        reference: name of the entry that errors are against.
        entries: at least one, each name once.
    """

    checkpoint: str
    reference: str
    entries: tuple[BankEntry, ...]

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if len(set(names)) != len(names) or self.reference not in names:
            raise InvalidInput(
                sentence(
                    "schedule bank",
                    expected="entries of different names, the reference among them",
                    got=f"{names} and reference {self.reference!r}",
                    mend="correct the names",
                )
            )

    def save(self, path: Path) -> None:
        """Write the bank as JSON, whole or not at all; the schedules' own files lie beside it."""
        _write(path, {"format": _FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> ScheduleBank:
        """Read what ``save`` wrote.

        Raises:
            MissingArtefact: no such file.
            CorruptArtefact: not a bank.
        """

        def read(document: dict[str, Any]) -> ScheduleBank:
            return cls(**document | {"entries": tuple(BankEntry(**entry) for entry in document["entries"])})

        return _read("schedule bank", path, _FORMAT, _MEND, read)

    def on(self, device: DeviceProfile) -> DeviceBank:
        """Return the bank with the latencies of a device.

        Raises:
            Mismatch: the device profile is of another checkpoint, or lacks an entry.
        """
        missing = [entry.name for entry in self.entries if entry.name not in device.latency]
        if device.checkpoint != self.checkpoint or missing:
            raise Mismatch(
                sentence(
                    "device profile",
                    expected=f"latencies of the bank of checkpoint {self.checkpoint[:12]}",
                    got=f"checkpoint {device.checkpoint[:12]}, {missing or 'no'} entries missing",
                    mend=_MEASURE,
                )
            )
        return DeviceBank(self.entries, device)


@dataclass(frozen=True)
class DeviceBank:
    """A bank on a device; see ``ScheduleBank.on``."""

    entries: tuple[BankEntry, ...]
    device: DeviceProfile

    def select(self, budget_ms: float) -> BankEntry:
        """Return the most accurate entry whose p99 is within the budget; of equals, the faster.

        Raises:
            InvalidInput: the budget is not above 0, or an entry was timed by fewer than 100 calls.
            Unavailable: none is fast enough; the sentence names the nearest.
        """
        if not budget_ms > 0:
            raise InvalidInput(sentence("budget_ms", expected="more than 0", got=budget_ms, mend="correct it"))
        self._require_percentiles()
        fitting = [entry for entry in self.entries if self.latency(entry).p99_ms <= budget_ms]
        if not fitting:
            nearest = sorted(self.entries, key=lambda entry: self.latency(entry).p99_ms)[:3]
            figures = ", ".join(
                f"{entry.name} with p99 {self.latency(entry).p99_ms:.1f} ms (action error {entry.action_error:.4f})"
                for entry in nearest
            )
            raise Unavailable(
                sentence(
                    "schedule bank",
                    expected=f"a schedule within {budget_ms:g} ms on {self.device.device}",
                    got=f"{figures} as the nearest",
                    mend="raise budget_ms, or use a faster device or executor",
                )
            )
        return min(fitting, key=lambda entry: (entry.action_error, self.latency(entry).p99_ms))

    def ladder(self, budget_ms: float, levels: int) -> Sequence[BankEntry]:
        """Return the selected entry and up to ``levels - 1`` to degrade to, each faster than the one before.

        Each further one is the most accurate that takes at most three quarters of the p99 of the one before.

        Raises:
            InvalidInput: as ``select``.
            Unavailable: as ``select``.
        """
        chosen = [self.select(budget_ms)]
        while len(chosen) < levels:
            limit = 0.75 * self.latency(chosen[-1]).p99_ms
            if all(self.latency(entry).p99_ms > limit for entry in self.entries):
                break
            chosen.append(self.select(limit))
        return chosen

    def latency(self, entry: BankEntry) -> Measured:
        """Return what was measured of an entry."""
        return self.device.latency[entry.name]

    def _require_percentiles(self) -> None:
        """Refuse measurements of so few calls that their p99 says nothing."""
        few = {entry.name: calls for entry in self.entries if (calls := self.latency(entry).calls) < FEWEST_CALLS}
        if few:
            raise InvalidInput(
                sentence(
                    "device profile",
                    expected=f"at least {FEWEST_CALLS} timed calls of each schedule, for fewer have no 99th percentile",
                    got=", ".join(f"{calls} of {name}" for name, calls in few.items()),
                    mend=_MEASURE,
                )
            )


def _write(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))


def _read(what: str, path: Path, form: str, mend: str, read: Callable[[dict[str, Any]], _Artefact]) -> _Artefact:
    if not path.is_file():
        raise MissingArtefact(sentence(what, expected=f"a file {path}", got="none", mend=mend))
    try:
        document = json.loads(path.read_text())
        if document.pop("format") != form:
            raise KeyError("format")
        return read(document)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        got = f"{type(error).__name__} {error}"
        raise CorruptArtefact(sentence(f"{what} {path}", expected=form, got=got, mend=mend)) from error
