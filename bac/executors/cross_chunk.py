"""Cross-chunk executor: eager, with half of the updates recalled from the chunk before, moved on to the present.

::

    chunk n - 1   f0 f1 f2 f3 f4 f5 f6 f7        features of one block at one step, a token each
    chunk n             f2 f3 f4 f5 f6 f7 f7 f7  where chunk n recalls it, two actions having been executed

The state between calls is explicit: the features that the latest call left, each row's under its key (episode, chunk
number). Row (e, n) recalls what (e, n - 1) left there, and computes all where nothing is; so a new episode, a missing
chunk or a call of another batch in between cost time and never bring in a feature of something else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bac.errors import InvalidInput, sentence
from bac.executors.base import ChunkNoise
from bac.executors.committed import Committed
from bac.executors.eager import EagerExecutor
from bac.plan import Plan
from bac.sampler_table import SamplerTable
from bac.trunk import ResidualTrunk

_Key = tuple[int, int]
_Place = tuple[int, int]
"""(block, step)."""


@dataclass(frozen=True)
class _Left:
    """What a call left of one row: ``features`` float[B, T, d] of its sub-batch, before they are moved on."""

    features: Mapping[_Place, Tensor]
    row: int


@dataclass(frozen=True)
class _Call:
    """The condition of a sub-batch: the trunk's, what is recalled, float[B, T, d], and where to leave what."""

    condition: Any
    recalled: Mapping[_Place, Tensor]
    leaves: frozenset[_Place]
    left: dict[_Place, Tensor] = field(default_factory=dict)


class CrossChunkExecutor:
    """Runs a plan; some of its updates recall features instead of computing them.

    Safe to call from several threads at once, but only the features of the latest call are kept: the chunks of an
    episode must come from one call after the other, its rows together or alone.

    Args:
        plan: operations per step.
        trunk: the weights; its blocks must be the plan's.
        sampler: K steps, as many as the plan.
        recall: bool[2, blocks, K], as ``CacheSchedule.recall``.
        action_steps: actions executed between two chunks of an episode.

    Raises:
        InvalidInput: ``action_steps`` is not given, or below 1.
        Mismatch: plan, trunk and sampler do not belong together.
    """

    def __init__(
        self, plan: Plan, trunk: ResidualTrunk, sampler: SamplerTable, recall: np.ndarray, action_steps: int | None
    ) -> None:
        if action_steps is None or action_steps < 1:
            raise InvalidInput(
                sentence(
                    "executed actions",
                    expected="at least 1, for a schedule that recalls the chunk before",
                    got=action_steps,
                    mend="give action_steps, the actions executed of a chunk",
                )
            )
        self.plan = plan
        self._trunk = _RecallingTrunk(trunk)
        self._eager = EagerExecutor(plan, self._trunk, sampler)
        self._steps = sampler.steps
        self._recall = tuple(frozenset((int(b), int(s)) for b, s in np.argwhere(half)) for half in recall)
        self._action_steps = action_steps
        self._left: Mapping[_Key, _Left] = {}

    @torch.inference_mode()
    def __call__(self, observation: Tensor, noise: ChunkNoise, committed: Committed | None = None) -> Tensor:
        """Return the normalised action chunk float32[B, T, Da] for normalised observations float32[B, To, Do].

        Raises:
            InvalidInput: the noise has no keys, or two equal ones, or the committed actions do not fit.
        """
        noise.require(observation.shape[0], self._steps)
        if committed is not None:
            committed.require(noise)
        keys = _require_keys(noise)
        # Read once: another thread may put its own in place meanwhile.
        before = self._left
        left: dict[_Key, _Left] = {}
        groups: dict[tuple[bool, int], list[int]] = defaultdict(list)
        for row, (episode, number) in enumerate(keys):
            groups[(episode, number - 1) in before, number % 2].append(row)
        chunk = torch.empty_like(noise.initial)
        for (known, parity), rows in groups.items():
            previous = [before[keys[row][0], keys[row][1] - 1] for row in rows] if known else []
            recalled = {place: self._moved(place, previous) for place in self._recall[parity]} if known else {}
            call = _Call(self._trunk.condition(observation[rows]), recalled, self._recall[1 - parity])
            given = None if committed is None else committed.rows(rows)
            chunk[rows] = self._eager.denoise(call, noise.rows(rows), given)
            left |= {keys[row]: _Left(call.left, place) for place, row in enumerate(rows)}
        self._left = left
        return chunk

    def _moved(self, place: _Place, previous: Sequence[_Left]) -> Tensor:
        """Return float[B, T, d], token t from token t + action_steps, the last ones without such all from the last."""
        features = torch.stack([each.features[place][each.row] for each in previous])
        tokens = torch.arange(features.shape[1], device=features.device) + self._action_steps
        return features.index_select(1, tokens.clamp_(max=features.shape[1] - 1))


class _RecallingTrunk:
    """A trunk whose branches give what is recalled and leave what will be; all else passes through."""

    def __init__(self, trunk: ResidualTrunk) -> None:
        self._trunk = trunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def step_tables(self, timesteps: np.ndarray) -> Sequence[tuple[int, Any]]:
        return list(enumerate(self._trunk.step_tables(timesteps)))

    def branch(self, block: int, stream: Tensor, table: tuple[int, Any], condition: _Call) -> Tensor:
        step, inner = table
        feature = condition.recalled.get((block, step))
        if feature is None:
            feature = self._trunk.branch(block, stream, inner, condition.condition)
        if (block, step) in condition.leaves:
            condition.left[block, step] = feature
        return feature


def _require_keys(noise: ChunkNoise) -> tuple[_Key, ...]:
    if noise.keys is None or len(set(noise.keys)) != len(noise.keys):
        raise InvalidInput(
            sentence(
                "chunk noise",
                expected="a key (episode, chunk number) of its own per row, since features are recalled by it",
                got="none" if noise.keys is None else f"{len(set(noise.keys))} different ones of {len(noise.keys)}",
                mend="give noise_keys to predict",
            )
        )
    return noise.keys
