"""Reads checkpoints of ``real-stanford/diffusion_policy`` without its packages and without trust.

Such a ``.ckpt`` is torch's zip format, its ``data.pkl`` pickled by dill::

    archive/data.pkl   cfg          omegaconf DictConfig   -> plain nested dict, ``${a.b}`` resolved
                       state_dicts  model, ema_model, ...  -> one of the two
                       pickles      dill bytes             -> dropped
    archive/data/<n>   storages                            -> read only for the tensors returned

``restricted_archive.py`` reads the file without running any of it, ``original_config.py`` answers for ``cfg``; here is
what the tensors mean, and in ``original_vision.py`` what those of an image policy mean beside them. ``_READERS`` says
which policies are known: transformers on low-dim observations, and on images beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bac.choices import Choice, choice
from bac.errors import MissingArtefact, sentence
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.normalizer import LimitsNormalizer
from policies.original_config import OriginalConfig
from policies.original_task import OriginalTask, original_task
from policies.original_vision import ENCODER, OriginalVision, read_vision
from policies.restricted_archive import TensorRef, TorchArchive, corrupt, open_records

_NETWORK = "model."
_MASKS = ("mask", "memory_mask")
_NORMALIZER = "normalizer.params_dict."
_BESIDES_NETWORK = re.compile(
    r"(mask_generator\.)?_dummy_variable"
    r"|normalizer\.params_dict\.(?P<key>\w+)\.(scale|offset|input_stats\.(min|max|mean|std))"
)

_SIZES = {
    "action_dim": ("action_dim", "policy.action_dim", "policy.model.input_dim", "policy.model.output_dim"),
    "observation_dim": ("obs_dim", "policy.obs_dim", "policy.model.cond_dim"),
    "horizon": ("horizon", "policy.horizon", "policy.model.horizon"),
    "observation_steps": ("n_obs_steps", "policy.n_obs_steps", "policy.model.n_obs_steps"),
    "layers": ("policy.model.n_layer", "policy.n_layer"),
    "width": ("policy.model.n_emb", "policy.n_emb"),
}
"""Each size that the weights tell -> where the configuration states it again.

The network's own values are in ``policy.model`` of a low-dim policy, and in ``policy`` of an image policy.
"""

_SWITCHES = {
    "policy.obs_as_cond": True,
    "policy.pred_action_steps_only": False,
    "policy.model.obs_as_cond": True,
    "policy.model.time_as_cond": True,
    "policy.model.causal_attn": True,
    "policy.model.n_cond_layers": 0,
    "policy.time_as_cond": True,
    "policy.causal_attn": True,
    "policy.n_cond_layers": 0,
    "policy.predict_epsilon": True,
    "policy.noise_scheduler.clip_sample_range": 1.0,
    "policy.noise_scheduler.thresholding": False,
    "policy.noise_scheduler.rescale_betas_zero_snr": False,
}
"""The only variant that our network and samplers are; a network's that is left out still shows in its weights."""


