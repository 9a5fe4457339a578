"""The feature profile: how alike every block's features are between any two denoising steps, and which steps matter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import zarr
from zarr.storage import ZipStore

from bac.errors import CorruptArtefact, InvalidInput, MissingArtefact, sentence
from bac.files import write_whole
from bac.schedule import Provenance
from bac.trunk import Block

_FORMAT = "bac-profile-1"
_SENSITIVITY, _ATTENTION, _TOKEN_LIKENESS = _OPTIONAL = "sensitivity", "attention", "token_likeness"


class Metric(StrEnum):
    """How two features of a block are compared; ``cosine`` is a similarity, the others are distances."""

    COSINE = "cosine"
    L1 = "l1"
    L2 = "l2"
    MSE = "mse"


@dataclass(frozen=True, eq=False)
class FeatureProfile:
    """Mean comparison of features over N calibration observations.

    Attributes:
        values: metric -> float32[blocks, K, K], symmetric. ``cosine`` in [-1, 1]; ``l1`` the mean absolute
            difference of the elements, ``mse`` the mean squared one, ``l2`` the Euclidean distance, all at least 0.
        blocks: the rows.
        observations: number of calibration observations N.
        provenance: the checkpoint and sampler it was measured on.
        sensitivity: float64[K], at least 0, the gain from an error in the noise estimate of each step to the executed
            actions (``bac.sensitivity``), or None where it was not measured.
        attention: float32[layers, K, T], at least 0, the self-attention weights that each action token receives, summed
            over queries and heads, or None where the trunk does not show them.
        token_likeness: float32[blocks, K, T - 1], the cosine of the features of the action tokens t and t + 1, or None
            as above.
    """

    values: Mapping[Metric, np.ndarray]
    blocks: tuple[Block, ...]
    observations: int
    provenance: Provenance
    sensitivity: np.ndarray | None = None
    attention: np.ndarray | None = None
    token_likeness: np.ndarray | None = None

    def __post_init__(self) -> None:
        if set(self.values) != set(Metric):
            raise InvalidInput(
                sentence(
                    "feature profile", expected=f"metrics {list(Metric)}", got=list(self.values), mend="give them all"
                )
            )
        for metric in Metric:
            self._require_sound(metric, self.values[metric])
        if self.sensitivity is not None:
            self._require_sound_sensitivity(self.sensitivity)
        if self.attention is not None:
            layers = 1 + max(block.layer for block in self.blocks)
            self._require_tokens(_ATTENTION, self.attention, layers, 0, np.inf)
        if self.token_likeness is not None:
            # float32 rounds the cosine of equal features to a little above 1.
            self._require_tokens(_TOKEN_LIKENESS, self.token_likeness, len(self.blocks), -1.0001, 1.0001)
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    @property
    def steps(self) -> int:
        """Number of denoising steps K."""
        return self.values[Metric.COSINE].shape[1]

    def similarity(self, metric: Metric) -> np.ndarray:
        """Return float64[blocks, K, K] in which larger means more alike: distances come negated."""
        sign = 1.0 if metric is Metric.COSINE else -1.0
        return sign * self.values[metric].astype(np.float64)

    def reuse_error(self) -> np.ndarray:
        """Return float64[blocks]: mean over all pairs of steps of the mean absolute feature difference.

        The authors' proxy for how much error a block's reuse puts into the stream (BAC, section on the Bubbling Union).
        """
        return self.values[Metric.L1].astype(np.float64).mean(axis=(1, 2))

    def save(self, path: Path) -> None:
        """Write a zarr v3 ``.zip`` store, whole or not at all."""

        def write(partial: Path) -> None:
            attributes: dict[str, Any] = {
                "format": _FORMAT,
                "blocks": [str(block) for block in self.blocks],
                "observations": self.observations,
                "checkpoint": self.provenance.checkpoint,
                "sampler": dict(self.provenance.sampler),
            }
            with ZipStore(partial, mode="w") as store:
                root = zarr.open_group(store, mode="w", attributes=attributes)
                for metric, values in self.values.items():
                    root.create_array(str(metric), data=values, chunks=values.shape)
                for name in _OPTIONAL:
                    if (array := getattr(self, name)) is not None:
                        root.create_array(name, data=array)

        write_whole(path, write)

    @classmethod
    def load(cls, path: Path | str) -> FeatureProfile:
        """Read a store written by ``save``.

        Raises:
            MissingArtefact: no such file.
            CorruptArtefact: truncated or foreign.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingArtefact(
                sentence("feature profile", expected=f"a file {path}", got="none", mend="run scripts/calibrate.py")
            )
        try:
            ZipFile(path).close()  # refuses first: ZipStore's exit hides a failed opening behind an AttributeError
            with ZipStore(path, mode="r") as store:
                root = zarr.open_group(store, mode="r")
                attributes: dict[str, Any] = root.attrs.asdict()
                if attributes["format"] != _FORMAT:
                    raise KeyError(f"format {attributes['format']!r}")
                arrays = dict(root.arrays())
                values = {metric: np.asarray(arrays[metric][:]) for metric in Metric}
                optional = {name: np.asarray(arrays[name][:]) for name in _OPTIONAL if name in arrays}
            provenance = Provenance(attributes["checkpoint"], attributes["sampler"])
            blocks = tuple(Block.parse(name) for name in attributes["blocks"])
            observations = int(attributes["observations"])
        except (BadZipFile, KeyError, FileNotFoundError, json.JSONDecodeError) as error:
            raise CorruptArtefact(
                sentence(
                    f"feature profile {path}",
                    expected=f"a whole {_FORMAT} store",
                    got=f"{type(error).__name__} {error}",
                    mend="write it again with scripts/calibrate.py",
                )
            ) from error
        return cls(values, blocks, observations, provenance, **optional)

    def _require_sound_sensitivity(self, values: np.ndarray) -> None:
        # A single gain may be 0: where all of the clean chunk's estimate is clipped, nothing gets through.
        if values.shape != (self.steps,) or not np.isfinite(values).all() or values.min() < 0 or values.max() == 0:
            raise InvalidInput(
                sentence(
                    "feature profile, sensitivity",
                    expected=f"{self.steps} finite gains of at least 0, not all 0",
                    got=f"shape {values.shape} with {int((~(values >= 0)).sum())} that are negative or NaN",
                    mend="measure it again",
                )
            )

    def _require_tokens(self, what: str, values: np.ndarray, rows: int, least: float, most: float) -> None:
        shaped = values.ndim == 3 and values.shape[:2] == (rows, self.steps) and values.shape[2] > 0
        if not shaped or not np.isfinite(values).all() or values.min() < least or values.max() > most:
            raise InvalidInput(
                sentence(
                    f"feature profile, {what}",
                    expected=f"finite float[{rows}, {self.steps} steps, tokens] from {least:g} to {most:g}",
                    got=f"shape {values.shape} with {int((~np.isfinite(values)).sum())} NaN or infinite values",
                    mend="measure it again",
                )
            )

    def _require_sound(self, metric: Metric, values: np.ndarray) -> None:
        square = values.ndim == 3 and values.shape == (len(self.blocks), self.steps, self.steps)
        if not square or not np.isfinite(values).all():
            raise InvalidInput(
                sentence(
                    f"feature profile, {metric}",
                    expected=f"finite float[{len(self.blocks)} blocks, K, K]",
                    got=f"shape {values.shape} with {int((~np.isfinite(values)).sum())} NaN or infinite values",
                    mend="check the checkpoint and the calibration observations for NaN",
                )
            )
        still = [str(b) for b, v in zip(self.blocks, values, strict=True) if v.shape[0] > 1 and np.ptp(v) == 0]
        if still:
            raise InvalidInput(
                sentence(
                    f"feature profile, {metric}",
                    expected="features that change between steps",
                    got=f"constant statistics for {still}",
                    mend="check that these branches are not dead",
                )
            )
