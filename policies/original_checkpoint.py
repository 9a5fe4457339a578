"""Reads low-dim transformer checkpoints of ``real-stanford/diffusion_policy`` without its packages and without trust.

Such a ``.ckpt`` is torch's zip format, its ``data.pkl`` pickled by dill::

    archive/data.pkl   cfg          omegaconf DictConfig   -> plain nested dict, ``${a.b}`` resolved
                       state_dicts  model, ema_model, ...  -> one of the two, chosen by the caller
                       pickles      dill bytes             -> dropped
    archive/data/<n>   storages                            -> read only for the tensors returned

The pickle meets stand-ins of this file alone: nothing it names is imported and nothing of torch runs meanwhile.
A hostile file can waste time and memory; it cannot run code.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from bac.errors import CorruptArtefact, InvalidInput, Mismatch, MissingArtefact, sentence
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.normalizer import LimitsNormalizer

_Kind = TypeVar("_Kind", int, float, str, bool)

_STATE_DICTS = {"ema": "ema_model", "raw": "model"}
_POLICY = "DiffusionTransformerLowdimPolicy"
_NETWORK = "model."
_MASKS = ("mask", "memory_mask")
_NORMALIZER = "normalizer.params_dict."
_BESIDES_NETWORK = re.compile(
    r"(mask_generator\.)?_dummy_variable"
    r"|normalizer\.params_dict\.(obs|action)\.(scale|offset|input_stats\.(min|max|mean|std))"
)

_SIZES = {
    "action_dim": ("action_dim", "policy.action_dim", "policy.model.input_dim", "policy.model.output_dim"),
    "observation_dim": ("obs_dim", "policy.obs_dim", "policy.model.cond_dim"),
    "horizon": ("horizon", "policy.horizon", "policy.model.horizon"),
    "observation_steps": ("n_obs_steps", "policy.n_obs_steps", "policy.model.n_obs_steps"),
    "layers": ("policy.model.n_layer",),
    "width": ("policy.model.n_emb",),
}
"""Each size that the weights tell -> where the configuration states it again."""

_SWITCHES = {
    "policy.obs_as_cond": True,
    "policy.pred_action_steps_only": False,
    "policy.model.obs_as_cond": True,
    "policy.model.time_as_cond": True,
    "policy.model.causal_attn": True,
    "policy.model.n_cond_layers": 0,
}
"""The only variant that our network is; one the configuration leaves out still shows in the weights' names."""

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


@dataclass(frozen=True)
class OriginalDiffusion:
    """The noise scheduler of the training, ``cfg.policy.noise_scheduler``, in diffusers' words.

    Attributes:
        num_train_timesteps: steps of the forward process.
        beta_start: first beta, of the schedules that have one.
        beta_end: last beta, of the schedules that have one.
        beta_schedule: name of the schedule, such as ``squaredcos_cap_v2``.
        prediction_type: what the network predicts, such as ``epsilon``.
        clip_sample: whether each estimate of the clean chunk is clipped to [-1, 1].
        variance_type: variance of the reverse step; None where the configuration states none (DDIM).
    """

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    prediction_type: str
    clip_sample: bool
    variance_type: str | None


@dataclass(frozen=True)
class OriginalCheckpoint:
    """One policy of the original repository, checked against our network.

    Attributes:
        config: the training configuration, plain. A value that is one ``${a.b}`` is resolved; references inside longer
            text and other resolvers (``${eval:...}``, ``${now:...}``) stay as written.
        network: state dict on the CPU; loads strictly into ``DiffusionTransformer(network_config)``.
        normalizers: ``obs`` with Do channels and ``action`` with Da channels.
        network_config: sizes from the weights, heads and dropout from the configuration.
        action_steps: actions executed per chunk Ta, from the chunk's index To - 1 on.
        diffusion: the noise scheduler of the training.
    """

    config: Mapping[str, Any]
    network: dict[str, Tensor]
    normalizers: Mapping[str, LimitsNormalizer]
    network_config: DiffusionTransformerConfig
    action_steps: int
    diffusion: OriginalDiffusion

    @property
    def horizon(self) -> int:
        """Actions per chunk T."""
        return self.network_config.horizon

    @property
    def observation_steps(self) -> int:
        """Observations that the policy sees To."""
        return self.network_config.observation_steps


