"""Reads transformer checkpoints of ``real-stanford/diffusion_policy`` without its packages and without trust.

Such a ``.ckpt`` is torch's zip format, its ``data.pkl`` pickled by dill::

    archive/data.pkl   cfg          omegaconf DictConfig   -> plain nested dict, ``${a.b}`` resolved
                       state_dicts  model, ema_model, ...  -> one of the two, chosen by the caller
                       pickles      dill bytes             -> dropped
    archive/data/<n>   storages                            -> read only for the tensors returned

``policies/restricted_archive.py`` reads the file without running any of it; here is what its parts mean, and in
``policies/original_vision.py`` what those of an image policy mean beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from bac.errors import InvalidInput, Mismatch, MissingArtefact, sentence
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.normalizer import LimitsNormalizer
from policies.original_vision import ENCODER, HYBRID_POLICY, OriginalVision, read_vision
from policies.restricted_archive import InertNode, TensorRef, TorchArchive, corrupt, open_records

_Kind = TypeVar("_Kind", int, float, str, bool)

_STATE_DICTS = {"ema": "ema_model", "raw": "model"}
_POLICY = "DiffusionTransformerLowdimPolicy"
_NETWORK = "model."
_MASKS = ("mask", "memory_mask")
_NORMALIZER = "normalizer.params_dict."
_BESIDES_NETWORK = r"(mask_generator\.)?_dummy_variable"
_STATISTICS = r"normalizer\.params_dict\.({})\.(scale|offset|input_stats\.(min|max|mean|std))"

_SIZES = {
    "action_dim": ("action_dim", "policy.action_dim", "policy.model.input_dim", "policy.model.output_dim"),
    "observation_dim": ("obs_dim", "policy.obs_dim", "policy.model.cond_dim"),
    "horizon": ("horizon", "policy.horizon", "policy.model.horizon"),
    "observation_steps": ("n_obs_steps", "policy.n_obs_steps", "policy.model.n_obs_steps"),
    "layers": ("policy.model.n_layer", "policy.n_layer"),
    "width": ("policy.model.n_emb", "policy.n_emb"),
}
"""Each size that the weights tell -> where the configuration states it again."""

_SWITCHES = {
    "policy.obs_as_cond": True,
    "policy.pred_action_steps_only": False,
    "policy.model.obs_as_cond": True,
    "policy.model.time_as_cond": True,
    "policy.model.causal_attn": True,
    "policy.model.n_cond_layers": 0,
    # An image policy's configuration has the network's values among its own.
    "policy.time_as_cond": True,
    "policy.causal_attn": True,
    "policy.n_cond_layers": 0,
}
"""The only variant that our network is; one the configuration leaves out still shows in the weights' names."""


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
        normalizers: ``obs`` with Do channels, of an image policy those of its low-dim keys, and ``action`` with Da.
        network_config: sizes from the weights, heads and dropout from the configuration.
        action_steps: actions executed per chunk Ta, from the chunk's index To - 1 on.
        diffusion: the noise scheduler of the training.
        vision: of an image policy, its cameras and encoder; else None.
    """

    config: Mapping[str, Any]
    network: dict[str, Tensor]
    normalizers: Mapping[str, LimitsNormalizer]
    network_config: DiffusionTransformerConfig
    action_steps: int
    diffusion: OriginalDiffusion
    vision: OriginalVision | None = None

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
    with open_records(path) as records:
        return _read(TorchArchive(path, records), weights)


def _read(archive: TorchArchive, weights: str) -> OriginalCheckpoint:
    path, payload = archive.path, archive.payload()
    config = _plain_config(path, payload.get("cfg"))
    hybrid = _require_our_variant(path, config) == HYBRID_POLICY
    policy = _policy_tensors(path, payload["state_dicts"], weights)
    vision = read_vision(archive, config["policy"], policy) if hybrid else None
    refs = {name.removeprefix(_NETWORK): ref for name, ref in policy.items() if name.startswith(_NETWORK)}
    network_config = _network_config(path, {name: ref.size for name, ref in refs.items()}, config)
    observed = {"obs": network_config.observation_dim} if vision is None else vision.low_dim
    _require_names(path, policy, network_config, vision)
    network = {name: archive.tensor(name, ref) for name, ref in refs.items()}
    _require_values(path, network, network_config)
    return OriginalCheckpoint(
        config=config,
        network=network,
        normalizers={
            "obs": _joined([_normalizer(archive, policy, key, size) for key, size in observed.items()]),
            "action": _normalizer(archive, policy, "action", network_config.action_dim),
        },
        network_config=network_config,
        action_steps=_action_steps(path, config, network_config),
        diffusion=_diffusion(path, config),
        vision=vision,
    )


def _foreign(path: Path, expected: object, got: object) -> Mismatch:
    mend = "use a checkpoint of the original's low-dim or hybrid image transformer policy"
    return Mismatch(sentence(f"checkpoint {path}", expected=expected, got=got, mend=mend))


def _plain_config(path: Path, node: object) -> Mapping[str, Any]:
    try:
        written = _plain(node)
        config = _resolve(written, written)
    except (RecursionError, TypeError) as error:
        raise corrupt(path, "cfg as an omegaconf tree of plain values", error) from error
    if not isinstance(config, dict):
        raise corrupt(path, "cfg as an omegaconf DictConfig", type(node).__name__)
    return config


def _plain(node: object) -> Any:
    if isinstance(node, InertNode):
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
    raise corrupt(path, f"cfg.{where} of type {kind.__name__}", repr(value))


def _require_our_variant(path: Path, config: Mapping[str, Any]) -> str:
    """Return the name of the policy's class."""
    target = _needed(path, config, "policy._target_", str).rpartition(".")[2]
    if target not in {_POLICY, HYBRID_POLICY}:
        raise _foreign(path, f"{_POLICY} or {HYBRID_POLICY}", target)
    for where, ours in _SWITCHES.items():
        stated = _stated(config, where)
        if stated is not None and stated != ours:
            raise _foreign(path, f"{where}={ours}", stated)
    return target


