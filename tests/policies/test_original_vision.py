"""Original hybrid image payloads: written as the original writes them, read, converted, refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dill
import pytest
import torch
from omegaconf import OmegaConf

from bac.errors import CorruptArtefact, Mismatch
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.loading import import_original
from policies.original_checkpoint import read_original_checkpoint
from policies.vision import VisionConfig
from tests.policies.networks import CAMERA, IMAGE_KEYS, image_encoder, image_observation

SIZES = DiffusionTransformerConfig(
    action_dim=2, observation_dim=67, horizon=6, observation_steps=2, layers=1, heads=2, width=16, attention_dropout=0.3
)

CONFIG = """
shape_meta: ${task.shape_meta}
task:
  name: small_image
  shape_meta:
    obs:
      hand: {shape: [2]}
      camera: {shape: [3, 40, 48], type: rgb}
      gripper: {shape: [1], type: low_dim}
    action: {shape: [2]}
horizon: 6
n_obs_steps: 2
n_action_steps: 4
policy:
  _target_: diffusion_policy.policy.diffusion_transformer_hybrid_image_policy.DiffusionTransformerHybridImagePolicy
  shape_meta: ${shape_meta}
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
  n_action_steps: "${eval:'${n_action_steps}+0'}"
  n_obs_steps: ${n_obs_steps}
  num_inference_steps: 100
  crop_shape: [33, 36]
  obs_encoder_group_norm: true
  eval_fixed_crop: true
  n_layer: 1
  n_cond_layers: 0
  n_head: 2
  n_emb: 16
  p_drop_emb: 0.0
  p_drop_attn: 0.3
  causal_attn: true
  time_as_cond: true
  obs_as_cond: true
