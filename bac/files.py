"""Writing a file so that a killed process never leaves half of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, then move it there in one step.

    The contents are on the disk before the name is: a power cut leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Containers and hosts that share a folder have equal process numbers, threads the same one.
    partial = path.with_name(f".partial-{os.getpid()}-{os.urandom(4).hex()}-{path.name}")
    try:
        write(partial)
        with partial.open("r+b") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
