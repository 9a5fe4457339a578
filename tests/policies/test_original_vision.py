"""Original hybrid image payloads: written as the original writes them, read, converted, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bac.errors import CorruptArtefact, Mismatch
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import import_original, load_policy
from policies.original_checkpoint import read_original_checkpoint
from policies.original_task import OriginalTask
from policies.vision import VisionConfig
from tests.policies.networks import CAMERA, IMAGE_KEYS, image_encoder, image_observation
from tests.policies.original_image_payloads import image_sizes, original_image_payload
from tests.policies.original_payloads import Payload, original_payload, save

SMALL = OriginalTask("small_image", IMAGE_KEYS, CAMERA.images)

SIZES = image_sizes()


@pytest.fixture(scope="module")
def payload() -> Payload:
    return original_image_payload()


@pytest.fixture(scope="module")
def genuine(payload: Payload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("genuine") / "latest.ckpt", payload)


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
    converted = import_original(genuine, weights="raw", task=SMALL)
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
        task=OriginalTask("small_image", {"palm": 2, "image": 64, "finger": 1}, {"image": (40, 48)}),
    )
    assert renamed.spec.vision == VisionConfig({"image": (40, 48)}, (33, 36))
    names = dict(zip(IMAGE_KEYS, ("palm", "image", "finger"), strict=True))
    other = DiffusionPolicy(renamed).observe({names[key]: values for key, values in seen.items()})
    assert torch.equal(other, token)
    reversed_keys = dict(reversed(IMAGE_KEYS.items()))
    again = import_original(genuine, weights="raw", task=OriginalTask("small_image", reversed_keys, CAMERA.images))
    assert list(again.spec.observation) == list(IMAGE_KEYS)


@pytest.mark.parametrize(
    ("observation", "images", "told"),
    [
        ({"hand": 2, "gripper": 1}, {}, r"expected a low-dim policy, as the task is, got an image policy"),
        ({"hand": 3, "camera": 64}, CAMERA.images, r"observation of the original checkpoint: expected as the task"),
        (IMAGE_KEYS, {"camera": (84, 84)}, r"\(84, 84\).* got .*\(40, 48\)"),
    ],
)
def test_task_that_observes_something_else_refuses(
    genuine: Path, observation: dict[str, int], images: dict[str, tuple[int, int]], told: str
) -> None:
    with pytest.raises(Mismatch, match=told):
        import_original(genuine, weights="ema", task=OriginalTask("small_image", observation, images))


def test_low_dim_policy_for_an_image_task_refuses(tmp_path: Path) -> None:
    payload = original_payload()
    del payload["cfg"]["task"]["env_runner"]
    path = save(tmp_path / "latest.ckpt", payload)
    with pytest.raises(Mismatch, match=r"expected an image policy, as the task is, got a low-dim policy"):
        import_original(path, weights="ema", task=OriginalTask("push_t_image", {"image": 20}, {"image": (96, 96)}))


@pytest.mark.parametrize(
    ("task", "name", "observation", "images"),
    [
        ("push_t", "push_t_image", {"image": 64, "agent_position": 2}, {"image": (96, 96)}),
        (
            "can",
            "can_image",
            {
                "agentview_image": 64,
                "robot0_eye_in_hand_image": 64,
                "robot0_eef_pos": 3,
                "robot0_eef_quat": 4,
                "robot0_gripper_qpos": 2,
            },
            {"agentview_image": (84, 84), "robot0_eye_in_hand_image": (84, 84)},
        ),
    ],
)
def test_checkpoint_becomes_a_policy_of_its_task(
    tmp_path: Path, task: str, name: str, observation: dict[str, int], images: dict[str, tuple[int, int]]
) -> None:
    path = save(tmp_path / "latest.ckpt", original_image_payload(task, raw=False))
    policy = load_policy(path)
    assert (policy.spec.task, list(policy.spec.observation.items())) == (name, list(observation.items()))
    assert policy.spec.vision is not None
    assert policy.spec.vision.images == images
    # An original task given along must be the one the file states.
    assert import_original(path, weights=None, task=OriginalTask(name, observation, images)).spec == policy.spec
    larger = dict.fromkeys(images, (120, 120))
    with pytest.raises(Mismatch, match=rf"expected task {name} with .* images .*120.*, got {name} with .*; correct"):
        import_original(path, weights=None, task=OriginalTask(name, observation, larger))


def test_other_observations_of_push_t_refuse(tmp_path: Path) -> None:
    payload = original_image_payload(raw=False)
    target = "diffusion_policy.env_runner.pusht_image_runner.PushTImageRunner"
    payload["cfg"].task.env_runner = {"_target_": target}
    with pytest.raises(Mismatch, match=r"expected Push-T's \['agent_pos', 'image'\] in cfg.policy.shape_meta.obs, got"):
        read_original_checkpoint(save(tmp_path / "latest.ckpt", payload), weights="ema")


def test_actions_that_are_not_what_the_task_states_refuse(tmp_path: Path) -> None:
    payload = original_image_payload("can", raw=False)
    payload["cfg"].task.abs_action = False
    with pytest.raises(Mismatch, match=r"7 channels of action, as cfg\.task\.abs_action=False means, got 10"):
        read_original_checkpoint(save(tmp_path / "latest.ckpt", payload), weights="ema")


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
        (_policy(obs_encoder_group_norm=False), Mismatch, "expected cfg.policy.obs_encoder_group_norm=True, got False"),
        (_policy(eval_fixed_crop=False), Mismatch, "expected cfg.policy.eval_fixed_crop=True, got False"),
        (_policy(n_cond_layers=2), Mismatch, "expected cfg.policy.n_cond_layers=0, got 2"),
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
    payload = original_image_payload(raw=False)
    change(payload)
    with pytest.raises(refusal, match=told) as caught:
        read_original_checkpoint(save(tmp_path / "changed.ckpt", payload), weights="ema")
    assert "\n" not in str(caught.value)
