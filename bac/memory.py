"""Peak memory of a piece of work, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def peak_memory(work: Callable[[], object]) -> int:
    """Return by how many bytes ``work`` raises the peak of a fresh process above its imports.

    Args:
        work: picklable; what its module imports is imported before the measurement begins.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_raised_peak, work).result()


def _raised_peak(work: Callable[[], object]) -> int:
    before = _peak()
    work()
    return _peak() - before


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
