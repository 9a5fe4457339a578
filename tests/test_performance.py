"""docs/PERFORMANCE.md and the README's speed table say what the committed benchmark results say."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "docs" / "results" / "bench"
STUDIES = {"latency": "table.md", "kitchen": "table.md", "kitchen16": "table.md", "tried": "tried.md"}


@pytest.mark.parametrize("study", STUDIES)
def test_tables_are_the_committed_ones(study: str) -> None:
    assert (BENCH / study / STUDIES[study]).read_text().strip() in (ROOT / "docs" / "PERFORMANCE.md").read_text()


@pytest.mark.parametrize("study", [*STUDIES, "growth"])
def test_results_come_from_a_clean_commit_by_a_command_the_page_names(study: str) -> None:
    provenance = json.loads((BENCH / study / "results.json").read_text())["provenance"]
    assert re.fullmatch(r"[0-9a-f]{40}", provenance["commit"])
    words = provenance["command"].replace("'", "").split("task=push_t")[1].split()
    overrides = [word for word in words if "hydra.run.dir" not in word]
    named = re.findall(r"`python scripts/bench.py task=push_t ?(.*)`", (ROOT / "docs" / "PERFORMANCE.md").read_text())
    assert sorted(overrides) in [sorted(command.replace("'", "").split()) for command in named]


def test_speed_rows_of_the_readme_are_rows_of_the_table() -> None:
    section = (ROOT / "README.md").read_text().split("## Speed")[1].split("##")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 5
    table = (BENCH / "latency" / "table.md").read_text().split("**checkpoint, batch 16")[0].splitlines()
    columns = rows[0].count("|") - 1
    assert set(rows) <= {"|".join([*line.split("|")[: columns + 1], ""]) for line in table}


# The ratios that the project promises, on one thread of the machine named in the results.
def test_promised_ratios_hold_in_the_committed_run() -> None:
    results = json.loads((BENCH / "latency" / "results.json").read_text())
    rows = {row["row"]: row for row in results["tables"][0]["rows"]}
    assert (results["tables"][0]["batch"], results["tables"][0]["threads"]) == (1, 1)
    assert rows["compiled, full"]["ratio"] >= 2
    assert rows["compiled, BAC S=10"]["ratio"] >= 10
    assert rows["compiled bf16, BAC S=10"]["ratio"] >= 16
    assert rows["hooks, BAC S=10"]["p50"] / rows["compiled, BAC S=10"]["p50"] >= 2.5
    assert all(start["ratio"] >= 5 for start in results["starts"].values())
