from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bac.control import BankEntry, DeviceProfile, Measured, ScheduleBank
from bac.errors import BacError, CorruptArtefact, InvalidInput, Mismatch, MissingArtefact, Unavailable

FIGURES = {  # name: (action error, p50, p99)
    "none": (0.0, 400.0, 480.0),
    "bac-s30": (0.022, 120.0, 150.0),
    "bac-s10": (0.068, 60.0, 78.0),
    "weighted-s10": (0.011, 46.0, 60.0),
    "weighted-s9": (0.011, 44.0, 58.0),
    "bac-s3": (0.2, 20.0, 30.0),
}


def bank() -> ScheduleBank:
    entries = (
        BankEntry(name, f"ddpm/{name}.json", {"name": "ddpm", "steps": 100}, error, 2.4)
        for name, (error, _, _) in FIGURES.items()
    )
    return ScheduleBank("c0ffee" * 8, "none", tuple(entries))


def device() -> DeviceProfile:
    latency = {name: Measured(p50, p99, 100) for name, (_, p50, p99) in FIGURES.items()}
    return DeviceProfile("c0ffee" * 8, "Xeon x 2", 1, "compiled", "fp32", {"torch": "2.13.0"}, latency)


@pytest.mark.parametrize(
    ("budget_ms", "name"),
    [(30, "bac-s3"), (57.9, "bac-s3"), (58, "weighted-s9"), (80, "weighted-s9"), (479, "weighted-s9"), (480, "none")],
)
def test_selects_the_most_accurate_that_fits_and_of_equals_the_faster(budget_ms: float, name: str) -> None:
    assert bank().on(device()).select(budget_ms).name == name


def test_refuses_with_the_nearest_figures() -> None:
    with pytest.raises(
        Unavailable,
        match=r"^schedule bank: expected a schedule within 20 ms on Xeon x 2, got bac-s3 with p99 30\.0 ms \(action "
        r"error 0\.2000\), weighted-s9 with p99 58\.0 ms .*, weighted-s10 .* as the nearest; raise budget_ms",
    ):
        bank().on(device()).select(20)
    for budget_ms in (0, -1, float("nan")):
        with pytest.raises(InvalidInput, match=r"^budget_ms: expected more than 0"):
            bank().on(device()).select(budget_ms)


def test_ladder_goes_down_to_ever_faster_schedules_and_ends() -> None:
    on = bank().on(device())
    assert [entry.name for entry in on.ladder(500, 9)] == ["none", "weighted-s9", "bac-s3"]
    assert [entry.name for entry in on.ladder(500, 2)] == ["none", "weighted-s9"]
    assert [entry.name for entry in on.ladder(500, 1)] == ["none"]


def test_both_files_read_back(tmp_path: Path) -> None:
    bank().save(tmp_path / "bank.json")
    device().save(tmp_path / "a" / "device.json")
    assert ScheduleBank.load(tmp_path / "bank.json") == bank()
    assert DeviceProfile.load(tmp_path / "a" / "device.json") == device()
    assert {path.name for path in tmp_path.iterdir()} == {"bank.json", "a"}


def test_missing_and_foreign_files_refuse(tmp_path: Path) -> None:
    path = tmp_path / "bank.json"
    mends = {
        ScheduleBank: r"run scripts/calibrate\.py bank=true",
        DeviceProfile: r"run scripts/latency_budget\.py measure=true on this device",
    }
    for kind, mend in mends.items():
        with pytest.raises(MissingArtefact, match=rf"got none; {mend}\.$"):
            kind.load(path)
    bank().save(path)
    with pytest.raises(CorruptArtefact, match=r"^device profile .*: expected bac-device-profile-1, got KeyError"):
        DeviceProfile.load(path)
    document = json.loads(path.read_text())
    broken = ["", "[]", '{"format": 1}', json.dumps(document | {"extra": 1}), json.dumps(document | {"entries": [{}]})]
    broken.append(json.dumps(document | {"reference": "other"}))
    for text in broken:
        path.write_text(text)
        with pytest.raises(CorruptArtefact):
            ScheduleBank.load(path)


def test_a_profile_of_something_else_refuses() -> None:
    with pytest.raises(Mismatch, match=r"got checkpoint decaf, no entries missing"):
        bank().on(replace(device(), checkpoint="decaf"))
    fewer = {name: each for name, each in device().latency.items() if name != "none"}
    with pytest.raises(Mismatch, match=r"\['none'\] entries missing"):
        bank().on(replace(device(), latency=fewer))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"device": "Orin"}, r"expected one of Orin, 1 thread\(s\), executor compiled fp32, torch 2\.13\.0, got Xeon"),
        ({"threads": 2}, r"expected one of Xeon x 2, 2 thread\(s\), .*, got Xeon x 2, 1 thread\(s\), "),
        ({"executor": "eager"}, r"executor eager fp32, .*, got .* executor compiled fp32, "),
        ({"dtype": "bf16"}, r"executor compiled bf16, .*, got .* executor compiled fp32, "),
        ({"torch": "2.14.0"}, r", torch 2\.14\.0, got .*, torch 2\.13\.0; run scripts/latency_budget\.py measure=true"),
    ],
)
def test_a_profile_that_was_measured_under_something_else_refuses(changed: dict[str, object], told: str) -> None:
    here = {"device": "Xeon x 2", "threads": 1, "executor": "compiled", "dtype": "fp32", "torch": "2.13.0"}
    device().require(**here)
    with pytest.raises(Mismatch, match=rf"^device profile: .*{told}"):
        device().require(**here | changed)
    with pytest.raises(Mismatch, match="torch None; run "):
        replace(device(), versions={}).require(**here)


def test_a_p99_of_fewer_than_a_hundred_calls_selects_nothing() -> None:
    few = device().latency | {name: replace(device().latency[name], calls=99) for name in ("none", "bac-s3")}
    on = bank().on(replace(device(), latency=few))
    for choose in (on.select, lambda budget_ms: on.ladder(budget_ms, levels=2)):
        with pytest.raises(
            InvalidInput,
            match=r"^device profile: expected at least 100 timed calls of each schedule, .*, got 99 of none, 99 of "
            r"bac-s3; run scripts/latency_budget\.py measure=true on this device\.$",
        ):
            choose(500)


def test_impossible_values_refuse() -> None:
    entry = bank().entries[0]
    attempts = [
        lambda: replace(entry, action_error=-1.0),
        lambda: replace(entry, gflops=float("nan")),
        lambda: Measured(2.0, 1.0, 5),
        lambda: Measured(1.0, 2.0, 0),
        lambda: ScheduleBank("c", "none", (entry, entry)),
        lambda: ScheduleBank("c", "other", (entry,)),
    ]
    for attempt in attempts:
        with pytest.raises(BacError):
            attempt()
