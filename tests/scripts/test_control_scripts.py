"""Schedule bank, latency budget and evaluation with latency, end to end and small."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bac.control import DeviceProfile, ScheduleBank
from tests.commands import SCRIPTS, run_script

SMALL = ["policy.layers=2", "policy.width=32", "policy.heads=2", "policy.train_steps=10", "optimiser.batch_size=8"]
CHECKPOINT = ["checkpoint=run/checkpoint.safetensors", "threads=1", "executor=eager"]


def run(folder: Path, script: str, *overrides: str, status: int = 0) -> str:
    done = run_script(folder, script, *overrides, status=status)
    return done.stdout + done.stderr


def results(folder: Path, script: str) -> dict:
    newest = max((folder / "outputs" / script).iterdir())
    return json.loads((newest / "results.json").read_text())


@pytest.fixture(scope="module")
def banked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy trained for 2 steps, calibrated, and its bank."""
    folder = tmp_path_factory.mktemp("control")
    cycle = ["optimiser.cycles=[2]", "optimiser.warmup_steps=1", "rollout.every=0", "sampler.steps=2", "threads=1"]
    run(folder, "train", *SMALL, *cycle, "save_every=2", "output=run")
    run(folder, "calibrate", *CHECKPOINT, "observations=4", "batch=2", "sensitivity_observations=2", "cache.updates=3")
    family = ["family.updates=[2,5]", "family.ddim=[4]", "family.calls=3", "observations=4"]
    run(folder, "calibrate", *CHECKPOINT, "bank=true", *family)
    return folder


def test_the_bank_holds_the_family_and_what_it_takes_here(banked: Path) -> None:
    home = banked / "run" / "bank"
    bank = ScheduleBank.load(home / "bank.json")
    assert [entry.name for entry in bank.entries] == [
        "ddpm-10/none",
        *(f"ddpm-10/{method}-s{updates}" for method in ("bac", "bac_weighted") for updates in (2, 5)),
        "ddim-4-trailing/none",
    ]
    assert all((home / entry.schedule).is_file() for entry in bank.entries)
    errors = {entry.name: entry.action_error for entry in bank.entries}
    assert errors["ddpm-10/none"] == 0
    assert all(error > 0 for name, error in errors.items() if name != bank.reference)
    (path,) = (home / "devices").iterdir()
    device = DeviceProfile.load(path)
    assert (device.threads, device.executor, device.dtype) == (1, "eager", "fp32")
    assert set(device.latency) == set(errors)
    assert "torch" in device.versions


def test_a_budget_is_kept_exceeded_or_beyond_the_bank(banked: Path) -> None:
    (path,) = (banked / "run" / "bank" / "devices").iterdir()
    few = path.read_text()
    told = run(banked, "latency_budget", *CHECKPOINT, "budget_ms=60000", "calls=100", status=1)
    assert told.startswith("error: device profile: expected at least 100 timed calls of each schedule, for fewer have")
    assert told.endswith("; run scripts/latency_budget.py measure=true on this device.\n")
    document = json.loads(few)
    document["latency"] = {name: {"p50_ms": 1.0, "p99_ms": 2.0, "calls": 100} for name in document["latency"]}
    measured = json.dumps(document)
    path.write_text(measured)
    kept = run(banked, "latency_budget", *CHECKPOINT, "budget_ms=60000", "calls=100", "warmup=1")
    assert "ddpm-10/none (action error 0.0000), 100 chunks on" in kept
    assert "latency budget kept: p99" in kept
    assert results(banked, "latency_budget")["verdict"]["kept"] is True
    told = run(banked, "latency_budget", *CHECKPOINT, "budget_ms=0.0001", "calls=100", status=1)
    assert told.startswith("error: schedule bank: expected a schedule within 0.0001 ms on")
    for each in document["latency"].values():
        each.update(p50_ms=1e-5, p99_ms=1e-5)
    path.write_text(json.dumps(document))
    told = run(banked, "latency_budget", *CHECKPOINT, "budget_ms=0.0001", "calls=100", "warmup=0", status=1)
    assert "latency budget exceeded: p99" in told
    assert results(banked, "latency_budget")["verdict"]["kept"] is False
    path.write_text(measured.replace(f'"torch": "{document["versions"]["torch"]}"', '"torch": "1.0"'))
    foreign = run(banked, "latency_budget", *CHECKPOINT, "budget_ms=60000", "calls=100", status=1)
    path.write_text(few)
    assert foreign.startswith("error: device profile: expected one of ")
    assert foreign.endswith(", torch 1.0; run scripts/latency_budget.py measure=true on this device.\n")


