"""What a result must say of itself, and how it is written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bac.errors import CorruptArtefact, MissingArtefact, sentence
from bac.files import write_whole

_PACKAGES = (
    "torch",
    "numpy",
    "diffusers",
    "cache-dit",
    "gymnasium",
    "gym-pusht",
    "pymunk",
    "robomimic",
    "mujoco",
    "zarr",
    "hydra-core",
)


_BOARD = Path("/proc/device-tree/model")
_PROCESSORS = Path("/proc/cpuinfo")


def run_provenance(device: torch.device, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return commit, command, device, threads, dtype, versions and configuration of this process."""
    return {
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "config": dict(config),
    }


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write a JSON document, whole or not at all; NaN is refused."""
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))


def read_results(path: Path) -> dict[str, Any]:
    """Read what ``write_results`` wrote.

    Raises:
        MissingArtefact: no such file.
        CorruptArtefact: not a JSON document with names.
    """
    if not path.is_file():
        raise MissingArtefact(
            sentence("results", expected=f"a file {path}", got="none", mend="give the results.json of a run")
        )
    try:
        results = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or no text
        raise _no_results(path, error) from error
    if not isinstance(results, dict):
        raise _no_results(path, f"a {type(results).__name__}")
    return results


def _no_results(path: Path, got: object) -> CorruptArtefact:
    return CorruptArtefact(
        sentence(str(path), expected="a JSON document of results", got=got, mend="give the results.json of a run")
    )


def _commit() -> str:
    """Return the commit of this checkout, ``+dirty`` if files differ from it, or ``unknown`` outside a checkout."""
    file = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # A package installed below somebody else's checkout is no part of it.
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    """Return board and chip; the board where the machine names one, for many a board has the same chip."""
    board = _BOARD.read_text(errors="replace").strip("\0 \n") if _BOARD.exists() else ""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return f"{board}, {chip}" if board else chip


def _processor_name() -> str:
    lines = _PROCESSORS.read_text().splitlines() if _PROCESSORS.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else f"{platform.machine()} x {os.cpu_count()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
