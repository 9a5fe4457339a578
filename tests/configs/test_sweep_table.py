"""The table of a sweep: what its files say, and that a write that fails leaves the earlier ones."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.sweep_table import RESULTS_FILE, SweepTable

RESULTS = {
    "score": {"mean": 0.5, "low": 0.25, "high": 0.75},
    "success": {"mean": 0.25},
    "gflops": {"cached": 2.38},
    "latency_ms": {"cached": {"p50": 12.0}},
    "speedup": 3.0,
    "action_error": {"mean": 0.0625},
}


def _sweep(folder: Path) -> SweepTable:
    """Return the table of a sweep of one job."""
    job = folder / "0"
    job.mkdir(exist_ok=True)
    (job / RESULTS_FILE).write_text(json.dumps(RESULTS))
    table = SweepTable()
    hydra: Any = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(job)))
    done: Any = SimpleNamespace(hydra_cfg=SimpleNamespace(hydra=hydra), overrides=["cache.updates=5"])
    table.on_job_end({}, done)  # type: ignore[arg-type]
    return table


def test_table_and_document_hold_every_job(tmp_path: Path) -> None:
    _sweep(tmp_path).on_multirun_end({})  # type: ignore[arg-type]
    assert json.loads((tmp_path / "summary.json").read_text()) == [{"overrides": "cache.updates=5", **RESULTS}]
    assert "cache.updates=5" in (tmp_path / "summary.txt").read_text()


def test_a_disk_that_is_full_leaves_the_earlier_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("summary.txt", "summary.json"):
        (tmp_path / name).write_text("earlier")

    def full(file: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("bac.files.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        _sweep(tmp_path).on_multirun_end({})  # type: ignore[arg-type]
    assert {path.name: path.read_text() for path in tmp_path.glob("*.*")} == {
        "summary.txt": "earlier",
        "summary.json": "earlier",
    }
