"""Which of our tasks an original ``.ckpt`` was trained for, from its configuration ``cfg.task``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from policies.original_config import OriginalConfig
from policies.original_vision import OriginalVision

_PUSH_T = {"keypoints": 18, "agent_position": 2}
"""What the original joins for Push-T, under our names: key -> channels."""

_PUSH_T_IMAGE = {"image": "image", "agent_pos": "agent_position"}
"""What the original's Push-T with images gives -> our name."""

_ROBOT_KEY = re.compile(r"robot\d_(eef_pos|eef_quat|gripper_qpos)")
_ROBOT_SIZES = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2}

_ACTION_SIZES = {True: 10, False: 7}
"""Whether actions are absolute -> channels of one arm's action: position 3, rotation 6 or 3, gripper 1."""

_AS_PLAYED_HERE = {
    "n_latency_steps": 0,
    "past_action_visible": False,
    "task.dataset.rotation_rep": "rotation_6d",
}


@dataclass(frozen=True)
class OriginalTask:
    """A task of ours.

    Attributes:
        name: as in ``task=<name>``.
        observation: key -> channels of the observation token, in the order in which training joined them.
        images: which of the keys are images -> (height, width), pixels; none in low-dim tasks.
    """

    name: str
    observation: Mapping[str, int]
    images: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        images = f" and images {dict(self.images)}" if self.images else ""
        return f"{self.name} with {dict(self.observation)}{images}"


def original_task(
    config: OriginalConfig, *, observation_dim: int, action_dim: int, vision: OriginalVision | None = None
) -> OriginalTask | None:
    """Return the task that ``cfg.task`` describes; None if its environment is none of ours.

    Args:
        config: the training configuration.
        observation_dim: channels of an observation Do, as the weights have it.
        action_dim: channels of an action Da, as the weights have it.
        vision: of an image policy; its keys may get other names in the task, their order stays.

    Raises:
        CorruptArtefact: name or observation keys are missing.
        Mismatch: the configuration disagrees with the weights or with itself, or the original would have played the
            policy in a way that we do not (with latency, with past actions, in another form of rotation).
    """
    match str(config.stated("task.env_runner._target_")).rpartition(".")[2], vision:
        case "PushTKeypointsRunner", None:
            task = OriginalTask("push_t", _PUSH_T)
        case "RobomimicLowdimRunner", None:
            task = _robomimic(config, observation_dim, action_dim)
        case "PushTImageRunner", OriginalVision():
            task = _push_t_image(config, vision)
        case "RobomimicImageRunner", OriginalVision():
            task = _robomimic_image(config, vision, action_dim)
        case _:
            return None
    config.require(_AS_PLAYED_HERE)
    channels = sum(task.observation.values())
    if channels != observation_dim:
        raise config.foreign(f"{channels} channels of {task.name}'s {dict(task.observation)}", observation_dim)
    return task


def _robomimic(config: OriginalConfig, observation_dim: int, action_dim: int) -> OriginalTask:
    name = config.needed("task.task_name", str)
    keys = config.stated("task.obs_keys")
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise config.foreign("observation keys in cfg.task.obs_keys", keys)
    config.require({f"task.{user}.obs_keys": keys for user in ("dataset", "env_runner")})
    _require_actions(config, keys, action_dim)
    sizes = {key: _ROBOT_SIZES[found[1]] for key in keys if (found := _ROBOT_KEY.fullmatch(key))}
    # The configuration states no sizes. The robot's are the same in every task, `object` is what is left.
    rest = [key for key in keys if key not in sizes]
    if len(rest) > 1:
        raise config.foreign("one observation key beside the robots' poses and grippers", rest)
    sizes |= dict.fromkeys(rest, observation_dim - sum(sizes.values()))
    return OriginalTask(name, {key: sizes[key] for key in keys})


def _push_t_image(config: OriginalConfig, vision: OriginalVision) -> OriginalTask:
    if vision.observation.keys() != _PUSH_T_IMAGE.keys():
        expected = f"Push-T's {sorted(_PUSH_T_IMAGE)} in cfg.policy.shape_meta.obs"
        raise config.foreign(expected, sorted(vision.observation))
    observation = {_PUSH_T_IMAGE[key]: size for key, size in vision.observation.items()}
    images = {_PUSH_T_IMAGE[key]: size for key, size in vision.config.images.items()}
    return OriginalTask("push_t_image", observation, images)


def _robomimic_image(config: OriginalConfig, vision: OriginalVision, action_dim: int) -> OriginalTask:
    _require_actions(config, vision.observation, action_dim)
    name = f"{config.needed('task.task_name', str)}_image"
    return OriginalTask(name, dict(vision.observation), dict(vision.config.images))


def _require_actions(config: OriginalConfig, keys: Iterable[str], action_dim: int) -> None:
    """Refuse a number of channels that is not that of absolute or delta actions, as the configuration has it."""
    arms = len({key[:6] for key in keys if _ROBOT_KEY.fullmatch(key)}) or 1
    absolute = config.stated("task.abs_action")
    if absolute is not None and action_dim != arms * _ACTION_SIZES[bool(absolute)]:
        expected = f"{arms * _ACTION_SIZES[bool(absolute)]} channels of action, as cfg.task.abs_action={absolute} means"
        raise config.foreign(expected, action_dim)