class Weights(Choice):
    """The sets of weights in a checkpoint: averaged over training (exponential moving average), or as trained."""

    EMA = "ema"
    RAW = "raw"

    @property
    def key(self) -> str:
        """Where they are in ``state_dicts``."""
        return "ema_model" if self is Weights.EMA else "model"


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
        weights: which of the two sets of weights ``network`` is.
        task: what it was trained for; None if that is no task of ours.
        vision: of an image policy, its cameras and encoder; else None.
    """

    config: Mapping[str, Any]
    network: dict[str, Tensor]
    normalizers: Mapping[str, LimitsNormalizer]
    network_config: DiffusionTransformerConfig
    action_steps: int
    diffusion: OriginalDiffusion
    weights: Weights
    task: OriginalTask | None
    vision: OriginalVision | None

    @property
    def horizon(self) -> int:
        """Actions per chunk T."""
        return self.network_config.horizon

    @property
    def observation_steps(self) -> int:
        """Observations that the policy sees To."""
        return self.network_config.observation_steps


def read_original_checkpoint(path: Path | str, *, weights: Weights | str | None) -> OriginalCheckpoint:
    """Read one policy out of a ``.ckpt``.

    Args:
        path: the file.
        weights: ``ema`` for the averaged weights, ``raw`` for the trained ones; None for those that the original
            evaluates, the averaged ones unless the policy was trained without averaging.

    Raises:
        MissingArtefact: there is no such file, or it holds no such weights.
        CorruptArtefact: the file is truncated or foreign, names a global outside the known ones, lacks a value of the
            configuration, or holds weights that are not finite.
        Mismatch: the policy is none of ours, or weights and configuration disagree.
        InvalidInput: ``weights``, the head count or the normaliser statistics are out of range.
    """
    wanted = None if weights is None else choice("weights", weights, Weights)
    path = Path(path)
    if not path.is_file():
        raise MissingArtefact(sentence(f"checkpoint {path}", expected="a file", got="none", mend="correct the path"))
    with open_records(path) as records:
        archive = TorchArchive(path, records)
        payload = archive.payload()
        config = OriginalConfig.of(path, payload.get("cfg"))
        policy = config.needed("policy._target_", str).rpartition(".")[2]
        if policy not in _READERS:
            raise config.foreign(f"a policy among {sorted(_READERS)}", policy)
        chosen = wanted or _evaluated_weights(config, payload["state_dicts"])
        return _READERS[policy](archive, config, _policy_tensors(path, payload["state_dicts"], chosen), chosen)


def _low_dim(
    archive: TorchArchive, config: OriginalConfig, policy: Mapping[str, TensorRef], weights: Weights
) -> OriginalCheckpoint:
    return _checkpoint(archive, config, policy, weights, network_at="policy.model", vision=None)


def _hybrid_image(
    archive: TorchArchive, config: OriginalConfig, policy: Mapping[str, TensorRef], weights: Weights
) -> OriginalCheckpoint:
    vision = read_vision(archive, config, policy)
    return _checkpoint(archive, config, policy, weights, network_at="policy", vision=vision)


_Reader = Callable[[TorchArchive, OriginalConfig, Mapping[str, TensorRef], Weights], OriginalCheckpoint]

_READERS: Mapping[str, _Reader] = {
    "DiffusionTransformerLowdimPolicy": _low_dim,
    "DiffusionTransformerHybridImagePolicy": _hybrid_image,
}
"""Class of the policy, the end of ``cfg.policy._target_`` -> what reads its tensors."""


def _checkpoint(
    archive: TorchArchive,
    config: OriginalConfig,
    policy: Mapping[str, TensorRef],
    weights: Weights,
    *,
    network_at: str,
    vision: OriginalVision | None,
) -> OriginalCheckpoint:
    """Read what every policy has; ``network_at`` is where the configuration states the network's own values."""
    config.require(_SWITCHES)
    refs = {name.removeprefix(_NETWORK): ref for name, ref in policy.items() if name.startswith(_NETWORK)}
    network_config = _network_config(config, {name: ref.size for name, ref in refs.items()}, network_at)
    _require_names(config, policy, network_config, vision)
    action_dim, observation_dim = network_config.action_dim, network_config.observation_dim
    task = original_task(config, observation_dim=observation_dim, action_dim=action_dim, vision=vision)
    network = {name: archive.tensor(name, ref) for name, ref in refs.items()}
    _require_values(config, network, network_config)
    observed = {"obs": observation_dim} if vision is None else vision.low_dim
    return OriginalCheckpoint(
        config=config.values,
        network=network,
        normalizers={
            "obs": _joined([_normalizer(archive, config, policy, key, size) for key, size in observed.items()]),
            "action": _normalizer(archive, config, policy, "action", action_dim),
        },
        network_config=network_config,
        action_steps=_action_steps(config, network_config),
        diffusion=_diffusion(config),
        weights=weights,
        task=task,
        vision=vision,
    )


def _evaluated_weights(config: OriginalConfig, state_dicts: Mapping[str, Any]) -> Weights:
    averaged = Weights.EMA.key in state_dicts or config.stated("training.use_ema")
    return Weights.EMA if averaged else Weights.RAW


def _policy_tensors(path: Path, state_dicts: Mapping[str, Any], weights: Weights) -> Mapping[str, TensorRef]:
    key = weights.key
    if key not in state_dicts:
        other = Weights.RAW if weights is Weights.EMA else Weights.EMA
        held = sorted(map(str, state_dicts))
        mend = f"read it with weights={other} or use another checkpoint"
        raise MissingArtefact(sentence(f"checkpoint {path}", expected=f"state_dicts.{key}", got=held, mend=mend))
    policy = state_dicts[key]
    if not isinstance(policy, dict):
        raise corrupt(path, f"state_dicts.{key} as a dict", type(policy).__name__)
    strange = [name for name, ref in policy.items() if not isinstance(name, str) or not isinstance(ref, TensorRef)]
    if strange:
        raise corrupt(path, f"nothing but tensors in state_dicts.{key}", strange[:3])
    return policy


