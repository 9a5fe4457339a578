"""Checkpoints in the structure in which diffusion_policy's workspaces save them, with tiny random networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import dill
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig

Payload = dict[str, Any]

_COMMON = """
name: train_diffusion_transformer_lowdim
obs_dim: ${task.obs_dim}
action_dim: ${task.action_dim}
task_name: ${task.name}
horizon: 8
n_obs_steps: 2
n_action_steps: 4
n_latency_steps: 0
past_action_visible: false
keypoint_visible_rate: 1.0
obs_as_cond: true
pred_action_steps_only: false
policy:
  _target_: diffusion_policy.policy.diffusion_transformer_lowdim_policy.DiffusionTransformerLowdimPolicy
  model:
    _target_: diffusion_policy.model.diffusion.transformer_for_diffusion.TransformerForDiffusion
    input_dim: "${eval:'${action_dim} if ${obs_as_cond} else ${obs_dim} + ${action_dim}'}"
    output_dim: ${policy.model.input_dim}
    horizon: ${horizon}
    n_obs_steps: ${n_obs_steps}
    cond_dim: "${eval:'${obs_dim} if ${obs_as_cond} else 0'}"
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
    num_train_timesteps: 10
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
  num_inference_steps: 10
  obs_as_cond: ${obs_as_cond}
  pred_action_steps_only: ${pred_action_steps_only}
ema: {_target_: diffusion_policy.model.diffusion.ema_model.EMAModel, power: 0.75, max_value: 0.9999}
optimizer: {betas: [0.9, 0.95], learning_rate: 1.0e-4}
training: {seed: 42, use_ema: true}
logging: {id: null, copy: "${logging.id}", name: "run of ${name}", tags: ["${name}", "${task.name}"]}
circle: {first: "${circle.second}", second: "${circle.first}"}
"""

_PUSH_T = """
task:
  name: pusht_lowdim
  obs_dim: 20
  action_dim: 2
  keypoint_dim: 2
  env_runner:
    _target_: diffusion_policy.env_runner.pusht_keypoints_runner.PushTKeypointsRunner
    max_steps: 300
    agent_keypoints: false
  dataset:
    _target_: diffusion_policy.dataset.pusht_dataset.PushTLowdimDataset
    zarr_path: data/pusht/pusht_cchi_v7_replay.zarr
"""

_ROBOMIMIC = """
task:
  name: TASK_lowdim
  obs_dim: OBSERVATION_DIM
  action_dim: ACTION_DIM
  keypoint_dim: 3
  obs_keys: &obs_keys [OBS_KEYS]
  task_name: TASK
  dataset_type: ph
  dataset_path: &dataset_path "data/robomimic/datasets/${task.task_name}/${task.dataset_type}/low_dim.hdf5"
  abs_action: &abs_action ABSOLUTE
  env_runner:
    _target_: diffusion_policy.env_runner.robomimic_lowdim_runner.RobomimicLowdimRunner
    dataset_path: *dataset_path
    obs_keys: *obs_keys
    test_start_seed: 100000
    max_steps: "${eval:'500 if \\"${task.dataset_type}\\" == \\"mh\\" else 400'}"
    abs_action: *abs_action
  dataset:
    _target_: diffusion_policy.dataset.robomimic_replay_lowdim_dataset.RobomimicReplayLowdimDataset
    dataset_path: *dataset_path
    obs_keys: *obs_keys
    abs_action: *abs_action
    use_legacy_normalizer: false
