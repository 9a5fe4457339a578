"""Caching by patched branches, for networks we do not own: the network stays as it is and its own loop drives it.

Slower than a plan (the network still runs its norms, its condition encoder and its Python at every step), but it needs
only a table of sites: which method of which object computes which block.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from bac.errors import InvalidInput, Mismatch, sentence
from bac.schedule import CacheSchedule
from bac.trunk import Block


@dataclass(frozen=True)
class SiteTable:
    """Where a network computes its blocks.

    Attributes:
        network: the object whose ``forward`` is called once per denoising step.
        timestep: takes ``forward``'s arguments, returns the diffusion time step as an int.
        branches: block -> (object, name of the method that returns the feature), in the order of the stream.
    """

    network: Any
    timestep: Callable[..., int]
    branches: Mapping[Block, tuple[Any, str]]

    def __post_init__(self) -> None:
        missing = [str(block) for block, (owner, name) in self.branches.items() if not hasattr(owner, name)]
        if missing:
            raise InvalidInput(
                sentence(
                    "site table", expected="a method for every block", got=f"none for {missing}", mend="correct it"
                )
            )


class CacheHooks:
    """Applies a schedule to a network in place; ``detach`` (or leaving the ``with`` block) restores its own methods.

    A call is K forwards at ``timesteps[0], timesteps[1], ...`` in this order, from one thread. Anything else is
    refused: a feature must never reach another call. A chunk that its thread did not live to end is abandoned.

    Args:
        sites: where the blocks are.
        schedule: which of them to compute at which step.
        timesteps: int64[K], the time step of each denoising step.

    Raises:
        Mismatch: schedule, sites and time steps do not belong together.
        Unavailable: the schedule has token maps or recalls.
    """

    def __init__(self, sites: SiteTable, schedule: CacheSchedule, timesteps: np.ndarray) -> None:
        if schedule.blocks != tuple(sites.branches) or schedule.steps != len(timesteps):
            raise Mismatch(
                sentence(
                    "schedule",
                    expected=f"{len(timesteps)} steps of blocks {[str(block) for block in sites.branches]}",
                    got=f"{schedule.steps} steps of blocks {[str(block) for block in schedule.blocks]}",
                    mend="run scripts/calibrate.py for this policy and sampler",
                )
            )
        schedule.require_plain("hooks")
        self._sites = sites
        self._schedule = schedule
        self._timesteps = [int(timestep) for timestep in timesteps]
        self._features: dict[int, deque[Tensor]] = {}
        self._step = -1
        self._thread: threading.Thread | None = None
        self._restore = ExitStack()
        self._attached = False

    def __repr__(self) -> str:
        state = "attached" if self._attached else "detached"
        return f"CacheHooks({state}, {len(self._sites.branches)} sites, {self._schedule.updates} updates)"

    def __enter__(self) -> Self:
        return self if self._attached else self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def attach(self) -> Self:
        """Patch the network.

        Raises:
            InvalidInput: these hooks, or others, are attached to it already.
        """
        if "forward" in vars(self._sites.network):
            raise InvalidInput(
                sentence("network", expected="no cache hooks", got="hooks attached", mend="detach the others first")
            )
        self._step = -1
        # Leaving the inner stack early, on a site that cannot be patched, undoes the patches made so far.
        with ExitStack() as patched:
            patched.callback(_patch(self._sites.network, "forward", self._counted))
            for number, (owner, name) in enumerate(self._sites.branches.values()):
                patched.callback(_patch(owner, name, partial(self._cached, number)))
            self._restore = patched.pop_all()
        self._attached = True
        return self

    def detach(self) -> None:
        """Give the network its own methods back; does nothing when detached already."""
        self._restore.close()
        self._attached = False
        self._features.clear()

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_at_step(*args: Any, **kwargs: Any) -> Any:
            self._enter_step(self._sites.timestep(*args, **kwargs))
            result = forward(*args, **kwargs)
            if self._step == self._schedule.steps - 1:
                self._features.clear()
            return result

        return forward_at_step

    def _enter_step(self, timestep: int) -> None:
        # The thread itself: its number may go to another one when it has ended.
        thread = threading.current_thread()
        if self._thread is not None and not self._thread.is_alive():
            self._features.clear()
            self._step, self._thread = -1, None
        if timestep == self._timesteps[0]:
            if self._features and thread is not self._thread:
                raise _interleaved()
            self._features.clear()
            self._step, self._thread = 0, thread
            return
        following = self._step + 1
        if self._step >= 0 and thread is not self._thread:
            raise _interleaved()
        if self._step < 0 or following >= len(self._timesteps) or timestep != self._timesteps[following]:
            expected = self._timesteps[following] if 0 < following < len(self._timesteps) else self._timesteps[0]
            raise InvalidInput(
                sentence(
                    "time step of a cached network",
                    expected=f"{expected}, the next of the schedule, or {self._timesteps[0]} for a new chunk",
                    got=timestep,
                    mend="run the sampler the schedule was made for, from its first step",
                )
            )
        self._step = following

    def _cached(self, block: int, branch: Callable[..., Tensor]) -> Callable[..., Tensor]:
        update = self._schedule.mask[block].tolist()
        forecast = _forecast(self._schedule, block)

        def compute_or_reuse(*args: Any, **kwargs: Any) -> Tensor:
            if update[self._step]:
                latest = self._features.setdefault(block, deque(maxlen=self._schedule.history))
                latest.appendleft(branch(*args, **kwargs))
                return latest[0]
            features = self._features[block]
            if forecast is None:
                return features[0]
            weights = forecast[self._step]
            rows = weights.to(features[0]) if isinstance(weights, Tensor) else weights
            return sum(weight * each for weight, each in zip(rows, features, strict=False))

        return compute_or_reuse


def _forecast(schedule: CacheSchedule, block: int) -> list[list[float]] | Tensor | None:
    """Return the weights of a block's features per step: p numbers, or float64[p, d] where channels differ."""
    if schedule.forecast is None:
        return None
    if schedule.groups is None:
        return schedule.forecast[block].tolist()
    return torch.from_numpy(schedule.forecast[block][:, :, schedule.groups[block]])


def _patch(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Replace ``owner.name`` on the instance; return the function that undoes it."""
    own = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    if own is None:
        return lambda: delattr(owner, name)
    return lambda: setattr(owner, name, own)


def _interleaved() -> InvalidInput:
    return InvalidInput(
        sentence(
            "cached network",
            expected="one chunk at a time from one thread",
            got="a call from a second thread inside a chunk",
            mend="give each thread its own network, or use a plan executor",
        )
    )
