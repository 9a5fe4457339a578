"""The reader of the original's ``.ckpt``: files written as the original writes them, and hostile ones."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import dill
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from bac.errors import BacError, CorruptArtefact, InvalidInput, Mismatch, MissingArtefact
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.original_checkpoint import OriginalDiffusion, read_original_checkpoint

SIZES = DiffusionTransformerConfig(
    action_dim=2, observation_dim=5, horizon=8, observation_steps=2, layers=2, width=32, attention_dropout=0.3
)

CONFIG = """
name: train_diffusion_transformer_lowdim
task: {name: pusht_lowdim, obs_dim: 5, action_dim: 2}
obs_dim: ${task.obs_dim}
action_dim: ${task.action_dim}
horizon: 8
n_obs_steps: 2
n_action_steps: 4
obs_as_cond: true
policy:
  _target_: diffusion_policy.policy.diffusion_transformer_lowdim_policy.DiffusionTransformerLowdimPolicy
  model:
    _target_: diffusion_policy.model.diffusion.transformer_for_diffusion.TransformerForDiffusion
    input_dim: "${eval:'${action_dim} if ${obs_as_cond} else ${obs_dim} + ${action_dim}'}"
    output_dim: ${policy.model.input_dim}
    horizon: ${horizon}
    n_obs_steps: ${n_obs_steps}
    cond_dim: ${obs_dim}
    n_layer: 2
    n_head: 4
    n_emb: 32
    p_drop_emb: 0.0
    p_drop_attn: 0.3
    causal_attn: true
    time_as_cond: true
    obs_as_cond: ${obs_as_cond}
    n_cond_layers: 0
  noise_scheduler:
    _target_: diffusers.schedulers.scheduling_ddpm.DDPMScheduler
    num_train_timesteps: 100
    beta_start: 0.0001
    beta_end: 0.02
    beta_schedule: squaredcos_cap_v2
    variance_type: fixed_small
    clip_sample: true
    prediction_type: epsilon
  horizon: ${horizon}
  obs_dim: ${obs_dim}
  action_dim: ${action_dim}
  n_action_steps: ${n_action_steps}
  n_obs_steps: ${n_obs_steps}
  obs_as_cond: ${obs_as_cond}
  pred_action_steps_only: false
optimizer: {betas: [0.9, 0.95], learning_rate: 1.0e-4}
logging: {id: null, copy: "${logging.id}", name: "run of ${name}", tags: ["${name}", "${task.name}"]}
circle: {first: "${circle.second}", second: "${circle.first}"}
"""

Payload = dict[str, Any]


def _config() -> DictConfig:
    config = OmegaConf.create(CONFIG)
    assert isinstance(config, DictConfig)
    return config


@cache
def _network(seed: int) -> DiffusionTransformer:
    torch.manual_seed(seed)
    return DiffusionTransformer(SIZES).eval()


def _policy_state(network: DiffusionTransformer) -> OrderedDict[str, Tensor]:
    """The state dict of the original's policy object around ``network``."""
    state = OrderedDict((f"model.{name}", value) for name, value in network.state_dict().items())
    state["_dummy_variable"] = torch.nn.Parameter()
    state["mask_generator._dummy_variable"] = torch.nn.Parameter()
    for key, channels in (("obs", 5), ("action", 2)):
        state[f"normalizer.params_dict.{key}.scale"] = torch.arange(1, channels + 1) / 10
        state[f"normalizer.params_dict.{key}.offset"] = torch.arange(channels) / 5
        for statistic in ("min", "max", "mean", "std"):
            state[f"normalizer.params_dict.{key}.input_stats.{statistic}"] = torch.ones(channels)
    # As nn.Module.state_dict leaves it; it is pickled as the dict's attribute.
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return state


def _optimizer_state() -> dict[str, Any]:
    """What AdamW's state dict holds; building a real one costs seconds of imports."""
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    return {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "foreach": None, "params": [0]}]}


def _payload() -> Payload:
    return {
        "cfg": _config(),
        "state_dicts": {
            "model": _policy_state(_network(1)),
            "ema_model": _policy_state(_network(2)),
            "optimizer": _optimizer_state(),
        },
        "pickles": {"global_step": dill.dumps(1200), "_output_dir": dill.dumps("data/outputs")},
    }