"""

UNITS = {"hand": ([2.0, 4.0], [-1.0, 0.5]), "camera": ([2.0], [-1.0]), "gripper": ([0.5], [0.0])}
Payload = dict[str, Any]


def _policy_state(seed: int) -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = OrderedDict((f"obs_encoder.{name}", value) for name, value in image_encoder(seed).state_dict().items())
    state |= {f"model.{name}": value for name, value in DiffusionTransformer(SIZES).state_dict().items()}
    state["_dummy_variable"] = torch.nn.Parameter()
    state["mask_generator._dummy_variable"] = torch.nn.Parameter()
    for key, (scale, offset) in {**UNITS, "action": ([1.0, 3.0], [0.0, 0.0])}.items():
        prefix = f"normalizer.params_dict.{key}"
        state |= {f"{prefix}.scale": torch.tensor(scale), f"{prefix}.offset": torch.tensor(offset)}
        state |= {f"{prefix}.input_stats.{each}": torch.tensor(scale) for each in ("min", "max", "mean", "std")}
    return state


def _payload() -> Payload:
    return {
        "cfg": OmegaConf.create(CONFIG),
        "state_dicts": {"model": _policy_state(0), "ema_model": _policy_state(1)},
        "pickles": {"global_step": dill.dumps(1200)},
    }


def _save(path: Path, payload: object) -> Path:
    torch.save(payload, path, pickle_module=dill)
    return path


@pytest.fixture(scope="module")
def payload() -> Payload:
    return _payload()


@pytest.fixture(scope="module")
def genuine(payload: Payload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("genuine") / "latest.ckpt", payload)


@pytest.mark.parametrize(("weights", "seed"), [("raw", 0), ("ema", 1)])
def test_weights_sizes_and_units_load_exactly(genuine: Path, payload: Payload, weights: Any, seed: int) -> None:
    read = read_original_checkpoint(genuine, weights=weights)
    assert read.network_config == SIZES
    assert read.vision is not None
    assert list(read.vision.observation.items()) == list(IMAGE_KEYS.items())
    assert read.vision.config == CAMERA
    expected = image_encoder(seed).state_dict()
    assert read.vision.encoder.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in read.vision.encoder.items())
    model = payload["state_dicts"]["model" if weights == "raw" else "ema_model"]
    assert all(torch.equal(value, model[f"model.{name}"]) for name, value in read.network.items())
    # Of the low-dim keys side by side; images have units of their own.
    assert read.normalizers["obs"].scale.tolist() == [2.0, 4.0, 0.5]
    assert read.normalizers["obs"].offset.tolist() == [-1.0, 0.5, 0.0]
    assert read.normalizers["action"].scale.tolist() == [1.0, 3.0]


def test_converted_policy_acts_on_images_under_the_task_s_keys(genuine: Path) -> None:
    converted = import_original(genuine, weights="raw", task="small_image", observation=IMAGE_KEYS, vision=CAMERA)
    assert (converted.spec.observation, converted.spec.vision) == (IMAGE_KEYS, CAMERA)
    seen = image_observation(2)
    token = DiffusionPolicy(converted).observe(seen)
    low_dim = torch.from_numpy(seen["hand"])
    torch.testing.assert_close(token[..., :2], low_dim * torch.tensor([2.0, 4.0]) + torch.tensor([-1.0, 0.5]))
    features = image_encoder(0)(torch.zeros(2, 2, 3), {"camera": torch.from_numpy(seen["camera"])})[..., 2:66]
    assert torch.equal(token[..., 2:66], features)

    # Other names are matched in order; equal ones keep the payload's order, whatever the task's.
    renamed = import_original(
        genuine,
        weights="raw",
        task="small_image",
        observation={"palm": 2, "image": 64, "finger": 1},
        vision=VisionConfig({"image": (40, 48)}, (35, 40)),
    )
    assert renamed.spec.vision == VisionConfig({"image": (40, 48)}, (33, 36))
    names = dict(zip(IMAGE_KEYS, ("palm", "image", "finger"), strict=True))
    other = DiffusionPolicy(renamed).observe({names[key]: values for key, values in seen.items()})
    assert torch.equal(other, token)
    reversed_keys = dict(reversed(IMAGE_KEYS.items()))
    again = import_original(genuine, weights="raw", task="small_image", observation=reversed_keys, vision=CAMERA)
    assert list(again.spec.observation) == list(IMAGE_KEYS)


@pytest.mark.parametrize(
    ("observation", "vision", "told"),
    [
        ({"hand": 2, "gripper": 1}, None, r"expected a low-dim policy, as the task is, got an image policy"),
        ({"hand": 3, "camera": 64}, CAMERA, r"observation of the original checkpoint: expected as the task"),
        (IMAGE_KEYS, VisionConfig({"camera": (84, 84)}, (76, 76)), r"\(84, 84\).* got .*\(40, 48\)"),
    ],
)
def test_task_that_observes_something_else_refuses(
    genuine: Path, observation: dict[str, int], vision: VisionConfig | None, told: str
) -> None:
    with pytest.raises(Mismatch, match=told):
        import_original(genuine, weights="ema", task="small_image", observation=observation, vision=vision)


NETS = "obs_encoder.obs_nets.camera."


def _policy(**values: Any) -> Callable[[Payload], None]:
    return lambda payload: payload["cfg"].policy.update(values)


def _state(**tensors: torch.Tensor | None) -> Callable[[Payload], None]:
    def change(payload: Payload) -> None:
        state = payload["state_dicts"]["ema_model"]
        for name, tensor in tensors.items():
            if tensor is None:
                del state[name]
            else:
                state[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "refusal", "told"),
    [
        (_policy(obs_encoder_group_norm=False), Mismatch, "expected policy.obs_encoder_group_norm=True, got False"),
        (_policy(eval_fixed_crop=False), Mismatch, "expected policy.eval_fixed_crop=True, got False"),
        (_policy(n_cond_layers=2), Mismatch, "expected policy.n_cond_layers=0, got 2"),
        (_policy(n_emb=32), Mismatch, "expected cfg.policy.n_emb=16, as the weights have it, got 32"),
        (_policy(crop_shape=None), CorruptArtefact, "expected cfg.policy.shape_meta and crop_shape, got TypeError"),
        (_policy(crop_shape=[40, 40]), Mismatch, "expected images that are larger than crop_shape"),
        (
            _policy(shape_meta={"obs": {"camera": {"shape": [1, 40, 48], "type": "depth"}}}),
            Mismatch,
            r"of type rgb \[3, H, W\] or low_dim \[n\], got depth \[1, 40, 48\]",
        ),
        (_state(**{NETS + "nets.3.bias": None}), Mismatch, "the weight names of our encoder, got missing"),
        (_state(**{NETS + "backbone.nets.1.running_mean": torch.zeros(64)}), Mismatch, "extra .*running_mean"),
        (_state(**{NETS + "nets.3.bias": torch.zeros(32)}), Mismatch, r"nets.3.bias \[64\], got \[32\]"),
        (_state(**{NETS + "nets.3.bias": torch.full((64,), torch.inf)}), CorruptArtefact, "finite encoder weights"),
        (_state(**{NETS + "nets.1.temperature": torch.full((1,), 2.0)}), CorruptArtefact, "equal weights under both"),
        (_state(**{NETS + "pool.temperature": torch.full((1,), 2.0)}), Mismatch, "temperature as robomimic makes it"),
        (
            _state(**{"normalizer.params_dict.camera.scale": torch.ones(1)}),
            Mismatch,
            r"camera.scale = 2.0, got \[1.0\]",
        ),
        (_state(**{"normalizer.params_dict.hand.scale": None}), Mismatch, "missing .*hand.scale"),
    ],
    ids=range(15),
)
def test_another_variant_or_damage_refuses(
    tmp_path: Path, change: Callable[[Payload], None], refusal: type[Exception], told: str
) -> None:
    payload = {"cfg": OmegaConf.create(CONFIG), "state_dicts": {"ema_model": _policy_state(1)}}
    change(payload)
    with pytest.raises(refusal, match=told) as caught:
        read_original_checkpoint(_save(tmp_path / "changed.ckpt", payload), weights="ema")
    assert "\n" not in str(caught.value)
