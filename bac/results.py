"""What a result must say of itself, and how it is written."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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


def run_provenance(device: torch.device, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return commit, command, device, threads, dtype, versions and configuration of this process."""
    return {
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
        "device": _device_name(device),
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


def _commit() -> str:
    """Return the commit of this checkout, ``+dirty`` if files differ from it, or ``unknown`` outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