def read_original_checkpoint(path: Path | str, *, weights: Literal["ema", "raw"]) -> OriginalCheckpoint:
    """Read one policy out of a ``.ckpt``.

    Args:
        path: the file.
        weights: ``ema`` for the averaged weights, which the original evaluates; ``raw`` for the trained ones.

    Raises:
        MissingArtefact: there is no such file, or it holds no such weights.
        CorruptArtefact: the file is truncated or foreign, names a global outside the known ones, lacks a value of the
            configuration, or holds weights that are not finite.
        Mismatch: the network is another than ours, or weights and configuration disagree.
        InvalidInput: ``weights``, the head count or the normaliser statistics are out of range.
    """
    if weights not in _STATE_DICTS:
        raise InvalidInput(sentence("weights to read", expected="ema or raw", got=weights, mend="choose one of them"))
    path = Path(path)
    if not path.is_file():
        raise MissingArtefact(sentence(f"checkpoint {path}", expected="a file", got="none", mend="correct the path"))
    with _open(path) as records:
        return _read(_Archive(path, records), weights)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise _corrupt(path, "a whole zip file, as torch.save writes", error) from error


def _read(archive: _Archive, weights: str) -> OriginalCheckpoint:
    path, payload = archive.path, archive.payload()
    config = _plain_config(path, payload.get("cfg"))
    _require_our_variant(path, config)
    policy = _policy_tensors(path, payload["state_dicts"], weights)
    refs = {name.removeprefix(_NETWORK): ref for name, ref in policy.items() if name.startswith(_NETWORK)}
    network_config = _network_config(path, {name: ref.size for name, ref in refs.items()}, config)
    _require_names(path, policy, network_config)
    network = {name: archive.tensor(name, ref) for name, ref in refs.items()}
    _require_values(path, network, network_config)
    return OriginalCheckpoint(
        config=config,
        network=network,
        normalizers={
            "obs": _normalizer(archive, policy, "obs", network_config.observation_dim),
            "action": _normalizer(archive, policy, "action", network_config.action_dim),
        },
        network_config=network_config,
        action_steps=_action_steps(path, config, network_config),
        diffusion=_diffusion(path, config),
    )


def _corrupt(path: Path, expected: str, got: object) -> CorruptArtefact:
    return CorruptArtefact(
        sentence(f"checkpoint {path}", expected=expected, got=got, mend="download or export the checkpoint again")
    )


def _foreign(path: Path, expected: object, got: object) -> Mismatch:
    mend = "use a checkpoint of the original's low-dim transformer policy"
    return Mismatch(sentence(f"checkpoint {path}", expected=expected, got=got, mend=mend))


class _Storage(NamedTuple):
    kind: str
    key: str
    elements: int