def _policy_tensors(path: Path, state_dicts: Mapping[str, Any], weights: str) -> Mapping[str, TensorRef]:
    key = _STATE_DICTS[weights]
    if key not in state_dicts:
        other = "raw" if weights == "ema" else "ema"
        held = sorted(map(str, state_dicts))
        mend = f"read it with weights={other!r} or use another checkpoint"
        raise MissingArtefact(sentence(f"checkpoint {path}", expected=f"state_dicts.{key}", got=held, mend=mend))
    policy = state_dicts[key]
    if not isinstance(policy, dict):
        raise corrupt(path, f"state_dicts.{key} as a dict", type(policy).__name__)
    strange = [name for name, ref in policy.items() if not isinstance(name, str) or not isinstance(ref, TensorRef)]
    if strange:
        raise corrupt(path, f"nothing but tensors in state_dicts.{key}", strange[:3])
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
    stated_under = "policy.model" if _stated(config, "policy.model") is not None else "policy"
    told = DiffusionTransformerConfig(
        action_dim=action_dim,
        observation_dim=observation_dim,
        horizon=horizon,
        observation_steps=condition_tokens - 1,
        # Counted, not the highest number: that would let a name decide how much is built.
        layers=len({name.split(".")[2] for name in sizes if re.match(r"decoder\.layers\.\d+\.", name)}),
        heads=_needed(path, config, f"{stated_under}.n_head", int),
        width=width,
        attention_dropout=_needed(path, config, f"{stated_under}.p_drop_attn", float),
    )
    for size, places in _SIZES.items():
        for where in places:
            stated = _stated(config, where)
            if stated is not None and stated != getattr(told, size):
                raise _foreign(path, f"cfg.{where}={getattr(told, size)}, as the weights have it", stated)
    return told


def _require_names(
    path: Path, policy: Mapping[str, TensorRef], config: DiffusionTransformerConfig, vision: OriginalVision | None
) -> None:
    with torch.device("meta"):
        ours = DiffusionTransformer(config).state_dict()
    sizes = {_NETWORK + name: tuple(value.shape) for name, value in ours.items()}
    normalized = ("obs", "action") if vision is None else (*vision.observation, "action")
    needed = {*sizes, *(f"{_NORMALIZER}{key}.{part}" for key in normalized for part in ("scale", "offset"))}
    beside = re.compile(f"{_BESIDES_NETWORK}|{_STATISTICS.format('|'.join(map(re.escape, normalized)))}")
    read = set() if vision is None else {ENCODER + name for name in vision.encoder}
    missing = sorted(needed - policy.keys())
    extra = sorted(name for name in policy.keys() - needed - read if not beside.fullmatch(name))
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
            raise corrupt(path, f"finite floating-point weights in {name}", f"NaN or infinity, or {value.dtype}")


def _normalizer(archive: TorchArchive, policy: Mapping[str, TensorRef], key: str, channels: int) -> LimitsNormalizer:
    names = (f"{_NORMALIZER}{key}.scale", f"{_NORMALIZER}{key}.offset")
    scale, offset = (archive.tensor(name, policy[name]).float() for name in names)
    # The original's identity normaliser is one channel wide and broadcasts.
    if scale.shape == offset.shape == (1,):
        scale, offset = scale.repeat(channels), offset.repeat(channels)
    normalizer = LimitsNormalizer(scale, offset)
    if normalizer.channels != channels:
        raise _foreign(archive.path, f"{channels} channels in the {key} normaliser", normalizer.channels)
    return normalizer


def _joined(normalizers: Sequence[LimitsNormalizer]) -> LimitsNormalizer:
    """Return one normaliser of all channels side by side."""
    scales, offsets = ([getattr(each, part) for each in normalizers] for part in ("scale", "offset"))
    return LimitsNormalizer(torch.cat([torch.empty(0), *scales]), torch.cat([torch.empty(0), *offsets]))


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
