"""Processes to work in: what they import, and what they do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from envs.errors import EnvError
from envs.processes import spawned

PROGRAM = """
import sys
import torch  # torch: what a script imports and no environment needs
from configs.tasks import environment
from envs.processes import spawned
from tests.composing import composed


class Here:
    def __init__(self, number):
        self.number = number


def sent_from(script):
    return Here(7) if script else environment(composed("eval").task)


def imported(sent):
    built = sent() if callable(sent) else sent
    return "torch" in sys.modules, type(built).__name__


if __name__ == "__main__":
    from tests.envs import test_processes as other
    sent = sent_from(sys.argv[1] == "main")
    with spawned(1, sent) as pool:
        print(*pool.submit(imported if sys.argv[1] == "main" else other.imported, sent).result())
    print(__file__, __spec__)
"""


def imported(make_env: object) -> tuple[bool, str]:
    """Return whether torch is imported where this runs, and what was made."""
    assert callable(make_env)
    return "torch" in sys.modules, type(make_env()).__name__


@pytest.mark.parametrize(("sent", "told"), [("main", "True Here"), ("environment", "False PushTEnv")])
def test_the_main_module_is_imported_only_where_what_is_sent_is_of_it(sent: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(path), sent]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{told}\n{path} None\n"


def test_what_cannot_be_sent_is_refused_in_one_sentence() -> None:
    told = r"^environment processes: expected what another process can import, .*, got <.*lambda.*; define it there, or"
    with pytest.raises(EnvError, match=told):
        spawned(1, lambda: None)
