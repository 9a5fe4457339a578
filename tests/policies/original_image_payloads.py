"""Hybrid image checkpoints in the structure in which diffusion_policy saves them, with tiny random denoisers."""

from __future__ import annotations

from collections import OrderedDict

import dill
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.vision import ObservationEncoder, VisionConfig
from tests.policies.networks import CAMERA, IMAGE_KEYS, image_encoder
from tests.policies.original_payloads import Payload

_COMMON = """
shape_meta: ${task.shape_meta}
horizon: 6
n_obs_steps: 2
n_action_steps: 4
n_latency_steps: 0
past_action_visible: false
policy:
  _target_: diffusion_policy.policy.diffusion_transformer_hybrid_image_policy.DiffusionTransformerHybridImagePolicy
  shape_meta: ${shape_meta}
  noise_scheduler:
    _target_: diffusers.schedulers.scheduling_ddpm.DDPMScheduler
    num_train_timesteps: 10
    beta_start: 0.0001
    beta_end: 0.02
    beta_schedule: squaredcos_cap_v2
    variance_type: fixed_small
    clip_sample: true
    prediction_type: epsilon
  horizon: ${horizon}
  n_action_steps: "${eval:'${n_action_steps}+${n_latency_steps}'}"
  n_obs_steps: ${n_obs_steps}
  num_inference_steps: 10
  crop_shape: CROP
  obs_encoder_group_norm: true
  eval_fixed_crop: true
  n_layer: 2
  n_cond_layers: 0
  n_head: 2
  n_emb: 16
  p_drop_emb: 0.0
  p_drop_attn: 0.3
  causal_attn: true
  time_as_cond: true
  obs_as_cond: true
training: {seed: 42, use_ema: true}
"""

_SMALL = """
task:
  name: small_image
  shape_meta:
    obs:
      hand: {shape: [2]}
      camera: {shape: [3, 40, 48], type: rgb}
      gripper: {shape: [1], type: low_dim}
    action: {shape: [2]}
"""

_PUSH_T = """
task:
  name: pusht_image
  image_shape: &image_shape [3, 96, 96]
  shape_meta:
    obs:
      image: {shape: *image_shape, type: rgb}
      agent_pos: {shape: [2], type: low_dim}
    action: {shape: [2]}
  env_runner: {_target_: diffusion_policy.env_runner.pusht_image_runner.PushTImageRunner, max_steps: 300}
  dataset: {_target_: diffusion_policy.dataset.pusht_image_dataset.PushTImageDataset}
"""

_CAN = """
task:
  name: can_image
  shape_meta: &shape_meta
    obs:
      agentview_image: {shape: [3, 84, 84], type: rgb}
      robot0_eye_in_hand_image: {shape: [3, 84, 84], type: rgb}
      robot0_eef_pos: {shape: [3]}
      robot0_eef_quat: {shape: [4]}
      robot0_gripper_qpos: {shape: [2]}
    action: {shape: [10]}
  task_name: can
  dataset_type: ph
  abs_action: true
  env_runner:
    _target_: diffusion_policy.env_runner.robomimic_image_runner.RobomimicImageRunner
    shape_meta: *shape_meta
    abs_action: true
  dataset:
    _target_: diffusion_policy.dataset.robomimic_replay_image_dataset.RobomimicReplayImageDataset
    shape_meta: *shape_meta
    abs_action: true
    rotation_rep: rotation_6d
"""

_CAN_KEYS = {
    "agentview_image": 64,
    "robot0_eye_in_hand_image": 64,
    "robot0_eef_pos": 3,
    "robot0_eef_quat": 4,
    "robot0_gripper_qpos": 2,
}

_TASKS = {
    "small": (_SMALL, IMAGE_KEYS, CAMERA, 2),
    "push_t": (_PUSH_T, {"image": 64, "agent_pos": 2}, VisionConfig({"image": (96, 96)}, (84, 84)), 2),
    "can": (_CAN, _CAN_KEYS, VisionConfig(dict.fromkeys(list(_CAN_KEYS)[:2], (84, 84)), (76, 76)), 10),
}
"""Name -> its part of the configuration, what it observes, cameras and crop, Da."""

UNITS = {"hand": ([2.0, 4.0], [-1.0, 0.5]), "gripper": ([0.5], [0.0]), "agent_pos": ([1 / 256] * 2, [-1.0] * 2)}
"""Of the low-dim keys that are not in [-1, 1] already: scale and offset."""


def image_sizes(task: str = "small") -> DiffusionTransformerConfig:
    _, observation, _, action_dim = _TASKS[task]
    return DiffusionTransformerConfig(
        action_dim,
        sum(observation.values()),
        horizon=6,
        observation_steps=2,
        layers=2,
        heads=2,
        width=16,
        attention_dropout=0.3,
    )


def original_image_payload(task: str = "small", *, raw: bool = True) -> Payload:
    text, _, vision, _ = _TASKS[task]
    config = OmegaConf.create(_COMMON.replace("CROP", str(list(vision.crop))) + text)
    assert isinstance(config, DictConfig)
    states = {"model": _policy_state(0, task)} if raw else {}
    return {
        "cfg": config,
        "state_dicts": {**states, "ema_model": _policy_state(1, task)},
        "pickles": {"global_step": dill.dumps(1200)},
    }


def _policy_state(seed: int, task: str) -> OrderedDict[str, Tensor]:
    _, observation, vision, action_dim = _TASKS[task]
    torch.manual_seed(seed)
    encoder = image_encoder(seed) if task == "small" else ObservationEncoder(observation, vision)
    state = OrderedDict((f"obs_encoder.{name}", value) for name, value in encoder.state_dict().items())
    denoiser = DiffusionTransformer(image_sizes(task)).requires_grad_(False)
    # At the initial 0.02 every branch is nearly dead, and hardly any feature would change from step to step.
    for parameter in denoiser.parameters():
        parameter.mul_(3)
    state |= {f"model.{name}": value for name, value in denoiser.state_dict().items()}
    state["_dummy_variable"] = torch.nn.Parameter()
    state["mask_generator._dummy_variable"] = torch.nn.Parameter()
    units = {key: ([2.0], [-1.0]) if key in vision.images else _units(key, observation[key]) for key in observation}
    units["action"] = ([1.0, 3.0], [0.0, 0.0]) if task == "small" else _units("action", action_dim)
    for key, (scale, offset) in units.items():
        prefix = f"normalizer.params_dict.{key}"
        state |= {f"{prefix}.scale": torch.tensor(scale), f"{prefix}.offset": torch.tensor(offset)}
        state |= {f"{prefix}.input_stats.{each}": torch.tensor(scale) for each in ("min", "max", "mean", "std")}
    return state


def _units(key: str, size: int) -> tuple[list[float], list[float]]:
    return UNITS.get(key, ([1.0] * size, [0.0] * size))