def _network_config(
    config: OriginalConfig, sizes: Mapping[str, tuple[int, ...]], network_at: str
) -> DiffusionTransformerConfig:
    try:
        width, action_dim = sizes["input_emb.weight"]
        _, horizon, _ = sizes["pos_emb"]
        _, condition_tokens, _ = sizes["cond_pos_emb"]
        _, observation_dim = sizes["cond_obs_emb.weight"]
    except (KeyError, ValueError) as error:
        raise config.foreign("the weights of a transformer conditioned on observations", error) from error
    told = DiffusionTransformerConfig(
        action_dim=action_dim,
        observation_dim=observation_dim,
        horizon=horizon,
        observation_steps=condition_tokens - 1,
        # Counted, not the highest number: that would let a name decide how much is built.
        layers=len({name.split(".")[2] for name in sizes if re.match(r"decoder\.layers\.\d+\.", name)}),
        heads=config.needed(f"{network_at}.n_head", int),
        width=width,
        attention_dropout=config.needed(f"{network_at}.p_drop_attn", float),
    )
    for size, places in _SIZES.items():
        config.require(dict.fromkeys(places, getattr(told, size)), because=", as the weights have it")
    return told


def _require_names(
    config: OriginalConfig,
    policy: Mapping[str, TensorRef],
    network_config: DiffusionTransformerConfig,
    vision: OriginalVision | None,
) -> None:
    with torch.device("meta"):
        ours = DiffusionTransformer(network_config).state_dict()
    sizes = {_NETWORK + name: tuple(value.shape) for name, value in ours.items()}
    normalized = {"action", *(("obs",) if vision is None else vision.observation)}
    needed = {*sizes, *(f"{_NORMALIZER}{key}.{part}" for key in normalized for part in ("scale", "offset"))}
    encoder = () if vision is None else (ENCODER + name for name in vision.encoder)
    unread = policy.keys() - needed - set(encoder)
    missing = sorted(needed - policy.keys())
    beside = {name: _BESIDES_NETWORK.fullmatch(name) for name in unread}
    extra = sorted(name for name, found in beside.items() if not found or found["key"] not in {None, *normalized})
    if missing or extra:
        raise config.foreign("the weight names of our network", f"missing {missing[:3]}, extra {extra[:3]}")
    for name, size in sizes.items():
        if policy[name].size != size:
            raise config.foreign(f"{name} {list(size)}", list(policy[name].size))


def _require_values(
    config: OriginalConfig, network: Mapping[str, Tensor], network_config: DiffusionTransformerConfig
) -> None:
    with torch.random.fork_rng(devices=[]):
        smallest = DiffusionTransformer(replace(network_config, layers=1, heads=1, width=4)).state_dict()
    for mask in _MASKS:
        if not torch.equal(network[mask], smallest[mask]):
            raise config.foreign(f"a causal {mask}", "another one")
    for name, value in network.items():
        if not value.is_floating_point() or not (name in _MASKS or torch.isfinite(value).all()):
            raise corrupt(config.path, f"finite floating-point weights in {name}", f"NaN or infinity, or {value.dtype}")


def _normalizer(
    archive: TorchArchive, config: OriginalConfig, policy: Mapping[str, TensorRef], key: str, channels: int
) -> LimitsNormalizer:
    names = (f"{_NORMALIZER}{key}.scale", f"{_NORMALIZER}{key}.offset")
    scale, offset = (archive.tensor(name, policy[name]).float() for name in names)
    # The original's identity normaliser is one channel wide and broadcasts.
    if scale.shape == offset.shape == (1,):
        scale, offset = scale.repeat(channels), offset.repeat(channels)
    normalizer = LimitsNormalizer(scale, offset)
    if normalizer.channels != channels:
        raise config.foreign(f"{channels} channels in the {key} normaliser", normalizer.channels)
    return normalizer


def _joined(normalizers: Sequence[LimitsNormalizer]) -> LimitsNormalizer:
    """Return one normaliser of all channels side by side; there may be none."""
    scales, offsets = ([torch.empty(0), *(getattr(each, part) for each in normalizers)] for part in ("scale", "offset"))
    return LimitsNormalizer(torch.cat(scales), torch.cat(offsets))


def _action_steps(config: OriginalConfig, network: DiffusionTransformerConfig) -> int:
    steps = config.needed("n_action_steps", int)
    longest = network.horizon - network.observation_steps + 1
    if not 1 <= steps <= longest:
        raise config.foreign(f"cfg.n_action_steps from 1 to {longest}", steps)
    return steps


def _diffusion(config: OriginalConfig) -> OriginalDiffusion:
    scheduler = "policy.noise_scheduler"
    stated_variance = config.stated(f"{scheduler}.variance_type")
    return OriginalDiffusion(
        num_train_timesteps=config.needed(f"{scheduler}.num_train_timesteps", int),
        beta_start=config.needed(f"{scheduler}.beta_start", float),
        beta_end=config.needed(f"{scheduler}.beta_end", float),
        beta_schedule=config.needed(f"{scheduler}.beta_schedule", str),
        prediction_type=config.needed(f"{scheduler}.prediction_type", str),
        clip_sample=config.needed(f"{scheduler}.clip_sample", bool),
        variance_type=None if stated_variance is None else config.needed(f"{scheduler}.variance_type", str),
    )
