"""Results say where they come from and are written whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bac.results import run_provenance, write_results


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
