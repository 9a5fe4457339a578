"""Peak memory of a piece of work, measured in a process of its own."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bac.errors import Unavailable, sentence

_POPULATE_READ = 22
"""``MADV_POPULATE_READ`` of Linux 5.14 and later."""


def peak_memory(work: Callable[[], object], imports: Sequence[str] = ()) -> int:
    """Return by how many bytes ``work`` raises the peak of a fresh process above its imports.

    Args:
        work: picklable; what its module imports is imported, and read whole, before the measurement begins.
        imports: further modules to import before it, for work that imports late.

    Raises:
        Unavailable: the system keeps no ``/proc``.
    """
    if not Path("/proc/self/status").exists():
        raise Unavailable(sentence("peak memory", expected="Linux", got=sys.platform, mend="measure it on Linux"))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_raised_peak, work, tuple(imports)).result()


def _raised_peak(work: Callable[[], object], imports: tuple[str, ...]) -> int:
    for name in imports:
        importlib.import_module(name)
    _load_mapped_files()
    before = _kilobytes("VmRSS")
    work()
    return (_kilobytes("VmHWM") - before) * 1024


def _load_mapped_files() -> None:
    """Read every page of the libraries that are mapped but not yet read, so that reading them later adds nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, inode, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        if inode != "0" and access.startswith("r"):
            # A mapping that refuses (a device, a file cut short) stays as it is.
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _POPULATE_READ)


def _kilobytes(field: str) -> int:
    """Read a field of this process's memory map; getrusage would give the parent's peak if that was higher."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
