"""The README says what the repository holds: its tables are the committed results, its commands exist."""

import json
import re
import shlex
from pathlib import Path

import pytest

from configs.schema import EvalConfig, TrainConfig
from tests.composing import composed

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


def commands() -> list[tuple[str, list[str]]]:
    """Return script and overrides of every command in a block of the README."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    found = [re.search(r"python scripts/(\w+)\.py (.*)", line) for line in lines]
    return [(each[1], shlex.split(each[2], comments=True)) for each in found if each is not None]


def test_commands_in_blocks_compose() -> None:
    assert len(commands()) >= 10
    for script, overrides in commands():
        composed(script, *overrides)


@pytest.mark.parametrize(("task", "file"), [("can", "low_dim.hdf5"), ("lift_image", "image.hdf5")])
def test_recording_is_what_training_and_evaluation_read(task: str, file: str) -> None:
    chain = [composed(script, *overrides) for script, overrides in commands() if f"task={task}" in overrides]
    recorded, trained, played = chain[-3:]
    assert isinstance(trained, TrainConfig)
    assert isinstance(played, EvalConfig)
    assert f"{recorded.output}/{file}" == trained.demonstrations == played.demonstrations
    assert played.checkpoint == f"{trained.output}/checkpoint.safetensors"


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"@[A-Z_]+@|TODO|XXX", README)
