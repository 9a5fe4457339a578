"""What a study found so far, kept so that one that was killed goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bac.results import read_results, write_results


class Kept:
    """JSON values by key in one file, which is written after each.

    Args:
        path: of the file; read if it is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = read_results(path) if path.is_file() else {}

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what is kept under ``key``, or make and keep it."""
        if key not in self._known:
            self.put(key, make())
        return self._known[key]

    def put(self, key: str, value: Any) -> None:
        """Keep a value under ``key``."""
        self._known[key] = value
        write_results(self._path, self._known)
