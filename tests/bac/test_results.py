"""Results say where they come from and are written whole."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from bac.errors import CorruptArtefact, MissingArtefact
from bac.results import read_results, run_provenance, write_results


def test_provenance_names_the_run() -> None:
    provenance = run_provenance(torch.device("cpu"), {"seed": 3})
    assert set(provenance) >= {"commit", "command", "device", "threads", "dtype", "python", "versions", "config"}
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(\+dirty)?", provenance["commit"])
    assert provenance["command"].startswith("python ")
    assert provenance["device"]
    assert provenance["threads"] == torch.get_num_threads()
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["config"] == {"seed": 3}


def test_provenance_can_be_written(tmp_path: Path) -> None:
    provenance = run_provenance(torch.device("cpu"), {"seed": 3})
    write_results(tmp_path / "run" / "results.json", {"provenance": provenance, "score": 0.8})
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == {"provenance": provenance, "score": 0.8}


def test_results_are_read_as_they_were_written_and_others_refuse(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(MissingArtefact, match=r"^results: expected a file .*results\.json, got none"):
        read_results(path)
    write_results(path, {"score": 0.8})
    assert read_results(path) == {"score": 0.8}
    for content in (b"", b"[1]", b"{'score'", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(CorruptArtefact, match=r"results\.json: expected a JSON document of results, got "):
            read_results(path)


def test_a_board_is_named_and_an_unnamed_processor_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def device(kind: str = "cpu") -> str:
        return run_provenance(torch.device(kind), {})["device"]

    monkeypatch.setattr("bac.results._BOARD", tmp_path / "model")
    monkeypatch.setattr("bac.results._PROCESSORS", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Orin")
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : Xeon\nprocessor : 1\nmodel name : Xeon\n")
    assert (device(), device("cuda:0")) == ("Xeon x 2", "Orin")
    (tmp_path / "cpuinfo").write_text("processor : 0\nCPU part : 0xd42\n")
    assert device() == "aarch64 x 8"
    (tmp_path / "model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert device() == "NVIDIA Jetson AGX Orin Developer Kit, aarch64 x 8"
    assert device("cuda:0") == "NVIDIA Jetson AGX Orin Developer Kit, Orin"


def test_a_package_below_a_foreign_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "theirs")
    file = tmp_path / ".venv" / "bac" / "results.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr("bac.results.__file__", str(file))
    assert run_provenance(torch.device("cpu"), {})["commit"] == "unknown"
    git("add", str(file))
    git("commit", "-m", "ours")
    assert run_provenance(torch.device("cpu"), {})["commit"] == git("rev-parse", "HEAD")


@pytest.mark.parametrize(
    ("value", "error"),
    [(float("nan"), ValueError), (float("inf"), ValueError), (np.float32(1), TypeError), ({1, 2}, TypeError)],
)
def test_a_failed_write_keeps_the_earlier_results(tmp_path: Path, value: object, error: type[Exception]) -> None:
    path = tmp_path / "results.json"
    write_results(path, {"score": 0.8})
    with pytest.raises(error, match="JSON"):
        write_results(path, {"score": 0.9, "latency": {"p99": value}})
    assert json.loads(path.read_text()) == {"score": 0.8}
    assert list(tmp_path.iterdir()) == [path]
