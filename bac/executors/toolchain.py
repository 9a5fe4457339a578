"""Builds a C++ source into a shared library once per machine, and finds it again the next time."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from bac.errors import Unavailable, sentence
from bac.files import write_whole

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
_COMPILERS = ("c++", "g++", "clang++")


def build_library(source: Path, defines: Mapping[str, int]) -> ctypes.CDLL:
    """Return the library of ``source`` compiled with ``defines``, from the cache if it was built on this machine.

    The cache is ``$BAC_CACHE``, else ``bac`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Its file names are digests of
    source, flags, compiler and processor, so that nothing stale is ever loaded.

    Raises:
        Unavailable: no compiler, it refuses the source, nothing can be written to the cache, or what lies there cannot
            be loaded.
    """
    compiler = _compiler()
    flags = [*_FLAGS, *(f"-D{name}={value}" for name, value in sorted(defines.items()))]
    identity = [source.read_text(), *flags, compiler, str(Path(compiler).resolve().stat().st_mtime_ns), _processor()]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()
    library = cache_folder() / f"{source.stem}-{digest[:24]}.so"
    if library.exists():
        # A damaged one is built again, as if it were missing.
        with suppress(OSError):
            return ctypes.CDLL(str(library))
    _require_writable(library.parent)
    write_whole(library, partial(_compile, compiler, flags, source))
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise Unavailable(
            sentence(
                "compiled code",
                expected="a library that can be loaded",
                got=error,
                mend="set BAC_CACHE to a folder that may hold programs, or use executor=eager",
            )
        ) from error


def cache_folder() -> Path:
    """Return where compiled artefacts are kept."""
    if chosen := os.environ.get("BAC_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bac"


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise Unavailable(
            sentence(
                "cache of compiled code",
                expected="a writable folder",
                got=folder,
                mend="set BAC_CACHE to one, or use executor=eager",
            )
        )


def _compiler() -> str:
    chosen = os.environ.get("CXX")
    for name in (chosen,) if chosen else _COMPILERS:
        if found := shutil.which(name):
            return found
    raise Unavailable(
        sentence(
            "C++ compiler",
            expected=chosen or f"one of {', '.join(_COMPILERS)} on PATH, or CXX set",
            got="none",
            mend="install g++, or use executor=eager",
        )
    )


def _compile(compiler: str, flags: list[str], source: Path, library: Path) -> None:
    done = subprocess.run(
        [compiler, *flags, "-o", str(library), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [*done.stderr.splitlines(), f"exit status {done.returncode}"]
        complaint = next((line for line in lines if "error" in line), lines[0])
        raise Unavailable(
            sentence(
                f"compiling {source.name}",
                expected=f"success of {compiler}",
                got=complaint,
                mend="use g++ 9 or clang 12 or later, or executor=eager",
            )
        )


def _processor() -> str:
    """Return what ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(features)])
