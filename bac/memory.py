"""Peak memory of a piece of work, measured in a process of its own."""

from __future__ import annotations

import importlib
import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path


def peak_memory(work: Callable[[], object], imports: Sequence[str] = ()) -> int:
    """Return by how many bytes ``work`` raises the peak of a fresh process above its imports.

    Args:
        work: picklable; what its module imports is imported before the measurement begins.
        imports: further modules to import before it, for work that imports late.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_raised_peak, work, tuple(imports)).result()


def _raised_peak(work: Callable[[], object], imports: tuple[str, ...]) -> int:
    for name in imports:
        importlib.import_module(name)
    before = _resident()
    work()
    return _peak() - before


def _resident() -> int:
    """Return the bytes in memory now; where the system does not tell, the peak so far, which importing may have set."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else _peak()


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
