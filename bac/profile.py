"""The feature profile: how alike every block's features are between any two denoising steps, and which steps matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np

from bac.choices import Choice
from bac.errors import CorruptArtefact, InvalidInput, MissingArtefact, Unavailable, sentence
from bac.files import write_whole
from bac.schedule import Provenance
from bac.solvers import Solver, measured_intervals
from bac.trunk import Block

_FORMAT = "bac-profile-1"
_CALIBRATE = "run scripts/calibrate.py"


class Metric(Choice):
    """How two features of a block are compared; ``cosine`` is a similarity, the others are distances."""

    COSINE = "cosine"
    L1 = "l1"
    L2 = "l2"
    MSE = "mse"


@dataclass(frozen=True)
class _Statistic:
    """What an optional array of a profile must be.

    Attributes:
        axes: names of its axes; a name that ``FeatureProfile`` does not know may have any length.
        least: what no value may lie under.
        most: what no value may lie above.
        mend: how to get it where it is missing.
    """

    axes: tuple[str, ...]
    least: float = -np.inf
    most: float = np.inf
    mend: str = f"{_CALIBRATE} again: this profile was made before that was measured"


_STATISTICS = {
    "sensitivity": _Statistic(("K",), least=0, mend=f"{_CALIBRATE} with sensitivity_observations above 0"),
    "stream_change": _Statistic(("blocks + 1", "K"), least=0),
    "residual_change": _Statistic(("K", "K"), least=0),
    "residual_slope": _Statistic(("K", "K")),
    "gates": _Statistic(("blocks", "K"), least=0, most=1, mend=f"{_CALIBRATE} task=... cache=harmonica"),
    "attention": _Statistic(("layers", "K", "T"), least=0),
    # float32 may round the cosine of equal features to a little more than 1.
    "token_likeness": _Statistic(("blocks", "K", "T - 1"), least=-1.0001, most=1.0001),
    "solver_mse": _Statistic(("intervals", "solvers", "blocks", "d"), least=0),
    "channel_dynamics": _Statistic(("3", "blocks", "d"), least=0),
}
"""The arrays that a profile may have beside its metrics, each with a field of its own."""


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
            actions (``bac.sensitivity``).
        stream_change: float64[blocks + 1, K], at least 0, how far the residual stream is from that of the step before,
            as L1 norms, relative to that one; row b is the stream that block b sees, the last row what the head sees.
            Column 0 is 0.
        residual_change: float64[K, K], at least 0, the L1 norm of the difference of the stack's whole residual (what
            all blocks together add to the stream) between an earlier step, the row, and a later one, the column,
            relative to the row's.
        residual_slope: float64[K, K], the factor on the row's residual that comes nearest to the column's, by least
            squares on centred channels (the head's layer norm removes their mean).
        gates: float64[blocks, K] in [0, 1], what a trained router makes of every update (``bac.router``).
        attention: float32[layers, K, T], at least 0, the self-attention weights that each action token receives, summed
            over queries and heads.
        token_likeness: float32[blocks, K, T - 1], the cosine of the features of the action tokens t and t + 1.
        solver_mse: float32[intervals, solvers, blocks, d], at least 0, the mean squared error of each channel where
            every h-th step is computed and a solver predicts the others (``bac.solvers``: solvers, intervals).
        channel_dynamics: float32[3, blocks, d], at least 0, how each channel moves: the root mean square of its change
            per step over that of itself; that of the change of its change over that of its change, 0 for a line and
            2 for a zigzag; that of its change over 4 steps over 4 times that per step, 1 for a line and 1/2 for a
            random walk. 0 where the channel never moves.

    What was not measured is None.
    """

    values: Mapping[Metric, np.ndarray]
    blocks: tuple[Block, ...]
    observations: int
    provenance: Provenance
    sensitivity: np.ndarray | None = None
    stream_change: np.ndarray | None = None
    residual_change: np.ndarray | None = None
    residual_slope: np.ndarray | None = None
    gates: np.ndarray | None = None
    attention: np.ndarray | None = None
    token_likeness: np.ndarray | None = None
    solver_mse: np.ndarray | None = None
    channel_dynamics: np.ndarray | None = None

    def __post_init__(self) -> None:
        if set(self.values) != set(Metric):
            raise InvalidInput(
                sentence(
                    "feature profile", expected=f"metrics {list(Metric)}", got=list(self.values), mend="give them all"
                )
            )
        for metric in Metric:
            self._require_sound(metric, self.values[metric])
        for name, array in self.statistics.items():
            self._require_sound_statistic(name, array)
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    @property
    def steps(self) -> int:
        """Number of denoising steps K."""
        return self.values[Metric.COSINE].shape[1]

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """The optional arrays that were measured, by name."""
        arrays = {name: getattr(self, name) for name in _STATISTICS}
        return {name: array for name, array in arrays.items() if array is not None}

    def require(self, name: str, method: str) -> np.ndarray:
        """Return the optional array ``name`` for the method that needs it.

        Raises:
            InvalidInput: it was not measured.
        """
        if name not in self.statistics:
            raise InvalidInput(
                sentence(
                    f"cache={method}",
                    expected=f"a profile with {name}",
                    got="one without",
                    mend=_STATISTICS[name].mend,
                )
            )
        return self.statistics[name]

    def similarity(self, metric: Metric) -> np.ndarray:
        """Return float64[blocks, K, K] in which larger means more alike: distances come negated."""
        sign = 1.0 if metric is Metric.COSINE else -1.0
        return sign * self.values[metric].astype(np.float64)

    def reuse_error(self) -> np.ndarray:
        """Return float64[blocks]: mean over all pairs of steps of the mean absolute feature difference.

        The authors' proxy for how much error a block's reuse puts into the stream (BAC, section on the Bubbling Union).
        """
        return self.values[Metric.L1].astype(np.float64).mean(axis=(1, 2))

    @classmethod
    def stand_in(cls, blocks: tuple[Block, ...], provenance: Provenance, steps: int, tokens: int) -> FeatureProfile:
        """Return a profile of random numbers: what a method refuses of it, it refuses of any, before any is measured.

        Args:
            blocks: the rows.
            provenance: whose profile it stands for.
            steps: K.
            tokens: T.
        """
        draw = np.random.default_rng(0)
        drawn = draw.random((len(blocks), steps, steps))
        lengths = _lengths(blocks, steps) | {"T": tokens, "T - 1": tokens - 1, "d": 1}
        drawn_statistics = {
            name: draw.random(tuple(lengths[axis] for axis in rule.axes)) for name, rule in _STATISTICS.items()
        }
        # A few steps have no intervals that predictions could be measured over.
        statistics = {name: array for name, array in drawn_statistics.items() if array.size}
        return cls(dict.fromkeys(Metric, drawn + drawn.transpose(0, 2, 1)), blocks, 1, provenance, **statistics)

    def save(self, path: Path) -> None:
        """Write a zarr v3 ``.zip`` store, whole or not at all.

        Raises:
            Unavailable: this Python has no zarr 3.
        """
        zarr = _zarr()

        def write(partial: Path) -> None:
            attributes: dict[str, Any] = {
                "format": _FORMAT,
                "blocks": [str(block) for block in self.blocks],
                "observations": self.observations,
                "checkpoint": self.provenance.checkpoint,
                "sampler": dict(self.provenance.sampler),
            }
            with zarr.storage.ZipStore(partial, mode="w") as store:
                root = zarr.open_group(store, mode="w", attributes=attributes)
                for metric, values in self.values.items():
                    root.create_array(str(metric), data=values, chunks=values.shape)
                for name, array in self.statistics.items():
                    root.create_array(name, data=array)

        write_whole(path, write)

    @classmethod
    def load(cls, path: Path | str) -> FeatureProfile:
        """Read a store written by ``save``.

        Raises:
            MissingArtefact: no such file.
            CorruptArtefact: truncated or foreign.
            Unavailable: this Python has no zarr 3.
        """
        path, zarr = Path(path), _zarr()
        if not path.is_file():
            raise MissingArtefact(
                sentence(
                    "feature profile",
                    expected=f"a file {path}",
                    got="none",
                    mend="run scripts/calibrate.py with this checkpoint and sampler",
                )
            )
        try:
            ZipFile(path).close()  # refuses first: ZipStore's exit hides a failed opening behind an AttributeError
            with zarr.storage.ZipStore(path, mode="r") as store:
                # Consolidated metadata may slip in arrays of zarr v2, whose codecs include pickle.
                root = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
                attributes: dict[str, Any] = root.attrs.asdict()
                if attributes["format"] != _FORMAT:
                    raise KeyError(f"format {attributes['format']!r}")
                arrays = dict(root.arrays())
                values = {metric: np.asarray(arrays[metric][:]) for metric in Metric}
                statistics = {name: np.asarray(arrays[name][:]) for name in _STATISTICS if name in arrays}
            provenance = Provenance(attributes["checkpoint"], attributes["sampler"])
            blocks = tuple(Block.parse(name) for name in attributes["blocks"])
            observations = int(attributes["observations"])
        except (BadZipFile, KeyError, FileNotFoundError, ValueError) as error:
            raise CorruptArtefact(
                sentence(
                    f"feature profile {path}",
                    expected=f"a whole {_FORMAT} store",
                    got=f"{type(error).__name__} {error}",
                    mend="write it again with scripts/calibrate.py",
                )
            ) from error
        return cls(values, blocks, observations, provenance, **statistics)

    def _require_sound_statistic(self, name: str, array: np.ndarray) -> None:
        rule = _STATISTICS[name]
        lengths = _lengths(self.blocks, self.steps)
        fits = array.ndim == len(rule.axes) and all(
            length == lengths.get(axis, length) for axis, length in zip(rule.axes, array.shape, strict=True)
        )
        # A single gain may be 0: where all of the clean chunk's estimate is clipped, nothing gets through.
        within = np.isfinite(array) & (array >= rule.least) & (array <= rule.most)
        # With a single step there is nothing to change.
        dead = self.steps > 1 and not array.any()
        if not fits or not within.all() or dead:
            raise InvalidInput(
                sentence(
                    f"feature profile, {name}",
                    expected=f"[{', '.join(rule.axes)}] in [{rule.least:g}, {rule.most:g}], not all 0",
                    got=f"shape {array.shape}, {int((~within).sum())} values outside or NaN",
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


def _lengths(blocks: tuple[Block, ...], steps: int) -> dict[str, int]:
    """Return the lengths of the axes that follow from blocks and steps."""
    return {
        "K": steps,
        "layers": 1 + max(block.layer for block in blocks),
        "blocks": len(blocks),
        "blocks + 1": len(blocks) + 1,
        "intervals": len(measured_intervals(steps)),
        "solvers": len(Solver),
        "3": 3,
    }


def _zarr() -> ModuleType:
    # Here, for a robot of Python 3.10, which has no zarr 3, plays schedules and needs no profile.
    try:
        import zarr
        import zarr.storage
    except ImportError as error:
        raise Unavailable(
            sentence(
                "feature profile",
                expected="zarr 3, from Python 3.11 on",
                got="none",
                mend="calibrate on another machine and bring its schedules here",
            )
        ) from error
    return zarr
