"""The scripts as commands, each in a process of its own that is forked from one which has their imports behind it.

A new interpreter would spend seconds on importing torch and plotting before the first line of a script. The forked one
runs the same file as ``__main__`` with its own arguments, folder, output and exit status.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
_LIMIT_S = 300
_IMPORTED = ("train", "calibrate", "eval", "bench", "latency_budget", "compare", "envs.push_t", "diffusers")


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str


def run_script(folder: Path, script: str, *overrides: str, status: int = 0) -> Done:
    """Run ``python scripts/SCRIPT.py OVERRIDES`` in a folder.

    Args:
        folder: the working directory.
        script: file name without its ending.
        overrides: the command line.
        status: what the exit status must be.
    """
    with tempfile.TemporaryDirectory() as kept:
        files = [str(Path(kept) / name) for name in ("stdout", "stderr")]
        request = {"folder": str(folder), "command": [str(SCRIPTS / f"{script}.py"), *overrides], "files": files}
        ended = _ask(json.dumps(request))
        done = Done(ended, *(Path(file).read_text() for file in files))
    assert done.status == status, done.stdout + done.stderr
    return done


def _ask(request: str) -> int:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(request, file=server.stdin, flush=True)
    if not select.select([server.stdout], [], [], _LIMIT_S)[0]:
        _stop(server)
        pytest.fail(f"not over after {_LIMIT_S} s: {request}")
    return int(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.commands"],
        cwd=SCRIPTS.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    """End the server and what it runs."""
    _server.cache_clear()
    if server.poll() is None:
        os.killpg(server.pid, 9)
    server.communicate()


def _serve() -> None:
    sys.path[0] = str(SCRIPTS)
    for name in _IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request["folder"], request["command"], request["files"])
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(folder: str, command: list[str], files: list[str]) -> None:
    """Be what the command line would have started; exceptions, SystemExit among them, end this process as any other."""
    os.chdir(folder)
    sources = [os.open(os.devnull, os.O_RDONLY), *(os.open(file, os.O_WRONLY | os.O_CREAT) for file in files)]
    for standard, source in enumerate(sources):
        os.dup2(source, standard)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    _serve()
