"""Which of our tasks an original checkpoint is for, and what it must be to play it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from bac.errors import BacError, CorruptArtefact, InvalidInput, Mismatch
from policies.loading import import_original, load_policy
from policies.original_checkpoint import read_original_checkpoint
from policies.original_config import OriginalConfig
from policies.original_task import OriginalTask, original_task
from tests.policies.original_payloads import changed, network, original_payload, save

HAND, OTHER_HAND = (
    {f"robot{arm}_eef_pos": 3, f"robot{arm}_eef_quat": 4, f"robot{arm}_gripper_qpos": 2} for arm in range(2)
)


@pytest.mark.parametrize(
    ("payload", "name", "observation", "action_dim"),
    [
        ("push_t", "push_t", {"keypoints": 18, "agent_position": 2}, 2),
        ("lift", "lift", {"object": 10, **HAND}, 10),
        ("lift with deltas", "lift", {"object": 10, **HAND}, 7),
        ("can", "can", {"object": 14, **HAND}, 10),
        ("square", "square", {"object": 14, **HAND}, 10),
        ("transport", "transport", {"object": 41, **HAND, **OTHER_HAND}, 20),
        ("transport with deltas", "transport", {"object": 41, **HAND, **OTHER_HAND}, 14),
    ],
)
def test_checkpoint_becomes_a_policy_of_its_task(
    tmp_path: Path, payload: str, name: str, observation: dict[str, int], action_dim: int
) -> None:
    policy = load_policy(save(tmp_path / "latest.ckpt", original_payload(payload)))
    assert (policy.spec.task, list(policy.spec.observation.items())) == (name, list(observation.items()))
    assert policy.checkpoint.training["weights"] == "ema"
    assert policy.artefacts == tmp_path / "latest.ckpt.calibration" / "ema"
    seen = {key: np.full((3, 2, size), 0.1, dtype=np.float32) for key, size in observation.items()}
    chunk = policy.predict(seen)
    assert chunk.shape == (3, 4, action_dim)
    # Each hand's positions come back in metres, from [-1, 1].
    for hand in range(0, action_dim if action_dim % 10 == 0 else 0, 10):
        assert ((chunk[..., hand + 2] >= 6.5 / 8) & (chunk[..., hand + 2] <= 8.5 / 8)).all()


def test_two_arms_are_counted() -> None:
    keys = ["object", *(f"robot{arm}_{part}" for arm in range(2) for part in ("eef_pos", "eef_quat", "gripper_qpos"))]
    runner = {"_target_": "diffusion_policy.env_runner.robomimic_lowdim_runner.RobomimicLowdimRunner"}
    task = {"task_name": "transport", "obs_keys": keys, "abs_action": True, "env_runner": runner}
    config = OriginalConfig(Path("x.ckpt"), {"task": task})
    read = original_task(config, observation_dim=59, action_dim=20)
    assert read is not None
    assert list(read.observation.items()) == list(zip(keys, [41, 3, 4, 2, 3, 4, 2], strict=True))
    with pytest.raises(Mismatch, match=r"expected 20 channels of action, as cfg\.task\.abs_action=True means, got 14"):
        original_task(config, observation_dim=59, action_dim=14)


def test_actions_come_out_in_the_units_of_the_checkpoint(tmp_path: Path) -> None:
    policy = load_policy(save(tmp_path / "latest.ckpt", original_payload("lift")), weights="raw")
    seen = {key: np.full((1, 2, size), 0.1, dtype=np.float32) for key, size in policy.spec.observation.items()}
    keys = [(0, 0)]
    chunk = policy.denoiser(policy.observe(seen), policy.draw_noise(1, keys))[0, 1:5].numpy()
    np.testing.assert_array_equal(policy.observe(seen).numpy(), np.full((1, 2, 19), np.float32(0.1) * np.float32(0.8)))
    scale, offset = np.array([5, 4, 8] + [1] * 7), np.array([0.1, -0.2, -7.5] + [0] * 7)
    # float32 of values up to 8.
    np.testing.assert_allclose(policy.predict(seen, keys)[0], (chunk - offset) / scale, atol=1e-6)
    raw, loaded = network(1, "lift").state_dict(), policy.checkpoint.network.state_dict()
    assert all((loaded[name] == value).all() for name, value in raw.items())


def test_the_order_of_the_keys_is_the_trainings(tmp_path: Path) -> None:
    keys = ["robot0_eef_pos", "object", "robot0_gripper_qpos", "robot0_eef_quat"]

    def reorder(payload: dict) -> None:
        for user in ("", "dataset.", "env_runner."):
            OmegaConf.update(payload["cfg"], f"task.{user}obs_keys", keys)

    path = changed(tmp_path, reorder, "lift")
    assert list(load_policy(path).spec.observation.items()) == [(key, (HAND | {"object": 10})[key]) for key in keys]
    ours = OriginalTask("lift", {"object": 10, **HAND})
    assert list(import_original(path, weights="ema", task=ours).spec.observation) == keys


@pytest.mark.parametrize(
    ("where", "value", "error", "told"),
    [
        ("task.abs_action", False, Mismatch, r"7 channels of action, as cfg\.task\.abs_action=False means, got 10"),
        ("task.dataset.rotation_rep", "axis_angle", Mismatch, "rotation_rep=rotation_6d, got axis_angle"),
        ("task.env_runner.obs_keys", ["object"], Mismatch, r"cfg\.task\.env_runner\.obs_keys=\['object', 'robot0"),
        ("task.obs_keys", ["object", "robot0_joint_pos"], Mismatch, r"obs_keys=\['object', 'robot0_joint_pos'\]"),
        ("task.obs_keys", None, Mismatch, r"observation keys in cfg\.task\.obs_keys, got None"),
        ("task.task_name", None, CorruptArtefact, r"cfg\.task\.task_name of type str, got None"),
        ("n_latency_steps", 2, Mismatch, r"cfg\.n_latency_steps=0, got 2"),
        ("past_action_visible", True, Mismatch, r"cfg\.past_action_visible=False, got True"),
    ],
)
def test_task_that_we_do_not_play_as_the_original_refuses(
    tmp_path: Path, where: str, value: object, error: type[BacError], told: str
) -> None:
    path = changed(tmp_path, lambda payload: OmegaConf.update(payload["cfg"], where, value), "lift")
    with pytest.raises(error, match=told):
        read_original_checkpoint(path, weights="ema")


def test_observation_of_another_size_refuses(tmp_path: Path) -> None:
    payload = original_payload("lift")
    payload["cfg"].task.env_runner._target_ = "diffusion_policy.env_runner.pusht_keypoints_runner.PushTKeypointsRunner"
    with pytest.raises(Mismatch, match=r"expected 20 channels of push_t's .*, got 19"):
        load_policy(save(tmp_path / "latest.ckpt", payload))


def test_unknown_task_must_be_given(tmp_path: Path) -> None:
    def kitchen(payload: dict) -> None:
        payload["cfg"].task.env_runner._target_ = "diffusion_policy.env_runner.kitchen_lowdim_runner.KitchenRunner"

    path = changed(tmp_path, kitchen, "lift")
    assert read_original_checkpoint(path, weights="ema").task is None
    with pytest.raises(InvalidInput, match=r"^task of .*changed\.ckpt: expected Push-T or .*import_checkpoint\.py"):
        load_policy(path)
    spec = import_original(path, weights="ema", task=OriginalTask("kitchen", {"joints": 19})).spec
    assert (spec.task, dict(spec.observation)) == ("kitchen", {"joints": 19})
    with pytest.raises(InvalidInput, match="observation keys: expected 19 channels"):
        import_original(path, weights="ema", task=OriginalTask("kitchen", {"joints": 30}))


def test_another_task_than_the_files_refuses(tmp_path: Path) -> None:
    path = save(tmp_path / "latest.ckpt", original_payload("can"))
    with pytest.raises(Mismatch, match=r"latest\.ckpt: expected task square with .*, got can with .*; give task=can"):
        import_original(path, weights="ema", task=OriginalTask("square", {"object": 14, **HAND}))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("beta_schedule", "linear"),
        ("prediction_type", "sample"),
        ("clip_sample", False),
        ("variance_type", "fixed_large"),
    ],
)
def test_other_diffusion_processes_refuse(tmp_path: Path, where: str, value: object) -> None:
    path = changed(tmp_path, lambda payload: OmegaConf.update(payload["cfg"].policy.noise_scheduler, where, value))
    with pytest.raises(InvalidInput, match=rf"^diffusion of .*changed\.ckpt: expected {{'{where}'.*only this process"):
        load_policy(path)
