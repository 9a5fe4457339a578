"""The reader of the original's ``.ckpt``: files written as the original writes them, and what differs from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from bac.errors import BacError, CorruptArtefact, InvalidInput, Mismatch, MissingArtefact
from policies.diffusion_transformer import DiffusionTransformer
from policies.original_checkpoint import OriginalDiffusion, read_original_checkpoint
from tests.policies.original_payloads import Payload, changed, network, original_payload, save, sizes

SIZES = sizes()


@pytest.fixture(scope="module")
def payload() -> Payload:
    return original_payload()


@pytest.fixture(scope="module")
def genuine(payload: Payload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("genuine") / "latest.ckpt", payload)


@pytest.mark.parametrize(("weights", "key"), [("raw", "model"), ("ema", "ema_model")])
def test_weights_load_exactly(genuine: Path, payload: Payload, weights: Any, key: str) -> None:
    read = read_original_checkpoint(genuine, weights=weights)
    saved = {name: value for name, value in payload["state_dicts"][key].items() if name.startswith("model.")}
    assert {f"model.{name}" for name in read.network} == set(saved)
    for name, value in read.network.items():
        torch.testing.assert_close(value, saved[f"model.{name}"], rtol=0, atol=0)


def test_averaged_and_raw_weights_differ(genuine: Path) -> None:
    raw = read_original_checkpoint(genuine, weights="raw")
    averaged = read_original_checkpoint(genuine, weights="ema")
    assert not torch.equal(raw.network["head.weight"], averaged.network["head.weight"])


def test_strict_load_gives_the_same_forward(genuine: Path) -> None:
    read = read_original_checkpoint(genuine, weights="ema")
    assert read.network_config == SIZES
    loaded = DiffusionTransformer(read.network_config).eval()
    loaded.load_state_dict(read.network, strict=True)
    inputs = (torch.randn(3, 8, 2), torch.tensor(7), torch.randn(3, 2, 20))
    assert torch.equal(loaded(*inputs), network(2)(*inputs))


def test_reading_leaves_the_random_state_alone(genuine: Path) -> None:
    before = torch.random.get_rng_state()
    read_original_checkpoint(genuine, weights="ema")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_normalizers_and_settings(genuine: Path) -> None:
    read = read_original_checkpoint(genuine, weights="ema")
    assert read.normalizers["action"].scale.tolist() == [1 / 256] * 2
    assert read.normalizers["action"].offset.tolist() == [-1] * 2
    assert read.normalizers["obs"].channels == 20
    assert (read.horizon, read.observation_steps, read.action_steps) == (8, 2, 4)
    assert read.diffusion == OriginalDiffusion(
        10, 0.0001, 0.02, "squaredcos_cap_v2", "epsilon", clip_sample=True, variance_type="fixed_small"
    )


def test_config_is_plain_and_resolved(genuine: Path) -> None:
    config = read_original_checkpoint(genuine, weights="ema").config
    assert type(config) is dict
    assert type(config["policy"]["model"]) is dict
    assert config["obs_dim"] == config["policy"]["obs_dim"] == 20
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
        # As the original's train.py does before anything else.
        del payload["cfg"]["circle"], payload["cfg"]["logging"]
        OmegaConf.register_new_resolver("eval", eval)
        OmegaConf.resolve(payload["cfg"])
        OmegaConf.clear_resolver("eval")

    path = changed(tmp_path, resolve, "lift")
    read = read_original_checkpoint(path, weights="ema")
    assert read.network_config == sizes("lift")
    assert read.config["policy"]["model"]["output_dim"] == 10
    assert read.config["task"]["env_runner"]["max_steps"] == 400
    assert (
        read.task == read_original_checkpoint(save(tmp_path / "l.ckpt", original_payload("lift")), weights="ema").task
    )


def test_one_channel_normalizer_broadcasts(tmp_path: Path) -> None:
    def identity(payload: Payload) -> None:
        policy = payload["state_dicts"]["ema_model"]
        policy["normalizer.params_dict.action.scale"] = torch.ones(1)
        policy["normalizer.params_dict.action.offset"] = torch.zeros(1)

    read = read_original_checkpoint(changed(tmp_path, identity), weights="ema")
    assert read.normalizers["action"].scale.tolist() == [1.0, 1.0]


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefact, match=r"none\.ckpt"):
        read_original_checkpoint(tmp_path / "none.ckpt", weights="ema")


def test_weights_must_be_chosen(genuine: Path) -> None:
    with pytest.raises(TypeError):
        read_original_checkpoint(genuine)  # type: ignore[call-arg]
    with pytest.raises(InvalidInput, match="weights: expected one of ema, raw, got best"):
        read_original_checkpoint(genuine, weights="best")  # type: ignore[arg-type]


def test_weights_left_open_are_those_that_the_original_evaluates(genuine: Path, tmp_path: Path) -> None:
    assert read_original_checkpoint(genuine, weights=None).weights == "ema"

    def without_average(payload: Payload) -> None:
        del payload["state_dicts"]["ema_model"]
        payload["cfg"].training.use_ema = False

    assert read_original_checkpoint(changed(tmp_path, without_average), weights=None).weights == "raw"
    lost = changed(tmp_path, lambda payload: payload["state_dicts"].pop("ema_model"))
    with pytest.raises(MissingArtefact, match=r"expected state_dicts\.ema_model, got .*; read it with weights=raw"):
        read_original_checkpoint(lost, weights=None)


def test_missing_average_points_to_the_raw_weights(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda payload: payload["state_dicts"].pop("ema_model"))
    with pytest.raises(MissingArtefact, match="weights=raw"):
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
        read_original_checkpoint(changed(tmp_path, change), weights="ema")


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
        ("normalizer.params_dict.obs.scale", torch.full((20,), float("nan")), InvalidInput),
    ],
)
def test_wrong_weight_is_refused(tmp_path: Path, name: str, value: Tensor | None, error: type[BacError]) -> None:
    def replace(payload: Payload) -> None:
        policy = payload["state_dicts"]["ema_model"]
        policy.pop(name, None)
        if value is not None:
            policy[name] = value

    path = changed(tmp_path, replace)
    with pytest.raises(error):
        read_original_checkpoint(path, weights="ema")
    read_original_checkpoint(path, weights="raw")


def test_normalizer_of_another_width_is_refused(tmp_path: Path) -> None:
    def widen(payload: Payload) -> None:
        policy = payload["state_dicts"]["ema_model"]
        policy["normalizer.params_dict.obs.scale"] = torch.ones(21)
        policy["normalizer.params_dict.obs.offset"] = torch.ones(21)

    with pytest.raises(Mismatch, match="20 channels"):
        read_original_checkpoint(changed(tmp_path, widen), weights="ema")


@pytest.mark.parametrize(
    ("where", "value", "error"),
    [
        ("policy._target_", "diffusion_policy.policy.diffusion_unet_lowdim_policy.DiffusionUnetLowdimPolicy", Mismatch),
        ("policy._target_", "diffusion_policy.policy.unheard_of.Policy", Mismatch),
        ("policy.model.n_cond_layers", 2, Mismatch),
        ("policy.predict_epsilon", False, Mismatch),
        ("policy.noise_scheduler.thresholding", True, Mismatch),
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
    path = changed(tmp_path, lambda payload: OmegaConf.update(payload["cfg"], where, value))
    with pytest.raises(error):
        read_original_checkpoint(path, weights="ema")


def test_config_may_leave_the_variance_out(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda payload: payload["cfg"].policy.noise_scheduler.pop("variance_type"))
    assert read_original_checkpoint(path, weights="ema").diffusion.variance_type is None
