"""The cache schedule: which block is recomputed at which denoising step, known before the first observation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bac.errors import CorruptArtefact, InvalidInput, Mismatch, MissingArtefact, Unavailable, sentence
from bac.files import write_whole
from bac.partial_updates import (
    read_recall,
    read_tokens,
    recall_document,
    share_of_tokens,
    sound_recall,
    sound_tokens,
    token_document,
)
from bac.predictions import (
    Weight,
    forecast_document,
    group_document,
    read_forecast,
    read_groups,
    sound_forecast,
    sound_groups,
)
from bac.trunk import Block

_FORMAT = "bac-schedule-1"
_MOST_STEPS = 100_000
"""A hundred times what diffusion processes have; a damaged number must not ask for all memory."""


@dataclass(frozen=True)
class Provenance:
    """What a profile or schedule was made for; it serves nothing else.

    Attributes:
        checkpoint: digest of the weights (hex).
        sampler: identity of the sampler table.
    """

    checkpoint: str
    sampler: Mapping[str, str | int | float]

    def __post_init__(self) -> None:
        # A plain dict: schedules travel between processes, and a read-only view cannot.
        object.__setattr__(self, "sampler", dict(self.sampler))

    def require(self, other: Provenance, what: str) -> None:
        """Refuse unless ``other``, what is about to run, is the same.

        Raises:
            Mismatch: another checkpoint or sampler.
        """
        if self.checkpoint != other.checkpoint:
            raise Mismatch(
                sentence(
                    f"{what} and checkpoint",
                    expected=f"checkpoint {self.checkpoint[:12]}",
                    got=other.checkpoint[:12],
                    mend="run scripts/calibrate.py on this checkpoint",
                )
            )
        if self.sampler != other.sampler:
            raise Mismatch(
                sentence(
                    f"{what} and sampler",
                    expected=self.sampler,
                    got=other.sampler,
                    mend="run scripts/calibrate.py with this sampler",
                )
            )


@dataclass(frozen=True, eq=False)
class CacheSchedule:
    """Block x step booleans: True recomputes the block, False reuses its latest feature, or predicts it.

    Attributes:
        mask: bool[blocks, K]; column 0 is True, since nothing is cached before it.
        blocks: the rows, in the order of the residual stream.
        provenance: the checkpoint and sampler it was made for.
        method: who chose the mask, for instance ``bac``.
        parameters: of the method.
        forecast: float64[blocks, K, p], how a reused feature is predicted: the sum over j of ``forecast[block, step,
            j]`` times the block's j-th latest computed feature (0 the latest); 0 where the block updates. None reuses
            the latest feature as it is. With groups float64[blocks, K, p, G], a weight per group of channels.
        groups: int64[blocks, d] in [0, G), which group each channel of the stream belongs to; None where all channels
            are predicted alike.
        tokens: int8[blocks, K, T], what each action token takes at an update: entry t' >= 0 the fresh feature of token
            t', which is itself computed (t' = t) or, where t' != t, stands for this one too; -1 the feature the token
            had before. All -1 where the block does not update. None where every update computes all tokens; given as
            an array that says so, it becomes None.
        recall: bool[2, blocks, K], the updates that chunk n of an episode does not compute but takes from chunk n - 1,
            its tokens shifted by the actions executed in between: ``recall[0]`` of even n, ``recall[1]`` of odd n. No
            update is in both, so that nothing is older than a chunk. The first chunk computes all. None recalls none.

    Plans and hooks know nothing of token maps and recalls; what ``bac.build_executor`` makes follows them.
    """

    mask: np.ndarray
    blocks: tuple[Block, ...]
    provenance: Provenance
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    forecast: np.ndarray | None = None
    groups: np.ndarray | None = None
    tokens: np.ndarray | None = None
    recall: np.ndarray | None = None

    def __post_init__(self) -> None:
        mask = np.array(self.mask, dtype=bool)
        if mask.ndim != 2 or mask.shape[0] != len(self.blocks) or mask.shape[1] < 1:
            raise InvalidInput(
                sentence(
                    "schedule mask",
                    expected=f"bool[{len(self.blocks)} blocks, steps]",
                    got=f"shape {mask.shape}",
                    mend="give one row per block",
                )
            )
        late = [str(self.blocks[row]) for row in np.flatnonzero(~mask[:, 0])]
        if late:
            raise InvalidInput(
                sentence(
                    "schedule step 0",
                    expected="an update of every block",
                    got=f"none of {late}",
                    mend="add step 0 to these blocks: nothing is cached before it",
                )
            )
        mask.setflags(write=False)
        object.__setattr__(self, "mask", mask)
        if self.forecast is not None:
            object.__setattr__(self, "forecast", sound_forecast(self.forecast, mask, self.groups is not None))
        if self.groups is not None:
            object.__setattr__(self, "groups", sound_groups(self.groups, mask, self.forecast))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", sound_tokens(self.tokens, mask))
        if self.recall is not None:
            object.__setattr__(self, "recall", sound_recall(self.recall, mask))
        if self.tokens is not None and self.recall is not None:
            raise InvalidInput(
                sentence("schedule", expected="token maps or recalls", got="both", mend="use one of the methods")
            )

    @property
    def steps(self) -> int:
        """Number of denoising steps K."""
        return self.mask.shape[1]

    @property
    def updates(self) -> int:
        """Number of block updates in a call, out of blocks x K, partial and recalled ones included."""
        return int(self.mask.sum())

    @property
    def share(self) -> np.ndarray:
        """Return float64[blocks, K], in [0, 1]: what part of a whole update a block computes at each step, by FLOPs.

        0 where it reuses or predicts. A recalled update counts as the mean of an even and an odd chunk, the first chunk
        of an episode left out.
        """
        whole = self.mask.astype(np.float64) if self.tokens is None else share_of_tokens(self.tokens, self.blocks)
        return whole if self.recall is None else whole - self.recall.mean(axis=0)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what is done and what it was made for; the method's name does not enter."""
        sampler = sorted(self.provenance.sampler.items())
        identity: list[Any] = [self._update_steps(), self.steps, self.provenance.checkpoint, sampler]
        if self.forecast is not None:
            identity.append(forecast_document(self.forecast, self.mask, self.blocks))
        if self.groups is not None:
            identity.append(group_document(self.groups, self.blocks))
        if self.tokens is not None:
            identity.append({"tokens": token_document(self.tokens, self.blocks)})
        if self.recall is not None:
            identity.append({"recall": recall_document(self.recall, self.blocks)})
        text = json.dumps(identity)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def history(self) -> int:
        """How many computed features of a block a prediction may read, p."""
        return 1 if self.forecast is None else self.forecast.shape[2]

    def terms(self, block: int, step: int) -> tuple[tuple[int, Weight], ...]:
        """Return what block number ``block`` adds at ``step``: (step it was computed at, weight), the latest first."""
        computed = np.flatnonzero(self.mask[block, : step + 1])[::-1]
        if self.forecast is None or self.mask[block, step]:
            return ((int(computed[0]), 1.0),)
        return tuple((int(computed[place]), weight) for place, weight in self.weights(block, step))

    def weights(self, block: int, step: int) -> tuple[tuple[int, Weight], ...]:
        """Return how block ``block`` is predicted at ``step``: (0 for its latest feature and so on, weight), no zeros.

        The weights are one number each where all groups have the same.
        """
        if self.forecast is None:
            return ((0, 1.0),)
        rows = self.forecast[block, step]
        if rows.ndim == 2 and (rows == rows[:, :1]).all():
            rows = rows[:, 0]
        return tuple(
            (place, float(weight) if weight.ndim == 0 else tuple(weight.tolist()))
            for place, weight in enumerate(rows)
            if weight.any()
        )

    def with_last_step(self) -> CacheSchedule:
        """Return the schedule that also updates every block at step K - 1 (the authors' code always does)."""
        mask = self.mask.copy()
        mask[:, -1] = True
        tokens, recall = (None if each is None else each.copy() for each in (self.tokens, self.recall))
        if tokens is not None:
            tokens[:, -1] = np.arange(tokens.shape[2])
        if recall is not None:
            recall[:, :, -1] = False
        return replace(self, mask=mask, tokens=tokens, recall=recall)

    def plain(self) -> CacheSchedule:
        """Return the same mask and predictions with whole updates, computed in every chunk, which a plan can say."""
        return replace(self, tokens=None, recall=None)

    def require_plain(self, what: str) -> None:
        """Refuse what neither plans nor hooks can follow.

        Raises:
            Unavailable: there are token maps or recalls.
        """
        if self.tokens is not None or self.recall is not None:
            raise Unavailable(
                sentence(
                    what,
                    expected="a schedule of whole updates",
                    got=f"one of {self.method} with {'recalls' if self.tokens is None else 'token maps'}",
                    mend="give it to bac.build_executor with executor=eager",
                )
            )

    def require(self, provenance: Provenance, blocks: tuple[Block, ...], steps: int) -> None:
        """Refuse unless this schedule was made for what is about to run.

        Raises:
            Mismatch: another checkpoint, sampler, step count or block set.
        """
        if self.steps != steps or self.blocks != blocks:
            raise Mismatch(
                sentence(
                    "schedule",
                    expected=f"{steps} steps of {len(blocks)} blocks {blocks[0]}..{blocks[-1]}",
                    got=f"{self.steps} steps of {len(self.blocks)} blocks {self.blocks[0]}..{self.blocks[-1]}",
                    mend="run scripts/calibrate.py for this policy",
                )
            )
        self.provenance.require(provenance, "schedule")

    def grid(self) -> str:
        """Return the schedule as text: a row per block, a column per step.

        ``#`` is an update, ``+`` one that computes less than the whole block, ``.`` reuse.
        """
        width = max(len(str(block)) for block in self.blocks)
        ruler = "".join(str(step // 10 % 10) if step % 10 == 0 else " " for step in range(self.steps))
        rows = [
            f"{block!s:>{width}} {''.join('.+#'[int(np.ceil(part) + (part == 1))] for part in row)}"
            f" {np.count_nonzero(row):>3}"
            for block, row in zip(self.blocks, self.share, strict=True)
        ]
        return "\n".join([f"{'':>{width}} {ruler}", *rows])

    def to_json(self) -> dict[str, Any]:
        """Return a JSON document that ``from_json`` reads back."""
        return {
            "format": _FORMAT,
            "method": self.method,
            "parameters": dict(self.parameters),
            "checkpoint": self.provenance.checkpoint,
            "sampler": dict(self.provenance.sampler),
            "steps": self.steps,
            "updates": self._update_steps(),
            **({} if self.forecast is None else {"forecast": forecast_document(self.forecast, self.mask, self.blocks)}),
            **({} if self.groups is None else {"groups": group_document(self.groups, self.blocks)}),
            **({} if self.tokens is None else {"tokens": token_document(self.tokens, self.blocks)}),
            **({} if self.recall is None else {"recall": recall_document(self.recall, self.blocks)}),
        }

    @classmethod
    def from_json(cls, document: Any) -> CacheSchedule:
        """Read ``to_json``'s document.

        Raises:
            CorruptArtefact: a field is missing or of another type.
            InvalidInput: an update step lies outside [0, steps), or step 0 is missing.
        """
        try:
            if document["format"] != _FORMAT:
                raise KeyError(f"format {document['format']!r}")
            steps = _whole(document["steps"])
            rows = {Block.parse(name): [_whole(step) for step in row] for name, row in document["updates"].items()}
            if not 1 <= steps <= _MOST_STEPS or not 0 < len(rows) == len(document["updates"]):
                raise ValueError(f"{steps} steps of {len(rows)} different blocks")
            provenance = Provenance(str(document["checkpoint"]), dict(document["sampler"]))
            method, parameters = str(document["method"]), dict(document["parameters"])
            groups = read_groups(document["groups"], rows) if "groups" in document else None
            forecast = None
            if "forecast" in document:
                forecast = read_forecast(document["forecast"], rows, steps, grouped=groups is not None)
            tokens = read_tokens(document["tokens"], rows, steps) if "tokens" in document else None
            recall = read_recall(document["recall"], rows, steps) if "recall" in document else None
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise CorruptArtefact(
                sentence(
                    "schedule",
                    expected=f"a {_FORMAT} document",
                    got=f"{type(error).__name__} {error}",
                    mend="write it again with scripts/calibrate.py",
                )
            ) from error
        return cls(_mask(rows, steps), tuple(rows), provenance, method, parameters, forecast, groups, tokens, recall)

    def save(self, path: Path) -> None:
        """Write the JSON document, one line per block."""
        write_whole(path, lambda partial: partial.write_text(_pretty(self.to_json())))

    @classmethod
    def load(cls, path: Path | str) -> CacheSchedule:
        """Read a file written by ``save``.

        Raises:
            MissingArtefact: no such file.
            CorruptArtefact: not a whole schedule document.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingArtefact(
                sentence("schedule", expected=f"a file {path}", got="none", mend="run scripts/calibrate.py")
            )
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CorruptArtefact(
                sentence(f"schedule {path}", expected="JSON", got=error, mend="write it again")
            ) from error

    def _update_steps(self) -> dict[str, list[int]]:
        rows = zip(self.blocks, self.mask, strict=True)
        return {str(block): np.flatnonzero(row).tolist() for block, row in rows}


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} in place of an integer")
    return value


def _mask(rows: Mapping[Block, list[int]], steps: int) -> np.ndarray:
    mask = np.zeros((len(rows), steps), dtype=bool)
    for number, (block, updates) in enumerate(rows.items()):
        outside = [step for step in updates if not 0 <= step < steps]
        if outside:
            raise InvalidInput(
                sentence(
                    f"schedule of {block}",
                    expected=f"steps in [0, {steps})",
                    got=outside,
                    mend="correct the schedule or its step count",
                )
            )
        mask[number, updates] = True
    return mask


def _pretty(document: dict[str, Any]) -> str:
    tables = {key: document[key] for key in ("updates", "groups", "forecast", "tokens", "recall") if key in document}
    head = {key: value for key, value in document.items() if key not in tables}
    text = [json.dumps(head, indent=2)[:-2]]
    for key, table in tables.items():
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
        text.append(f'  "{key}": {{\n{rows}\n  }}')
    return ",\n".join(text) + "\n}\n"