SIMULATORS = ["gymnasium", "gym_pusht", "pymunk", "h5py", "robomimic", "mujoco"]


def run_on_a_robot(
    folder: Path, script: str, *overrides: str, lacks: Sequence[str] = ("zarr", *SIMULATORS)
) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python that lacks packages, as a robot's does."""
    program = f"import runpy, sys; sys.modules.update(dict.fromkeys({list(lacks)})); " + (
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    command = [sys.executable, "-c", program, str(SCRIPTS / f"{script}.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (SCRIPTS, SCRIPTS.parent)))}
    return subprocess.run(
        [*command, *overrides], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_robot_without_zarr_or_simulator_times_the_bank_that_it_was_given(banked: Path) -> None:
    shutil.copytree(banked / "run", banked / "robot", ignore=shutil.ignore_patterns("devices", "profiles"))
    path = banked / "robot" / "bank" / "bank.json"
    bank = ScheduleBank.load(path)
    replace(bank, entries=(bank.entries[0], bank.entries[-1])).save(path)  # two are timed sooner than six
    checkpoint = "checkpoint=robot/checkpoint.safetensors"
    given = [checkpoint, "threads=1", "executor=eager", "budget_ms=60000", "calls=100", "warmup=1"]
    told = run_on_a_robot(banked, "latency_budget", *given, "measure_calls=99").stderr
    assert told.startswith("error: measure_calls: expected at least 100, for fewer have no 99th percentile, got 99; ")
    given.append("measure_calls=100")
    first = run_on_a_robot(banked, "latency_budget", *given)
    assert first.returncode == 0, first.stderr
    (path,) = (banked / "robot" / "bank" / "devices").iterdir()
    assert (wrote := f"wrote {path.relative_to(banked)}") in first.stdout
    assert "latency budget kept: p99" in first.stdout
    measured = path.read_text()
    assert wrote not in run_on_a_robot(banked, "latency_budget", *given).stdout
    assert path.read_text() == measured
    assert wrote in run_on_a_robot(banked, "latency_budget", *given, "measure=true").stdout
    assert path.read_text() != measured


@pytest.mark.parametrize("script", ["eval", "calibrate"])
def test_without_zarr_what_needs_demonstrations_refuses_in_one_sentence(banked: Path, script: str) -> None:
    done = run_on_a_robot(banked, script, *CHECKPOINT, "cache.updates=3", lacks=["zarr"])
    told = "demonstrations: expected the package zarr 3, got none; install it, which takes Python 3.11 or later."
    assert (done.returncode, done.stderr) == (1, f"error: {told}\n"), done.stdout


def test_a_budget_without_a_bank_says_how_to_make_one(banked: Path) -> None:
    other = ["checkpoint=run/elsewhere/checkpoint.safetensors", "threads=1"]
    (banked / "run" / "elsewhere").mkdir(exist_ok=True)
    (banked / "run" / "elsewhere" / "checkpoint.safetensors").write_bytes(
        (banked / "run" / "checkpoint.safetensors").read_bytes()
    )
    told = run(banked, "latency_budget", *other, "budget_ms=80", status=1)
    assert told == (
        "error: schedule bank: expected a file run/elsewhere/bank/bank.json, got none; "
        "run scripts/calibrate.py bank=true.\n"
    )
    told = run(banked, "latency_budget", *CHECKPOINT, status=1)
    assert told == "error: configuration: expected budget_ms, got none; give budget_ms=VALUE.\n"
    told = run(banked, "latency_budget", *CHECKPOINT, "budget_ms=80", "calls=99", status=1)
    assert told.startswith("error: calls: expected at least 100, for fewer have no 99th percentile, got 99")
    told = run(banked, "latency_budget", *CHECKPOINT, "task=square", "budget_ms=80", status=1)
    assert told.startswith("error: policy for task=square: expected task square, got push_t")
    told = run(banked, "latency_budget", *CHECKPOINT, "budget_ms=101", "rate_hz=10", status=1)
    assert told.startswith("error: latency budget: expected more than 0 ms, at most the period of 100 ms, got 101")


SHORT = ["episodes=2", "task.max_steps=14", "latency_calls=2", "error_observations=2", "video=0", "cache.updates=3"]


def test_evaluation_without_latency_is_the_evaluation_and_with_it_repeats(banked: Path) -> None:
    run(banked, "eval", *CHECKPOINT, *SHORT)
    still = results(banked, "eval")
    assert "control" not in still
    run(banked, "eval", *CHECKPOINT, *SHORT, "control=realtime", "latency=0", "rate_hz=10")
    moving = results(banked, "eval")
    assert moving["scores"] == still["scores"]
    assert moving["control"]["cached"]["counters"]["executed"] == 28
    told = run(banked, "eval", *CHECKPOINT, *SHORT, "control=realtime", "control.seam=inpaint", "compare=none")
    assert "deadline misses of chunks" in told
    first = max((banked / "outputs" / "eval").iterdir()) / "results.json"
    measured = json.loads(first.read_text())
    assert len(measured["control"]["uncached"]["trace_ms"]) == 100
    again = ["control=realtime", "control.seam=inpaint", f"latency={first}", "control.deadline_ticks=1"]
    run(banked, "eval", *CHECKPOINT, *SHORT, *again)
    repeated = results(banked, "eval")
    assert repeated["control"]["cached"]["trace_ms"] == measured["control"]["cached"]["trace_ms"]
    run(banked, "eval", *CHECKPOINT, *SHORT, *again)
    assert results(banked, "eval")["scores"] == repeated["scores"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["latency=60"], "error: latency and rate_hz: expected control=realtime or control=wallclock with them"),
        (["control=realtime", "rate_hz=20"], "error: rate_hz: expected 10, the rate of push_t, got 20.0"),
        (["control=realtime", "control.seam=glue"], "error: control.seam: expected one of replace, blend, inpaint"),
        (["control=wallclock", "latency=60"], "error: latency: expected measured in wall-clock time, got 60"),
        (["control.stall_ms=90"], "error: control.stall_ms: expected control=realtime or control=wallclock with it"),
        (["control.action_high=[9,9]", "control.action_low=[0,0]"], "error: control.action_low: expected control=real"),
        (["control.seam=blend"], "error: control.seam: expected control=realtime or control=wallclock with it, got"),
        (["control.deadline_ticks=3"], "error: control.deadline_ticks: expected control=realtime or control=wall"),
        (["control=realtime", "processes=2"], "error: processes: expected control=none with it"),
        (
            ["control=realtime", "control.action_low=[0]"],
            "error: control.action_low and control.action_high: expected 2",
        ),
        (["control=realtime", "control.hygiene.freeze_gc=true"], "error: control.hygiene: expected control=wallclock"),
        (["control=wallclock", "control.hygiene.priority=100"], "error: process hygiene: expected cores, "),
    ],
)
def test_settings_that_cannot_be_played_refuse_before_any_work(tmp_path: Path, overrides: list[str], told: str) -> None:
    assert run(tmp_path, "eval", *overrides, status=1).startswith(told)


def test_evaluation_in_real_time_executes_what_the_policy_gives(banked: Path) -> None:
    short = [*SHORT, "episodes=1", "task.max_steps=30", "control.hygiene.freeze_gc=true"]
    told = run(banked, "eval", *CHECKPOINT, *short, "control=wallclock")
    assert "deadline misses of chunks" in told
    control = results(banked, "eval")["control"]["cached"]
    assert (control["mode"], control["rate_hz"], len(control["trace_ms"])) == ("wallclock", 10, 100)
    assert control["hygiene"] == {"loop": {"freeze_gc": "done"}, "inference": {}}
    counters = control["counters"]
    assert counters["executed"] > 0
    assert counters["requests"] > 0
    # A tick that is overslept may be the last.
    assert counters["ticks"] + counters["skipped"] >= 30


def test_score_against_latency_is_played_once_and_kept(banked: Path) -> None:
    rows = ["realtime.rows=[none,bac 3]", "realtime.seams=[replace,inpaint]", "realtime.latencies_ms=[0.0,300.0]"]
    few = ["realtime.episodes=2", "realtime.calls=100", "task.max_steps=20", "realtime.kept=kept.json"]
    common = ["study=realtime", "checkpoint=run/checkpoint.safetensors", *rows, *few]
    run(banked, "bench", *common)
    points = results(banked, "bench")["points"]
    assert [(each["row"], each["seam"], each["latency"]) for each in points] == [
        (row, seam, latency)
        for row in ("none", "bac 3")
        for seam in ("replace", "inpaint")
        for latency in (0.0, 300.0, "measured")
    ]
    assert (max((banked / "outputs" / "bench").iterdir()) / "realtime.png").stat().st_size > 0
    # 300 ms are three ticks: what is asked for at one tick moves the robot three ticks later.
    assert all(each["counters"]["waited"] == 2 * 3 for each in points if each["latency"] == 300)
    # With latency, a chunk that was denoised around what is executed meanwhile is another one.
    jumps = {(each["row"], each["seam"], each["latency"]): each["seam_jump"] for each in points}
    assert all(jumps[row, "replace", 300.0]["count"] > 0 for row in ("none", "bac 3"))
    assert all(jumps[row, "replace", 300.0] != jumps[row, "inpaint", 300.0] for row in ("none", "bac 3"))
    assert all(jumps[row, "replace", 0.0] == jumps[row, "inpaint", 0.0] for row in ("none", "bac 3"))
    kept = json.loads((banked / "kept.json").read_text())
    assert sum("ms" in each for each in kept.values()) == 2  # a trace of each row, for all its seams
    assert all(each["origin"]["commit"] == points[0]["origin"]["commit"] for each in kept.values())
    uncached = next(iter(kept)).split("|")[0]

    def marked(key: str) -> list[float]:
        scores = [0.25, 0.5] if "|0.0|" in key else [0.5, 0.625]
        return scores if key.startswith(uncached) else [each + 0.25 for each in scores]

    played = {key: each | {"scores": marked(key)} if "scores" in each else each for key, each in kept.items()}
    (banked / "kept.json").write_text(json.dumps(played))
    run(banked, "bench", *common)
    again = results(banked, "bench")["points"]
    assert [each["scores"] for each in again[:6]] == [[0.25, 0.5], [0.5, 0.625], [0.5, 0.625]] * 2
    # Episode by episode against the same row and seam without latency, 0.25 and 0.125, and against the first row.
    assert [each["score_difference"]["mean"] for each in again] == [0, 0.1875, 0.1875] * 4
    assert [each["row_difference"]["mean"] for each in again] == [0] * 6 + [0.25] * 6


def test_the_loop_in_real_time_counts_every_tick_alone_and_beside_a_busy_process(banked: Path) -> None:
    short = ["wallclock.schedule=bac-s3", "wallclock.episodes=1", "wallclock.floor_s=0.3", "task.max_steps=20"]
    told = run(banked, "bench", "study=wallclock", "checkpoint=run/checkpoint.safetensors", *short)
    assert "| 1 process(es) |" in told
    for each in results(banked, "bench")["runs"].values():
        counters = each["counters"]
        assert counters["ticks"] + counters["skipped"] >= 20
        assert counters["executed"] > 0
        assert counters["requests"] > 0
        assert (each["jitter_ms"]["count"], each["only_sleeping_ms"]["count"]) == (counters["ticks"], 3)
