"""A policy that sees images: predicted, stored, loaded, timed, refused."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bac
from bac.errors import BacError, CorruptArtefact, InvalidInput
from bac.methods import full_schedule
from policies.base import PolicySpec
from policies.checkpoint import load_checkpoint, save_checkpoint
from policies.diffusion_policy import DiffusionPolicy
from policies.evaluation import latency_and_flops
from tests.policies.networks import CAMERA, image_encoder, image_observation, small_checkpoint, small_image_checkpoint

KEYS = [(7, 0), (8, 3), (9, 1)]


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    return DiffusionPolicy(small_image_checkpoint())


def test_chunk_follows_from_the_image(policy: DiffusionPolicy) -> None:
    seen = image_observation(3)
    chunk = policy.predict(seen, KEYS)
    assert (chunk.shape, chunk.dtype) == ((3, 4, 2), np.float32)
    np.testing.assert_array_equal(policy.predict(seen, KEYS), chunk)
    other = policy.predict(seen | {"camera": image_observation(3, seed=1)["camera"]}, KEYS)
    assert (other != chunk).any(axis=(1, 2)).all()


def test_low_dim_part_is_normalised_and_the_image_encoded(policy: DiffusionPolicy) -> None:
    seen = image_observation(3)
    token = policy.observe(seen)
    np.testing.assert_allclose(token[..., :2], seen["hand"] * 2 - 1, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(token[..., 66:], seen["gripper"] * 0.5, rtol=1e-6)
    low_dim = torch.from_numpy(np.concatenate([seen["hand"], seen["gripper"]], axis=-1))
    features = image_encoder()(low_dim, {"camera": torch.from_numpy(seen["camera"])})[..., 2:66]
    assert torch.equal(token[..., 2:66], features)
    floats = seen | {"camera": seen["camera"].transpose(0, 1, 4, 2, 3).astype(np.float32) / 255}
    assert torch.equal(policy.observe(floats), token)


def test_a_view_of_an_image_is_what_its_copy_is(policy: DiffusionPolicy) -> None:
    seen = image_observation(2)
    for mirrored in (
        seen["camera"][..., ::-1],
        seen["camera"][:, :, ::-1],
        seen["camera"].swapaxes(2, 3).copy().swapaxes(2, 3),
    ):
        assert torch.equal(
            policy.observe(seen | {"camera": mirrored}), policy.observe(seen | {"camera": mirrored.copy()})
        )


def test_observation_without_batch_gives_a_chunk_without_batch(policy: DiffusionPolicy) -> None:
    batched = image_observation(1)
    # The image first: which key comes first must not matter.
    single = {key: batched[key][0] for key in ("camera", "gripper", "hand")}
    np.testing.assert_array_equal(policy.predict(single, KEYS[:1]), policy.predict(batched, KEYS[:1])[0])


def test_encoder_runs_once_per_chunk_and_takes_bounded_batches(
    policy: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = image_encoder()
    with patch.object(encoder, "forward", wraps=encoder.forward) as forward:
        policy.predict(image_observation(3), KEYS)
        assert forward.call_count == 1
        whole = policy.observe(image_observation(3))
        monkeypatch.setattr("policies.diffusion_policy._ENCODED_ROWS", 2)
        forward.reset_mock()
        parts = policy.observe(image_observation(3))
        assert [len(call.args[0]) for call in forward.call_args_list] == [2, 1]
    # Another batch size may sum a convolution in another order.
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_full_plan_equals_the_accelerated_policy(policy: DiffusionPolicy) -> None:
    schedule = full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)
    fast = bac.accelerate(policy, schedule)
    # Float32 sums in another order over ten steps.
    np.testing.assert_allclose(
        fast.predict(image_observation(3), KEYS), policy.predict(image_observation(3), KEYS), rtol=0, atol=1e-4
    )


def test_encoder_is_itemised_apart_from_denoising(policy: DiffusionPolicy) -> None:
    schedule = full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)
    found = latency_and_flops(policy, schedule, policy, image_observation(1), calls=2)
    assert set(found["latency_ms"]) == set(found["gflops"]) == {"cached", "uncached", "encoder"}
    assert 0 < found["latency_ms"]["encoder"]["p50"] <= found["latency_ms"]["encoder"]["p99"]
    assert set(found["control_rate_hz"]) == {"cached", "uncached"}
    # ResNet-18 takes 3.6 GFLOPs for 224 x 224; two images of 33 x 36 cost less than of 64 x 64, for sizes round up.
    assert 2 * 3.6 * 33 * 36 / 224**2 < found["gflops"]["encoder"] < 2 * 3.6 * 64 * 64 / 224**2


def _changed(**change: np.ndarray) -> dict[str, np.ndarray]:
    return image_observation(2) | change


FLOATS = np.zeros((2, 2, 3, 40, 48), np.float32)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({key: each for key, each in image_observation(2).items() if key != "camera"}, r"keys: expected \['camera'"),
        (_changed(camera=FLOATS.astype(np.uint8)), r"got uint8\[2, 2, 3, 40, 48\] from 0 to 0"),
        (_changed(camera=FLOATS.transpose(0, 1, 3, 4, 2)), r"got float32\[2, 2, 40, 48, 3\]"),
        (
            _changed(camera=np.zeros((2, 2, 48, 40, 3), np.uint8)),
            r"expected uint8\[B, 2, 40, 48, 3\] or float\[B, 2, 3",
        ),
        (_changed(camera=np.zeros((2, 1, 40, 48, 3), np.uint8)), r"got uint8\[2, 1, 40, 48, 3\]"),
        (_changed(camera=FLOATS + 255), r"in \[0, 1\] \(or without B\), got float32.* from 255.0 to 255.0"),
        (_changed(camera=FLOATS - 0.5), "from -0.5"),
        (_changed(camera=FLOATS * np.nan), "from nan"),
        (_changed(camera=FLOATS.astype(np.int64)), "got int64"),
        (_changed(camera=FLOATS[:1]), "one batch size for all keys"),
    ],
)
def test_bad_image_refuses_in_one_sentence(policy: DiffusionPolicy, bad: dict[str, np.ndarray], told: str) -> None:
    with pytest.raises(InvalidInput, match=told) as caught:
        policy.predict(bad, KEYS[:2])
    assert "\n" not in str(caught.value)


def test_images_must_be_keys_of_the_observation() -> None:
    spec = small_image_checkpoint().spec
    with pytest.raises(InvalidInput, match=r"task\.images: expected keys of task\.observation with 64 .*'camera': 63"):
        PolicySpec(
            spec.task, {"hand": 3, "camera": 63, "gripper": 1}, spec.action_steps, spec.network, spec.process, CAMERA
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "checkpoint.safetensors"
    save_checkpoint(small_image_checkpoint(), path, torch.float16)
    return path


def test_checkpoint_round_trip(saved: Path) -> None:
    checkpoint, loaded = small_image_checkpoint(), load_checkpoint(saved)
    assert loaded.spec == checkpoint.spec
    assert loaded.encoder is not None
    assert not loaded.encoder.training
    for name, value in checkpoint.encoder.state_dict().items():
        assert torch.equal(loaded.encoder.state_dict()[name], value.half().float()), name
    # Each weight once, though the state dict has most of them twice.
    assert saved.stat().st_size < 1.05 * 2 * sum(p.numel() for p in checkpoint.encoder.parameters())
    rounded = DiffusionPolicy(loaded).predict(image_observation(3), KEYS)
    # Weights of 11 bits.
    np.testing.assert_allclose(rounded, DiffusionPolicy(checkpoint).predict(image_observation(3), KEYS), atol=0.05)


def test_digest_is_of_the_encoder_too() -> None:
    checkpoint = small_image_checkpoint()
    assert replace(checkpoint, encoder=image_encoder(1)).digest != checkpoint.digest
    assert replace(checkpoint, encoder=None).digest != checkpoint.digest


WEIGHT = "encoder.obs_nets.camera.nets.3.bias"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({WEIGHT: torch.full((64,), torch.nan)}, "NaN or infinite weights in .*nets.3.bias"),
        ({WEIGHT: None}, "encoder weights missing or too many"),
        ({"encoder.obs_nets.other.nets.3.bias": torch.zeros(64)}, "encoder weights missing or too many"),
        ({WEIGHT: torch.zeros(63)}, "size mismatch"),
    ],
)
def test_damaged_encoder_refuses(
    saved: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], told: str
) -> None:
    from safetensors import safe_open

    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor for name, tensor in (load_file(saved) | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "damaged.safetensors", metadata)
    with pytest.raises(CorruptArtefact, match=told):
        load_checkpoint(tmp_path / "damaged.safetensors")


def test_encoder_in_a_low_dim_policy_refuses(tmp_path: Path) -> None:
    save_checkpoint(replace(small_checkpoint(), encoder=image_encoder()), tmp_path / "odd.safetensors")
    with pytest.raises(BacError, match="encoder weights of a low-dim policy"):
        load_checkpoint(tmp_path / "odd.safetensors")
