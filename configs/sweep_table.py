"""The table at the end of a sweep: what each job overrode and what came out."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from bac.files import write_whole

RESULTS_FILE = "results.json"


class SweepTable(Callback):
    """Collects every job's results file; prints and keeps one table when the sweep ends."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, dict[str, Any]]] = []
        self._folder = Path()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Remember what a job wrote; a failed job has nothing to remember."""
        assert job_return.hydra_cfg is not None  # Hydra sets it before any job starts
        results = Path(job_return.hydra_cfg.hydra.runtime.output_dir) / RESULTS_FILE
        # The jobs' common folder is the sweep's; when the sweep ends, Hydra can no longer say where it was.
        self._folder = results.parent.parent
        if results.is_file():
            self._rows.append((" ".join(job_return.overrides or []), json.loads(results.read_text())))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table and write it as ``summary.txt`` and ``summary.json`` into the sweep's folder."""
        rows = [(overrides, results) for overrides, results in self._rows if "score" in results]
        if not rows:
            return
        table = Table("overrides", "score", "95 %", "success", "GFLOPs", "p50 ms", "speed-up", "action error")
        for overrides, results in rows:
            table.add_row(overrides, *_cells(results))
        Console().print(table)
        drawn = StringIO()
        Console(file=drawn, width=160).print(table)
        _write(self._folder / "summary.txt", drawn.getvalue())
        document = [{"overrides": overrides, **results} for overrides, results in rows]
        _write(self._folder / "summary.json", json.dumps(document, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text))


def _cells(results: dict[str, Any]) -> list[str]:
    score = results["score"]
    return [
        f"{score['mean']:.3f}",
        f"{score['low']:.3f} .. {score['high']:.3f}",
        f"{results['success']['mean']:.2f}",
        f"{results['gflops']['cached']:.2f}",
        f"{results['latency_ms']['cached']['p50']:.1f}",
        f"{results['speedup']:.1f}x",
        f"{results['action_error']['mean']:.4f}",
    ]
