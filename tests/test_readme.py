"""The README says what the repository holds: its tables are the committed results, its commands exist."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "docs" / "results" / "push_t"


def test_results_table_is_the_committed_one() -> None:
    assert (RESULTS / "table.md").read_text().strip() in README


def test_committed_results_come_from_clean_commits_and_name_their_commands() -> None:
    rows = json.loads((RESULTS / "results.json").read_text())["rows"]
    assert rows[0]["run"] == "none"
    assert len(rows) > 1
    for row in rows:
        assert re.fullmatch(r"[0-9a-f]{40}", row["commit"]), row["run"]
        assert "scripts/eval.py" in row["command"]


def test_scripts_and_pictures_named_in_the_readme_exist() -> None:
    for name in set(re.findall(r"scripts/\w+\.py", README)) | set(re.findall(r"\((docs/[^)#]+)\)", README)):
        assert (ROOT / name).exists(), name


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"@[A-Z_]+@|TODO|XXX", README)
