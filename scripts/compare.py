"""Put evaluations of the same episodes side by side: paired differences, a Markdown table, a trade-off plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from studies.evaluations import RESULTS_FILE, read_evaluation, require_same_episodes, run_name

from bac.files import write_whole
from bac.pictures import save_figure
from bac.results import write_results
from bac.statistics import Estimate, mean_estimate, paired_difference
from configs.entry import script
from configs.schema import CompareConfig

_COLUMNS = (
    "run", "GFLOPs", "action error", "score", "difference, paired", "success", "p50 ms", "Hz at p99",
    "against own uncached",
)  # fmt: skip


def main(config: CompareConfig, folder: Path) -> None:
    """Write ``table.md``, ``tradeoff.png`` and ``results.json`` into ``folder``; print the table."""
    reference = read_evaluation(Path(config.reference))
    runs = [read_evaluation(Path(run)) for run in config.runs]
    for run in runs:
        require_same_episodes(reference, run)
    rows = [_row(each, reference) for each in (reference, *runs)]
    table = "\n".join([_line(_COLUMNS), _line(("---",) * len(_COLUMNS)), *(_line(_cells(row)) for row in rows)]) + "\n"
    write_whole(folder / "table.md", lambda path: path.write_text(table))
    save_figure(_tradeoff(rows), folder / "tradeoff.png")
    write_results(folder / RESULTS_FILE, {"episodes": reference["episodes"], "seed": reference["seed"], "rows": rows})
    print(f"{reference['episodes']} episodes from seed {reference['seed']}\n\n{table}\nresults in {folder}")


def _row(run: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    difference = paired_difference(run["scores"], reference["scores"])
    return {
        "run": run_name(run),
        "gflops": run["gflops"]["cached"],
        "action_error": run["action_error"]["mean"],
        # Not the run's own: of 0 and 1 alone, it may be from before such scores had Wilson's interval.
        "score": asdict(mean_estimate(run["scores"])),
        "score_difference": asdict(difference),
        "success": run["success"],
        "p50_ms": run["latency_ms"]["cached"]["p50"],
        "control_rate_hz": run["control_rate_hz"]["cached"],
        "speedup": run["speedup"],
        "commit": run["provenance"]["commit"],
        "command": run["provenance"]["command"],
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["run"],
        f"{row['gflops']:.2f}",
        # Errors are against the uncached policy with the run's own sampler.
        "-" if row["run"].startswith("none") else f"{row['action_error']:.4f}",
        str(Estimate(**row["score"])),
        Estimate(**row["score_difference"]).signed,
        f"{row['success']['mean']:.2f}",
        f"{row['p50_ms']:.0f}",
        f"{row['control_rate_hz']:.1f}",
        f"{row['speedup']:.1f}x",
    )


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _tradeoff(rows: list[dict[str, Any]]) -> Figure:
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axis.axhspan(rows[0]["score"]["low"], rows[0]["score"]["high"], color="tab:gray", alpha=0.15)
    for row in rows:
        score = row["score"]
        below, above = score["mean"] - score["low"], score["high"] - score["mean"]
        axis.errorbar(row["gflops"], score["mean"], [[below], [above]], fmt="o", capsize=3)
        axis.annotate(row["run"], (row["gflops"], score["mean"]), fontsize=7, xytext=(5, 4), textcoords="offset points")
    axis.set_xscale("log")
    axis.set(xlabel="GFLOPs per action chunk", ylabel="mean score, 95 % interval")
    return figure


if __name__ == "__main__":
    script("compare", CompareConfig)(main)()