"""


def _robomimic(task: str, observation_dim: int, *, absolute: bool, arms: int = 1) -> str:
    hands = [f"robot{arm}_{part}" for arm in range(arms) for part in ("eef_pos", "eef_quat", "gripper_qpos")]
    values = {
        "TASK": task,
        "OBSERVATION_DIM": str(observation_dim),
        "OBS_KEYS": ", ".join(["object", *hands]),
        "ACTION_DIM": str(arms * (10 if absolute else 7)),
        "ABSOLUTE": "true" if absolute else "false",
    }
    text = _ROBOMIMIC
    for name, value in values.items():
        text = text.replace(name, value)
    return text


_TASKS = {
    "push_t": (_PUSH_T, 20, 2),
    "lift": (_robomimic("lift", 19, absolute=True), 19, 10),
    "lift with deltas": (_robomimic("lift", 19, absolute=False), 19, 7),
    "can": (_robomimic("can", 23, absolute=True), 23, 10),
    "square": (_robomimic("square", 23, absolute=True), 23, 10),
    "transport": (_robomimic("transport", 59, absolute=True, arms=2), 59, 20),
    "transport with deltas": (_robomimic("transport", 59, absolute=False, arms=2), 59, 14),
}
"""Name -> its part of the configuration, Do, Da."""


def sizes(task: str = "push_t") -> DiffusionTransformerConfig:
    _, observation_dim, action_dim = _TASKS[task]
    return DiffusionTransformerConfig(
        action_dim, observation_dim, horizon=8, observation_steps=2, layers=2, width=32, attention_dropout=0.3
    )


@cache
def network(seed: int, task: str = "push_t") -> DiffusionTransformer:
    torch.manual_seed(seed)
    drawn = DiffusionTransformer(sizes(task)).eval().requires_grad_(False)
    # At the initial 0.02 every branch is nearly dead, and hardly any feature would change from step to step.
    for parameter in drawn.parameters():
        parameter.mul_(3)
    return drawn


def original_payload(task: str = "push_t") -> Payload:
    config = OmegaConf.create(_COMMON + _TASKS[task][0])
    assert isinstance(config, DictConfig)
    return {
        "cfg": config,
        "state_dicts": {
            "model": _policy_state(1, task),
            "ema_model": _policy_state(2, task),
            "optimizer": _optimizer_state(),
        },
        "pickles": {"global_step": dill.dumps(1200), "_output_dir": dill.dumps("data/outputs")},
    }


def save(path: Path, payload: object) -> Path:
    torch.save(payload, path, pickle_module=dill)
    return path


def changed(folder: Path, change: Callable[[Payload], object], task: str = "push_t") -> Path:
    payload = original_payload(task)
    change(payload)
    return save(folder / "changed.ckpt", payload)


def _policy_state(seed: int, task: str) -> OrderedDict[str, Tensor]:
    """The state dict of the original's policy object around a network."""
    state = OrderedDict((f"model.{name}", value) for name, value in network(seed, task).state_dict().items())
    state["_dummy_variable"] = torch.nn.Parameter()
    state["mask_generator._dummy_variable"] = torch.nn.Parameter()
    for key, (scale, offset) in normalizers(task).items():
        state[f"normalizer.params_dict.{key}.scale"] = scale
        state[f"normalizer.params_dict.{key}.offset"] = offset
        for statistic in ("min", "max", "mean", "std"):
            state[f"normalizer.params_dict.{key}.input_stats.{statistic}"] = torch.ones(len(scale))
    # As nn.Module.state_dict leaves it; it is pickled as the dict's attribute.
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return state


def normalizers(task: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Key -> scale and offset as the data set of the task fits them."""
    _, observation_dim, action_dim = _TASKS[task]
    if task == "push_t":
        # 512 pixels to [-1, 1].
        return {key: (torch.full((size,), 1 / 256), -torch.ones(size)) for key, size in (("obs", 20), ("action", 2))}
    action = torch.ones(action_dim), torch.zeros(action_dim)
    # Of a pose, positions alone are brought to [-1, 1].
    for hand in range(0, action_dim if action_dim % 10 == 0 else 0, 10):
        action[0][hand : hand + 3], action[1][hand : hand + 3] = (
            torch.tensor([5.0, 4.0, 8.0]),
            torch.tensor([0.1, -0.2, -7.5]),
        )
    return {"obs": (torch.full((observation_dim,), 0.8), torch.zeros(observation_dim)), "action": action}


def _optimizer_state() -> dict[str, Any]:
    """What AdamW's state dict holds; building a real one costs seconds of imports."""
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    return {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "foreach": None, "params": [0]}]}
