"""Processes of one's own to work in: spawned, and gone when their parent is."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from threading import Thread

from envs.errors import EnvError


def spawned(processes: int, sent: object) -> ProcessPoolExecutor:
    """Return a pool of so many processes; spawned, for a fork would share the parent's graphics and threads.

    Args:
        processes: at least 1.
        sent: what they will work with. Only where it is of the parent's main module do they import that: a script's
            imports, torch and plots, take seconds and no environment needs them.

    Raises:
        EnvError: it cannot be sent.
    """
    try:
        of_main = b"__main__" in pickle.dumps(sent)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise EnvError(
            "environment processes: expected what another process can import, as a function that a module has, got "
            f"{sent} ({error}); define it there, or play with processes=1."
        ) from error
    context = SpawnContext() if of_main else _WithoutMain()
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_watch_parent)


class _Process(SpawnProcess):
    def start(self) -> None:
        with _main_left_out():
            super().start()


class _WithoutMain(SpawnContext):
    Process = _Process


@contextmanager
def _main_left_out() -> Iterator[None]:
    """Let the main module seem to come from nowhere, which is how ``spawn`` knows that there is none to import."""
    main = vars(sys.modules["__main__"])
    kept = {name: main[name] for name in main if name in {"__spec__", "__file__"}}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(kept)


def _watch_parent() -> None:
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process once its parent is gone: a killed parent cannot tell it to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
