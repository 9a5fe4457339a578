"""Reads a torch checkpoint without trust: a zip of tensors around a pickle that meets inert stand-ins alone.

Nothing the pickle names is imported and nothing of torch runs while it is read. A hostile file can waste time and
memory; it cannot run code. The table ``_GLOBALS`` is all that a checkpoint of the original diffusion_policy names.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bac.errors import CorruptArtefact, sentence

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def open_records(path: Path) -> zipfile.ZipFile:
    """Open the zip file at ``path``; a file that is none is refused as corrupt."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise corrupt(path, "a whole zip file, as torch.save writes", error) from error


def corrupt(path: Path, expected: str, got: object) -> CorruptArtefact:
    """Return the refusal of a damaged or foreign checkpoint."""
    return CorruptArtefact(
        sentence(f"checkpoint {path}", expected=expected, got=got, mend="download or export the checkpoint again")
    )


class _Storage(NamedTuple):
    kind: str
    key: str
    elements: int


class TensorRef(NamedTuple):
    """Where a tensor lies, as the file says; held against the storage when it is read."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class InertNode:
    """An omegaconf object: its attributes, none of its behaviour."""

    state: Mapping[str, Any] = MappingProxyType({})

    # Where BUILD aims at the class itself this is called unbound and fails, so no file alters what the next one meets.
    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Table(dict[Any, Any]):
    """OrderedDict and defaultdict: the items, without the default factory and without torch's module versions."""

    def __init__(self, *_factory: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


class _Function:
    """A function that a file may call; on a bare function BUILD could set attributes for the whole process."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a change of a function")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, *_gradient: object) -> TensorRef:
    match storage, offset, size, stride:
        case _Storage(), int(), tuple(), tuple() if all(map(_is_count, (offset, *size, *stride))):
            return TensorRef(storage, offset, size, stride)
    raise pickle.UnpicklingError("an impossible tensor")


_NOTHING = _Function(lambda *_args: None)

_GLOBALS: Mapping[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Table,
    ("collections", "defaultdict"): _Table,
    ("omegaconf.dictconfig", "DictConfig"): InertNode,
    ("omegaconf.listconfig", "ListConfig"): InertNode,
    ("omegaconf.nodes", "AnyNode"): InertNode,
    ("omegaconf.base", "ContainerMetadata"): InertNode,
    ("omegaconf.base", "Metadata"): InertNode,
    ("typing", "Any"): None,
    # dill spells `dict` and `list` as a call of this, in omegaconf's metadata; the real one also hands out code types.
    ("dill._dill", "_load_type"): _NOTHING,
    # Protocol 2 spells bytes as a call of this; they occur in `pickles` alone.
    ("_codecs", "encode"): _NOTHING,
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *_gradient: data),
    **{("torch", kind): kind for kind in _DTYPES},
}
"""Every global that a file may name -> what it meets instead."""


class _UnknownGlobal(Exception):
    """The file names a global outside the table."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _GLOBALS:
            raise _UnknownGlobal(f"{module}.{name}")
        return _GLOBALS[module, name]

    def persistent_load(self, pid: object, /) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), str(), int(elements)) if kind in _DTYPES:
                return _Storage(kind, key, elements)
        raise pickle.UnpicklingError("an unknown kind of storage")


_BROKEN_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
)
"""What damaged bytes raise; the pickle documentation gives examples and no closed list."""


class TorchArchive:
    """The records of an open checkpoint."""

    def __init__(self, path: Path, records: zipfile.ZipFile) -> None:
        self.path = path
        self._records = records
        # The folder is named after the file as it was when saved.
        pickles = [name for name in records.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise corrupt(path, "a torch zip file with one data.pkl", f"{len(pickles)} of them")
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in records.namelist() and self._record("byteorder") != b"little":
            raise corrupt(path, "little-endian values", "another byte order")

    def payload(self) -> Mapping[str, Any]:
        """Return what was saved, made of stand-ins; ``state_dicts`` is a dict."""
        data = self._record("data.pkl")
        try:
            payload = _Unpickler(BytesIO(data)).load()
        except _UnknownGlobal as error:
            raise CorruptArtefact(
                sentence(
                    f"checkpoint {self.path}",
                    expected="no global besides those of a Diffusion Policy checkpoint",
                    got=f"{str(error)!r}, which was not run",
                    mend="find out where the file comes from before any other program opens it",
                )
            ) from error
        except _BROKEN_PICKLE as error:
            raise corrupt(self.path, "a pickle that torch.save wrote", error) from error
        if not isinstance(payload, dict) or not isinstance(payload.get("state_dicts"), dict):
            held = sorted(map(str, payload)) if isinstance(payload, dict) else type(payload).__name__
            raise corrupt(self.path, "a dict with state_dicts", held)
        return payload

    def tensor(self, name: str, ref: TensorRef) -> Tensor:
        """Return one tensor on the CPU, contiguous."""
        data = self._record(f"data/{ref.storage.key}")
        dtype = _DTYPES[ref.storage.kind]
        try:
            # frombuffer refuses an empty buffer, which is what the original's _dummy_variable has.
            values = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            # A stride of 0 would let a small storage claim any size.
            if values.numel() == ref.storage.elements and math.prod(ref.size) <= values.numel():
                return values.as_strided(ref.size, ref.stride, ref.offset).contiguous()
        except (ValueError, RuntimeError, TypeError, OverflowError) as error:
            raise corrupt(self.path, f"a storage that holds {name}", error) from error
        raise corrupt(self.path, f"a storage that holds {name} {list(ref.size)}", f"{values.numel()} values")

    def _record(self, name: str) -> bytes:
        try:
            record = self._records.getinfo(self._folder + name)
            # torch never compresses; a compressed record can swell to any size.
            if record.compress_type == zipfile.ZIP_STORED:
                return self._records.read(record)
        except (zipfile.BadZipFile, LookupError, ValueError, EOFError, RuntimeError, OSError) as error:
            raise corrupt(self.path, f"a readable record {name}", error) from error
        raise corrupt(self.path, f"record {name} stored as it is", "a compressed one")