class _TensorRef(NamedTuple):
    """Where a tensor lies, as the file says; held against the storage when it is read."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Node:
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


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, *_gradient: object) -> _TensorRef:
    match storage, offset, size, stride:
        case _Storage(), int(), tuple(), tuple() if all(map(_is_count, (offset, *size, *stride))):
            return _TensorRef(storage, offset, size, stride)
    raise pickle.UnpicklingError("an impossible tensor")


_NOTHING = _Function(lambda *_args: None)

_GLOBALS: Mapping[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Table,
    ("collections", "defaultdict"): _Table,
    ("omegaconf.dictconfig", "DictConfig"): _Node,
    ("omegaconf.listconfig", "ListConfig"): _Node,
    ("omegaconf.nodes", "AnyNode"): _Node,
    ("omegaconf.base", "ContainerMetadata"): _Node,
    ("omegaconf.base", "Metadata"): _Node,
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


class _Archive:
    """The records of an open checkpoint."""

    def __init__(self, path: Path, records: zipfile.ZipFile) -> None:
        self.path = path
        self._records = records
        # The folder is named after the file as it was when saved.
        pickles = [name for name in records.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _corrupt(path, "a torch zip file with one data.pkl", f"{len(pickles)} of them")
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in records.namelist() and self._record("byteorder") != b"little":
            raise _corrupt(path, "little-endian values", "another byte order")

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
            raise _corrupt(self.path, "a pickle that torch.save wrote", error) from error
        if not isinstance(payload, dict) or not isinstance(payload.get("state_dicts"), dict):
            held = sorted(map(str, payload)) if isinstance(payload, dict) else type(payload).__name__
            raise _corrupt(self.path, "a dict with state_dicts", held)
        return payload

    def tensor(self, name: str, ref: _TensorRef) -> Tensor:
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
            raise _corrupt(self.path, f"a storage that holds {name}", error) from error
        raise _corrupt(self.path, f"a storage that holds {name} {list(ref.size)}", f"{values.numel()} values")

    def _record(self, name: str) -> bytes:
        try:
            record = self._records.getinfo(self._folder + name)
            # torch never compresses; a compressed record can swell to any size.
            if record.compress_type == zipfile.ZIP_STORED:
                return self._records.read(record)
        except (zipfile.BadZipFile, LookupError, ValueError, EOFError, RuntimeError, OSError) as error:
            raise _corrupt(self.path, f"a readable record {name}", error) from error
        raise _corrupt(self.path, f"record {name} stored as it is", "a compressed one")


def _plain_config(path: Path, node: object) -> Mapping[str, Any]:
    try:
        written = _plain(node)
        config = _resolve(written, written)
    except (RecursionError, TypeError) as error:
        raise _corrupt(path, "cfg as an omegaconf tree of plain values", error) from error
    if not isinstance(config, dict):
        raise _corrupt(path, "cfg as an omegaconf DictConfig", type(node).__name__)
    return config


def _plain(node: object) -> Any:
    if isinstance(node, _Node):
        return _plain(node.state.get("_content", node.state.get("_val")))
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    if node is None or isinstance(node, str | int | float):
        return node
    raise TypeError(f"a {type(node).__name__}")


_REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")


def _resolve(value: Any, root: Any, trail: tuple[str, ...] = ()) -> Any:
    """Return ``value`` with references followed; one that leads nowhere or round in a circle stays as written."""
    if isinstance(value, dict):
        return {key: _resolve(item, root, trail) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, root, trail) for item in value]
    reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if reference is None or reference[1] in trail:
        return value
    trail = (*trail, reference[1])
    node = root
    for key in reference[1].split("."):
        if isinstance(node, str):
            node = _resolve(node, root, trail)
        if not isinstance(node, dict) or key not in node:
            return value
        node = node[key]
    return _resolve(node, root, trail)


def _stated(config: Mapping[str, Any], where: str) -> Any:
    """Return the value at a dotted path; None where it is absent or an unresolved reference."""
    node: Any = config
    for key in where.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return None if isinstance(node, str) and "${" in node else node


def _needed(path: Path, config: Mapping[str, Any], where: str, kind: type[_Kind]) -> _Kind:
    value = _stated(config, where)
    # bool is an int, and YAML writes a round float as an int.
    if type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    raise _corrupt(path, f"cfg.{where} of type {kind.__name__}", repr(value))


def _require_our_variant(path: Path, config: Mapping[str, Any]) -> None:
    target = _needed(path, config, "policy._target_", str).rpartition(".")[2]
    if target != _POLICY:
        raise _foreign(path, _POLICY, target)
    for where, ours in _SWITCHES.items():
        stated = _stated(config, where)
        if stated is not None and stated != ours:
            raise _foreign(path, f"{where}={ours}", stated)


def _policy_tensors(path: Path, state_dicts: Mapping[str, Any], weights: str) -> Mapping[str, _TensorRef]:
    key = _STATE_DICTS[weights]
    if key not in state_dicts:
        other = "raw" if weights == "ema" else "ema"
        held = sorted(map(str, state_dicts))
        mend = f"read it with weights={other!r} or use another checkpoint"
        raise MissingArtefact(sentence(f"checkpoint {path}", expected=f"state_dicts.{key}", got=held, mend=mend))
    policy = state_dicts[key]
    if not isinstance(policy, dict):
        raise _corrupt(path, f"state_dicts.{key} as a dict", type(policy).__name__)
    strange = [name for name, ref in policy.items() if not isinstance(name, str) or not isinstance(ref, _TensorRef)]
    if strange:
        raise _corrupt(path, f"nothing but tensors in state_dicts.{key}", strange[:3])
    return policy


def _network_config(
    path: Path, sizes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> DiffusionTransformerConfig:
    try:
        width, action_dim = sizes["input_emb.weight"]
        _, horizon, _ = sizes["pos_emb"]
        _, condition_tokens, _ = sizes["cond_pos_emb"]
        _, observation_dim = sizes["cond_obs_emb.weight"]
    except (KeyError, ValueError) as error:
        raise _foreign(path, "the weights of a transformer conditioned on observations", error) from error
    told = DiffusionTransformerConfig(
        action_dim=action_dim,
        observation_dim=observation_dim,
        horizon=horizon,
        observation_steps=condition_tokens - 1,
        # Counted, not the highest number: that would let a name decide how much is built.
        layers=len({name.split(".")[2] for name in sizes if re.match(r"decoder\.layers\.\d+\.", name)}),
        heads=_needed(path, config, "policy.model.n_head", int),
        width=width,
        attention_dropout=_needed(path, config, "policy.model.p_drop_attn", float),
    )
    for size, places in _SIZES.items():
        for where in places:
            stated = _stated(config, where)
            if stated is not None and stated != getattr(told, size):
                raise _foreign(path, f"cfg.{where}={getattr(told, size)}, as the weights have it", stated)
    return told


def _require_names(path: Path, policy: Mapping[str, _TensorRef], config: DiffusionTransformerConfig) -> None:
    with torch.device("meta"):
        ours = DiffusionTransformer(config).state_dict()
    sizes = {_NETWORK + name: tuple(value.shape) for name, value in ours.items()}
    needed = {*sizes, *(f"{_NORMALIZER}{key}.{part}" for key in ("obs", "action") for part in ("scale", "offset"))}
    missing = sorted(needed - policy.keys())
    extra = sorted(name for name in policy.keys() - needed if not _BESIDES_NETWORK.fullmatch(name))
    if missing or extra:
        raise _foreign(path, "the weight names of our network", f"missing {missing[:3]}, extra {extra[:3]}")
    for name, size in sizes.items():
        if policy[name].size != size:
            raise _foreign(path, f"{name} {list(size)}", list(policy[name].size))


def _require_values(path: Path, network: Mapping[str, Tensor], config: DiffusionTransformerConfig) -> None:
    with torch.random.fork_rng(devices=[]):
        smallest = DiffusionTransformer(replace(config, layers=1, heads=1, width=4)).state_dict()
    for mask in _MASKS:
        if not torch.equal(network[mask], smallest[mask]):
            raise _foreign(path, f"a causal {mask}", "another one")
    for name, value in network.items():
        if not value.is_floating_point() or not (name in _MASKS or torch.isfinite(value).all()):
            raise _corrupt(path, f"finite floating-point weights in {name}", f"NaN or infinity, or {value.dtype}")


def _normalizer(archive: _Archive, policy: Mapping[str, _TensorRef], key: str, channels: int) -> LimitsNormalizer:
    names = (f"{_NORMALIZER}{key}.scale", f"{_NORMALIZER}{key}.offset")
    scale, offset = (archive.tensor(name, policy[name]).float() for name in names)
    # The original's identity normaliser is one channel wide and broadcasts.
    if scale.shape == offset.shape == (1,):
        scale, offset = scale.repeat(channels), offset.repeat(channels)
    normalizer = LimitsNormalizer(scale, offset)
    if normalizer.channels != channels:
        raise _foreign(archive.path, f"{channels} channels in the {key} normaliser", normalizer.channels)
    return normalizer


def _action_steps(path: Path, config: Mapping[str, Any], network: DiffusionTransformerConfig) -> int:
    steps = _needed(path, config, "n_action_steps", int)
    longest = network.horizon - network.observation_steps + 1
    if not 1 <= steps <= longest:
        raise _foreign(path, f"cfg.n_action_steps from 1 to {longest}", steps)
    return steps


def _diffusion(path: Path, config: Mapping[str, Any]) -> OriginalDiffusion:
    scheduler = "policy.noise_scheduler"
    stated_variance = _stated(config, f"{scheduler}.variance_type")
    return OriginalDiffusion(
        num_train_timesteps=_needed(path, config, f"{scheduler}.num_train_timesteps", int),
        beta_start=_needed(path, config, f"{scheduler}.beta_start", float),
        beta_end=_needed(path, config, f"{scheduler}.beta_end", float),
        beta_schedule=_needed(path, config, f"{scheduler}.beta_schedule", str),
        prediction_type=_needed(path, config, f"{scheduler}.prediction_type", str),
        clip_sample=_needed(path, config, f"{scheduler}.clip_sample", bool),
        variance_type=None if stated_variance is None else _needed(path, config, f"{scheduler}.variance_type", str),
    )
