"""Demonstrations as flat arrays with episode ends: the replay-buffer zarr layout of diffusion_policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np

from envs.errors import DemonstrationError

try:
    import zarr
    from zarr.codecs import BloscCodec
    from zarr.errors import GroupNotFoundError
    from zarr.storage import LocalStore, ZipStore
except ImportError as error:
    raise DemonstrationError(
        "demonstrations: expected the package zarr 3, got none; install it, which takes Python 3.11 or later."
    ) from error

__all__ = ["DemonstrationError", "Demonstrations", "read_demonstrations", "write_demonstrations"]

# Grouping the bytes of floats by significance makes Push-T 974 kB instead of the default's 1,158 kB.
_COMPRESSOR = BloscCodec(cname="zstd", clevel=9, shuffle="shuffle")


@dataclass(frozen=True)
class Demonstrations:
    """Recorded episodes, one behind the other.

    Attributes:
        arrays: name -> array[N, ...], all of the same length N; read only.
        episode_ends: int64[E], the index one past each episode's last frame.
        attributes: what the store says of itself (source, licence, ...).
    """

    arrays: Mapping[str, np.ndarray]
    episode_ends: np.ndarray
    attributes: Mapping[str, Any]

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.arrays.items()}
        ends = self.episode_ends
        frames = int(ends[-1]) if ends.size else 0
        if frames == 0 or (np.diff(ends, prepend=0) <= 0).any() or set(lengths.values()) != {frames}:
            raise DemonstrationError(
                f"demonstrations: expected increasing episode ends and arrays of {frames} frames, got ends "
                f"{ends[:4].tolist()}... and lengths {lengths}; the store is damaged, copy it again."
            )

    @property
    def episodes(self) -> int:
        """Number of episodes E."""
        return len(self.episode_ends)

    @property
    def frames(self) -> int:
        """Number of frames N over all episodes."""
        return int(self.episode_ends[-1])

    def episode(self, index: int) -> slice:
        """Return the frames of episode ``index`` in [0, E) as a slice into every array."""
        start = 0 if index == 0 else int(self.episode_ends[index - 1])
        return slice(start, int(self.episode_ends[index]))


def read_demonstrations(path: Path | str, keys: tuple[str, ...]) -> Demonstrations:
    """Read ``keys`` from a zarr replay buffer.

    Args:
        path: a zarr folder or ``.zip``, v2 (as published by diffusion_policy) or v3, with groups ``data`` and ``meta``.
        keys: names in ``data`` to read; others (images, say) are not touched.

    Raises:
        DemonstrationError: the path, a group or a key is missing, an array is not of numbers, or the store is damaged.
    """
    path = Path(path)
    with _opened(path) as root:
        stored = _stored(root, "data", path, keys)
        ends = _stored(root, "meta", path, ("episode_ends",))["episode_ends"]
        arrays = MappingProxyType({key: np.asarray(stored[key][:]) for key in keys})
        return Demonstrations(arrays, np.asarray(ends[:], dtype=np.int64), MappingProxyType(dict(root.attrs)))


def write_demonstrations(demonstrations: Demonstrations, path: Path | str) -> None:
    """Write a zarr v3 ``.zip`` store in the same layout; it replaces ``path`` only once it is whole."""
    path = Path(path)
    partial = path.with_name(f".partial-{path.name}")
    partial.unlink(missing_ok=True)
    with ZipStore(partial, mode="w") as store:
        root = zarr.open_group(store, mode="w", attributes=dict(demonstrations.attributes))
        data, meta = root.create_group("data"), root.create_group("meta")
        for name, values in demonstrations.arrays.items():
            data.create_array(name, data=values, chunks=values.shape, compressors=_COMPRESSOR)
        meta.create_array("episode_ends", data=demonstrations.episode_ends)
    partial.replace(path)


@contextmanager
def _opened(path: Path) -> Iterator[zarr.Group]:
    if not path.exists():
        raise DemonstrationError(f"demonstrations: expected a zarr store at {path}, got nothing; check the path.")
    try:
        with closing(_store(path)) as store:
            yield zarr.open_group(store, mode="r")
    except DemonstrationError:
        raise
    except GroupNotFoundError as error:
        raise DemonstrationError(
            f"demonstrations {path}: expected a zarr group, got a folder or zip without one at its top; "
            "give the path of the replay buffer itself."
        ) from error
    except (BadZipFile, OSError, RuntimeError, ValueError) as error:
        # Decompressors raise RuntimeError, broken metadata and chunks of the wrong length ValueError.
        raise DemonstrationError(
            f"demonstrations {path}: expected a whole zarr store, got a damaged one ({error}); copy it again."
        ) from error


def _store(path: Path) -> LocalStore | ZipStore:
    if path.suffix != ".zip":
        return LocalStore(path, read_only=True)
    # Refuses here what is no zip: ZipStore would, but then fails to close.
    ZipFile(path).close()
    return ZipStore(path, mode="r")


def _stored(root: zarr.Group, name: str, path: Path, keys: tuple[str, ...]) -> dict[str, zarr.Array[Any]]:
    """Return the arrays of group ``name``, of which ``keys`` must be there and whole."""
    group = root.get(name)
    if not isinstance(group, zarr.Group):
        raise DemonstrationError(
            f"demonstrations {path}: expected a group '{name}', got {sorted(root.keys())}; "
            "this is not a diffusion_policy replay buffer."
        )
    stored = dict(group.arrays())
    missing = sorted(set(keys) - set(stored))
    if missing:
        raise DemonstrationError(
            f"demonstrations {path}: expected arrays {sorted(keys)} in '{name}', got {sorted(stored)}; "
            f"{missing} must be recorded or left out of the task's keys."
        )
    _require_numbers({key: stored[key] for key in keys}, path)
    # A zip arrives whole or not at all; a folder can lose chunks, which zarr reads as zeros.
    if isinstance(root.store, LocalStore):
        lost = {key: stored[key].nchunks - stored[key].nchunks_initialized for key in keys}
        if any(lost.values()):
            raise DemonstrationError(
                f"demonstrations {path}: expected every chunk of '{name}', got these numbers missing: {lost}; "
                "copy the folder again, or write it with its empty chunks."
            )
    return stored


def _require_numbers(arrays: Mapping[str, zarr.Array[Any]], path: Path) -> None:
    """Refuse, before a chunk is read, what a zarr v2 store may name to have code of its own run: the codec pickle."""
    for key, array in arrays.items():
        codecs = [str(getattr(codec, "codec_id", codec)) for codec in (*array.filters, *array.compressors)]
        if array.dtype.kind not in "biuf" or "pickle" in codecs:
            raise DemonstrationError(
                f"demonstrations {path}: expected numbers in '{key}', got {array.dtype} behind {codecs}; "
                "unpickling runs whatever the file says, so write the array again as numbers."
            )