def _save(path: Path, payload: object) -> Path:
    torch.save(payload, path, pickle_module=dill)
    return path


def _zip_of(path: Path, data: bytes) -> Path:
    """A torch zip file around a hand-written pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return path


@pytest.fixture(scope="module")
def payload() -> Payload:
    return _payload()


@pytest.fixture(scope="module")
def genuine(payload: Payload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("genuine") / "latest.ckpt", payload)


def _changed(path: Path, change: Callable[[Payload], object]) -> Path:
    payload = _payload()
    change(payload)
    return _save(path / "changed.ckpt", payload)


@pytest.mark.parametrize(("weights", "key"), [("raw", "model"), ("ema", "ema_model")])
def test_weights_load_exactly(genuine: Path, payload: Payload, weights: Any, key: str) -> None:
    read = read_original_checkpoint(genuine, weights=weights)
    saved = {name: value for name, value in payload["state_dicts"][key].items() if name.startswith("model.")}
    assert {f"model.{name}" for name in read.network} == set(saved)
    for name, value in read.network.items():
        torch.testing.assert_close(value, saved[f"model.{name}"].detach(), rtol=0, atol=0)


def test_averaged_and_raw_weights_differ(genuine: Path) -> None:
    raw = read_original_checkpoint(genuine, weights="raw")
    averaged = read_original_checkpoint(genuine, weights="ema")
    assert not torch.equal(raw.network["head.weight"], averaged.network["head.weight"])


def test_strict_load_gives_the_same_forward(genuine: Path) -> None:
    read = read_original_checkpoint(genuine, weights="ema")
    assert read.network_config == SIZES
    network = DiffusionTransformer(read.network_config).eval()
    network.load_state_dict(read.network, strict=True)
    inputs = (torch.randn(3, 8, 2), torch.tensor(7), torch.randn(3, 2, 5))
    assert torch.equal(network(*inputs), _network(2)(*inputs))


def test_reading_leaves_the_random_state_alone(genuine: Path) -> None:
    before = torch.random.get_rng_state()
    read_original_checkpoint(genuine, weights="ema")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_normalizers_and_settings(genuine: Path) -> None:
    read = read_original_checkpoint(genuine, weights="ema")
    torch.testing.assert_close(read.normalizers["action"].scale, torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(read.normalizers["action"].offset, torch.tensor([0.0, 0.2]))
    assert read.normalizers["obs"].channels == 5
    assert (read.horizon, read.observation_steps, read.action_steps) == (8, 2, 4)
    assert read.diffusion == OriginalDiffusion(
        100, 0.0001, 0.02, "squaredcos_cap_v2", "epsilon", clip_sample=True, variance_type="fixed_small"
    )


def test_config_is_plain_and_resolved(genuine: Path) -> None:
    config = read_original_checkpoint(genuine, weights="ema").config
    assert type(config) is dict
    assert type(config["policy"]["model"]) is dict
    assert config["obs_dim"] == config["policy"]["model"]["cond_dim"] == 5
    assert config["policy"]["model"]["obs_as_cond"] is True
    assert config["optimizer"] == {"betas": [0.9, 0.95], "learning_rate": 1e-4}
    assert config["logging"]["tags"] == ["train_diffusion_transformer_lowdim", "pusht_lowdim"]
    assert config["logging"]["copy"] is None


def test_what_cannot_be_resolved_stays_as_written(genuine: Path) -> None:
    config = read_original_checkpoint(genuine, weights="ema").config
    assert config["policy"]["model"]["output_dim"].startswith("${eval:")
    assert config["logging"]["name"] == "run of ${name}"
    assert config["circle"]["first"] in {"${circle.first}", "${circle.second}"}


def test_a_config_resolved_before_saving_reads_the_same(tmp_path: Path) -> None:
    def resolve(payload: Payload) -> None:
        del payload["cfg"]["circle"], payload["cfg"]["logging"]
        payload["cfg"].policy.model.input_dim = 2
        OmegaConf.resolve(payload["cfg"])

    read = read_original_checkpoint(_changed(tmp_path, resolve), weights="ema")
    assert read.network_config == SIZES
    assert read.config["policy"]["model"]["output_dim"] == 2


def test_one_channel_normalizer_broadcasts(tmp_path: Path) -> None:
    def identity(payload: Payload) -> None:
        policy = payload["state_dicts"]["ema_model"]
        policy["normalizer.params_dict.action.scale"] = torch.ones(1)
        policy["normalizer.params_dict.action.offset"] = torch.zeros(1)

    read = read_original_checkpoint(_changed(tmp_path, identity), weights="ema")
    assert read.normalizers["action"].scale.tolist() == [1.0, 1.0]


class _Evil:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self._call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._call


def _write_marker(marker: str) -> Callable[[], object]:
    return lambda: Path(marker).touch()


@pytest.mark.parametrize(
    ("named", "evil"),
    [
        ("posix.system", lambda marker: _Evil(os.system, f"touch {marker}")),
        ("eval", lambda marker: _Evil(eval, f"open({marker!r}, 'w')")),
        ("exec", lambda marker: _Evil(exec, f"open({marker!r}, 'w')")),
        ("getattr", lambda marker: _Evil(getattr, os, "system")),
        ("open", lambda marker: _Evil(open, marker, "w")),
        ("dill._dill", _write_marker),
    ],
    ids=["system", "eval", "exec", "getattr", "open", "lambda"],
)
def test_evil_object_is_named_and_not_run(tmp_path: Path, named: str, evil: Callable[[str], object]) -> None:
    marker = tmp_path / "executed"
    path = _changed(tmp_path, lambda payload: payload["pickles"].update(x=evil(str(marker))))
    with pytest.raises(CorruptArtefact, match=named):
        read_original_checkpoint(path, weights="ema")
    assert not marker.exists()


@pytest.mark.parametrize("place", ["cfg", "state_dicts", "unheard_of"])
def test_evil_object_is_refused_anywhere(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "executed"
    path = _changed(tmp_path, lambda payload: payload.update({place: _Evil(os.system, f"touch {marker}")}))
    with pytest.raises(CorruptArtefact, match=r"posix\.system"):
        read_original_checkpoint(path, weights="ema")
    assert not marker.exists()


def test_the_evil_object_would_have_run(tmp_path: Path) -> None:
    """Guards the test above against evil that is harmless by mistake."""
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(_Evil(open, str(marker), "w"))).close()
    assert marker.exists()


_HAND_WRITTEN = {
    "os.system by INST": b"(S'touch MARKER'\nios\nsystem\n.",
    "builtins.eval by STACK_GLOBAL": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x01x\x85R.",
    "dill._dill._eval_repr": b"cdill._dill\n_eval_repr\n(S'1'\ntR.",
    "functools.partial": b"cfunctools\npartial\n(tR.",
    "collections.OrderedDict.fromkeys": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.",
    "torch.load": b"ctorch\nload\n.",
    "torch.storage._load_from_bytes": b"ctorch.storage\n_load_from_bytes\n(C\x01xtR.",
}


@pytest.mark.parametrize("data", _HAND_WRITTEN.values(), ids=_HAND_WRITTEN.keys())
def test_hand_written_pickle_is_named_and_refused(tmp_path: Path, data: bytes, request: pytest.FixtureRequest) -> None:
    marker = tmp_path / "executed"
    path = _zip_of(tmp_path / "evil.ckpt", data.replace(b"MARKER", str(marker).encode()))
    with pytest.raises(CorruptArtefact, match=request.node.callspec.id.split(" ")[0]):
        read_original_checkpoint(path, weights="ema")
    assert not marker.exists()


def test_types_that_dill_hands_out_cannot_be_called(tmp_path: Path) -> None:
    data = b"cdill._dill\n_load_type\n(S'DictType'\ntR(tR."
    with pytest.raises(CorruptArtefact, match="not callable"):
        read_original_checkpoint(_zip_of(tmp_path / "evil.ckpt", data), weights="ema")


@pytest.mark.parametrize(
    "known",
    [
        b"ccollections\nOrderedDict\n",
        b"comegaconf.nodes\nAnyNode\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"c_codecs\nencode\n",
        b"ctorch\nFloatStorage\n",
    ],
)
@pytest.mark.parametrize("state", [b"N}S'mark'\nI1\ns\x86b.", b"}S'mark'\nI1\nsb."], ids=["slots", "attributes"])
def test_no_file_can_alter_what_the_next_one_meets(tmp_path: Path, genuine: Path, known: bytes, state: bytes) -> None:
    with pytest.raises(CorruptArtefact, match="pickle"):
        read_original_checkpoint(_zip_of(tmp_path / "evil.ckpt", known + state), weights="ema")
    read_original_checkpoint(genuine, weights="ema")


def test_values_of_pickles_are_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    def hide(payload: Payload) -> None:
        payload["pickles"]["epoch"] = dill.dumps(_Evil(open, str(marker), "w"))

    read_original_checkpoint(_changed(tmp_path, hide), weights="ema")
    assert not marker.exists()


def test_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    def swell(payload: Payload) -> None:
        policy = payload["state_dicts"]["ema_model"]
        policy["model.head.weight"] = torch.zeros(1).expand(2, 32)

    with pytest.raises(CorruptArtefact, match=r"head\.weight"):
        read_original_checkpoint(_changed(tmp_path, swell), weights="ema")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(genuine: Path, tmp_path: Path, kept: float) -> None:
    whole = genuine.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CorruptArtefact, match="whole zip file"):
        read_original_checkpoint(path, weights="ema")


def test_flipped_bytes_of_a_weight_are_refused(genuine: Path, tmp_path: Path, payload: Payload) -> None:
    weight = payload["state_dicts"]["ema_model"]["model.head.weight"].numpy().tobytes()
    whole = genuine.read_bytes()
    assert whole.count(weight) == 1
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(whole.replace(weight, weight[::-1]))
    with pytest.raises(CorruptArtefact, match="CRC"):
        read_original_checkpoint(path, weights="ema")


def test_damaged_table_of_contents_is_refused(genuine: Path, tmp_path: Path) -> None:
    whole = genuine.read_bytes()
    last = whole.rindex(b"/data/1")
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(whole[:last] + b"\xff" + whole[last + 1 :])
    with pytest.raises(CorruptArtefact, match="zip"):
        read_original_checkpoint(path, weights="ema")


def test_text_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "readme.ckpt"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CorruptArtefact, match="zip"):
        read_original_checkpoint(path, weights="ema")


def test_zip_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(CorruptArtefact, match=r"data\.pkl"):
        read_original_checkpoint(path, weights="ema")


def test_compressed_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + bytes(1000))
    with pytest.raises(CorruptArtefact, match="a compressed one"):
        read_original_checkpoint(path, weights="ema")


def test_other_byte_order_is_refused(tmp_path: Path) -> None:
    path = _zip_of(tmp_path / "big.ckpt", b"}.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(CorruptArtefact, match="little-endian"):
        read_original_checkpoint(path, weights="ema")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefact, match=r"none\.ckpt"):
        read_original_checkpoint(tmp_path / "none.ckpt", weights="ema")


def test_weights_must_be_chosen(genuine: Path) -> None:
    with pytest.raises(TypeError):
        read_original_checkpoint(genuine)  # type: ignore[call-arg]
    with pytest.raises(InvalidInput, match="ema or raw"):
        read_original_checkpoint(genuine, weights="best")  # type: ignore[arg-type]


def test_missing_average_points_to_the_raw_weights(tmp_path: Path) -> None:
    path = _changed(tmp_path, lambda payload: payload["state_dicts"].pop("ema_model"))
    with pytest.raises(MissingArtefact, match="weights='raw'"):
        read_original_checkpoint(path, weights="ema")
    read_original_checkpoint(path, weights="raw")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda p: p.pop("state_dicts"), CorruptArtefact, "state_dicts"),
        (lambda p: p.pop("cfg"), CorruptArtefact, "DictConfig"),
        (lambda p: p["state_dicts"].update(ema_model=[]), CorruptArtefact, "as a dict"),
        (lambda p: p["state_dicts"]["ema_model"].update(lr=1.0), CorruptArtefact, "nothing but tensors"),
    ],
)
def test_incomplete_payload_is_refused(
    tmp_path: Path, change: Callable[[Payload], object], error: type[BacError], text: str
) -> None:
    with pytest.raises(error, match=text):
        read_original_checkpoint(_changed(tmp_path, change), weights="ema")


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("model.head.bias", torch.tensor([0.0, float("nan")]), CorruptArtefact),
        ("model.head.bias", torch.tensor([0.0, float("inf")]), CorruptArtefact),
        ("model.head.bias", torch.tensor([0, 1]), CorruptArtefact),
        ("model.head.bias", torch.zeros(3), Mismatch),
        ("model.head.bias", None, Mismatch),
        ("model.decoder.layers.0.linear1.weight", None, Mismatch),
        ("model.extra.weight", torch.zeros(2), Mismatch),
        ("obs_encoder.weight", torch.zeros(2), Mismatch),
        ("model.pos_emb", None, Mismatch),
        ("model.mask", torch.zeros(8, 8), Mismatch),
        ("normalizer.params_dict.obs.scale", None, Mismatch),
        ("normalizer.params_dict.obs.scale", torch.full((5,), float("nan")), InvalidInput),
    ],
)
def test_wrong_weight_is_refused(tmp_path: Path, name: str, value: Tensor | None, error: type[BacError]) -> None:
    def replace(payload: Payload) -> None:
        policy = payload["state_dicts"]["ema_model"]
        policy.pop(name, None)
        if value is not None:
            policy[name] = value

    path = _changed(tmp_path, replace)
    with pytest.raises(error):
        read_original_checkpoint(path, weights="ema")
    read_original_checkpoint(path, weights="raw")


def test_normalizer_of_another_width_is_refused(tmp_path: Path) -> None:
    def widen(payload: Payload) -> None:
        policy = payload["state_dicts"]["ema_model"]
        policy["normalizer.params_dict.obs.scale"] = torch.ones(6)
        policy["normalizer.params_dict.obs.offset"] = torch.ones(6)

    with pytest.raises(Mismatch, match="5 channels"):
        read_original_checkpoint(_changed(tmp_path, widen), weights="ema")


@pytest.mark.parametrize(
    ("where", "value", "error"),
    [
        ("policy._target_", "diffusion_policy.policy.diffusion_unet_lowdim_policy.DiffusionUnetLowdimPolicy", Mismatch),
        ("policy.model.n_cond_layers", 2, Mismatch),
        ("policy.model.causal_attn", False, Mismatch),
        ("policy.model.time_as_cond", False, Mismatch),
        ("policy.obs_as_cond", False, Mismatch),
        ("policy.pred_action_steps_only", True, Mismatch),
        ("policy.model.n_layer", 3, Mismatch),
        ("policy.model.n_emb", 64, Mismatch),
        ("horizon", 10, Mismatch),
        ("n_obs_steps", 3, Mismatch),
        ("task.obs_dim", 6, Mismatch),
        ("policy.model.output_dim", 3, Mismatch),
        ("n_action_steps", 8, Mismatch),
        ("n_action_steps", "${eval:'4'}", CorruptArtefact),
        ("policy.model.n_head", 5, InvalidInput),
        ("policy.model.n_head", None, CorruptArtefact),
        ("policy.noise_scheduler.clip_sample", None, CorruptArtefact),
        ("policy.noise_scheduler.beta_schedule", "${nowhere}", CorruptArtefact),
    ],
)
def test_config_of_another_policy_is_refused(tmp_path: Path, where: str, value: object, error: type[BacError]) -> None:
    path = _changed(tmp_path, lambda payload: OmegaConf.update(payload["cfg"], where, value))
    with pytest.raises(error):
        read_original_checkpoint(path, weights="ema")


def test_config_may_leave_the_variance_out(tmp_path: Path) -> None:
    path = _changed(tmp_path, lambda payload: payload["cfg"].policy.noise_scheduler.pop("variance_type"))
    assert read_original_checkpoint(path, weights="ema").diffusion.variance_type is None


def test_every_error_is_one_line(tmp_path: Path) -> None:
    path = _zip_of(tmp_path / "evil.ckpt", b"\x80\x04\x8c\x04a\nb\x1b\x8c\x01c\x93.")
    with pytest.raises(CorruptArtefact) as refusal:
        read_original_checkpoint(path, weights="ema")
    assert "\n" not in str(refusal.value)
    assert "\x1b" not in str(refusal.value)
