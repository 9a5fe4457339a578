"""Fill the tables of docs/RESULTS.md from the committed results: ``python scripts/report.py``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studies.pareto import COLUMNS, cells, equals, frontier
from studies.realtime_play import MEASURED
from studies.rows import markdown_table

from bac.control import Seam
from bac.errors import InvalidInput, MissingArtefact, sentence
from bac.files import write_whole
from bac.statistics import paired_difference
from configs.entry import script
from configs.schema import ReportConfig

_BLOCK = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
_RIVAL = "bac-s10"
_OURS = ("bac_weighted", "search")


def main(config: ReportConfig, folder: Path) -> None:
    """Rewrite the document."""
    document = Path(config.document)
    text = filled(document.read_text(), Path(config.results))
    write_whole(document, lambda path: path.write_text(text))
    print(f"wrote {document}")


def filled(text: str, results: Path) -> str:
    """Return the text with every table made anew.

    Raises:
        InvalidInput: a table that nobody knows.
        MissingArtefact: results that are not there.
    """

    def table(found: re.Match[str]) -> str:
        name, *arguments = found[2].split()
        if name not in _TABLES:
            raise InvalidInput(
                sentence("table", expected=f"one of {sorted(_TABLES)}", got=name, mend="correct the document")
            )
        return f"{found[1]}{_TABLES[name](results.joinpath(*arguments))}{found[3]}"

    return _BLOCK.sub(table, text)


def _file(path: Path) -> str:
    """Return a table as a study wrote it."""
    if not path.is_file():
        raise MissingArtefact(sentence("table", expected=f"a file {path}", got="none", mend="run its study"))
    return path.read_text()


def _rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in json.loads(_file(folder / "results.json"))["rows"]}


def _equal(folder: Path) -> str:
    """Return each method's best row at equal cost, the least error first."""
    limit = json.loads(_file(folder / "results.json"))["provenance"]["config"]["pareto"]["equal_gflops"]
    rows = _rows(folder)
    chosen = sorted((rows[label] for label in equals(rows, limit)), key=lambda row: row["error"] or float("inf"))
    return markdown_table(COLUMNS, map(cells, (rows["none"], *chosen)))


def _frontier(folder: Path) -> str:
    """Return the rows that no other beats in both GFLOPs and error."""
    rows = _rows(folder)
    return markdown_table(COLUMNS, [cells(rows[label]) for label in frontier(rows)])


def _last_step(folder: Path) -> str:
    """Return what the forced last step is worth: its rows beside those without it."""
    rows = _rows(folder)
    pairs = [(rows[label.removesuffix("-free")], rows[label]) for label in rows if label.endswith("-free")]
    columns = ("method", "GFLOPs forced, free", "action error forced", "free", "score forced", "free")
    return markdown_table(
        columns,
        [
            (
                forced["label"],
                f"{forced['gflops']:.2f}, {free['gflops']:.2f}",
                f"{forced['error']:.4f}",
                f"{free['error']:.4f}",
                *(f"{row['score']['mean']:.3f}" if "score" in row else "-" for row in (forced, free)),
            )
            for forced, free in pairs
        ],
    )


def _against_bac(folder: Path) -> str:
    """Return how far our methods are past BAC's paper setting: error at its GFLOPs, GFLOPs at its error."""
    rows = _rows(folder)
    rival = rows[_RIVAL]
    lines = []
    for name in _OURS:
        ours = [row for row in rows.values() if row["method"] == name]
        as_dear = [row for row in ours if row["gflops"] <= rival["gflops"]]
        as_good = [row for row in ours if row["error"] <= rival["error"]]
        if not as_dear or not as_good:
            continue
        best = min(as_dear, key=lambda row: float(row["error"]))
        cheapest = min(as_good, key=lambda row: float(row["gflops"]))
        lines.append(
            (
                name,
                f"{best['label']}: {best['error']:.4f} at {best['gflops']:.2f} G",
                f"{best['error'] / rival['error']:.0%}",
                f"{cheapest['label']}: {cheapest['error']:.4f} at {cheapest['gflops']:.2f} G",
                f"{cheapest['gflops'] / rival['gflops']:.0%}",
            )
        )
    told = f"{_RIVAL}: {rival['error']:.4f} at {rival['gflops']:.2f} G"
    columns = (f"against {told}", "least error at no more GFLOPs", "share", "fewest GFLOPs at no more error", "share")
    return markdown_table(columns, lines)


def _seams(folder: Path) -> str:
    """Return what the seams do where each row has its own latency: jumps, and scores paired with those of replace."""
    points = [each for each in json.loads(_file(folder / "results.json"))["points"] if each["latency"] == MEASURED]
    replaced = {each["row"]: each["scores"] for each in points if each["seam"] == Seam.REPLACE}
    columns = ("method", "seam", "latency p99 ms", "seam jump", "step within a chunk", "score", "against replace")
    return markdown_table(
        columns,
        [
            (
                each["row"],
                each["seam"],
                f"{each['p99_ms']:.0f}",
                f"{each['seam_jump']['mean']:.1f}",
                f"{each['step_within_chunk']['mean']:.1f}",
                f"{each['score']['mean']:.3f}",
                paired_difference(each["scores"], replaced[each["row"]]).signed,
            )
            for each in points
        ],
    )


_TABLES: dict[str, Callable[[Path], str]] = {
    "file": _file,
    "equal": _equal,
    "frontier": _frontier,
    "last_step": _last_step,
    "against_bac": _against_bac,
    "seams": _seams,
}


if __name__ == "__main__":
    script("report", ReportConfig)(main)()
