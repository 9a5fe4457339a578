"""robomimic's tasks: simulation, observations, published limits, and how their data sets describe them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from envs.actions import DELTA_SIZE, POLICY_SIZE
from envs.errors import EnvError

RATE_HZ = 20.0

IMAGE = "_image"
"""How the key of an image observation ends; before it stands the camera's name."""

_CONTROLLER = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "interpolation": None,
    "ramp_ratio": 0.2,
}
"""As in the ``env_args`` of the published data sets; ``control_delta`` is added by ``settings``."""


@dataclass(frozen=True)
class RobomimicTask:
    """One task.

    Attributes:
        name: as diffusion_policy calls it.
        simulation: robosuite's name of it.
        object_size: numbers in the observation ``object``.
        max_steps: control steps of an episode, as published for proficient-human data.
        cameras: of the published image policies.
        image_size: height and width of their images, pixels.
        arms: robots, 1 or 2.
        extra: what robosuite is told beside the common settings.
    """

    name: str
    simulation: str
    object_size: int
    max_steps: int = 400
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")
    image_size: int = 84
    arms: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def low_dim(self) -> Mapping[str, int]:
        """The low-dim observation, key -> numbers, in the order the original policies join them."""
        sizes = {"object": self.object_size}
        for arm in range(self.arms):
            sizes |= {f"robot{arm}_eef_pos": 3, f"robot{arm}_eef_quat": 4, f"robot{arm}_gripper_qpos": 2}
        return MappingProxyType(sizes)

    @property
    def images(self) -> tuple[str, ...]:
        """The keys of the image observations."""
        return tuple(camera + IMAGE for camera in self.cameras)

    @property
    def delta_size(self) -> int:
        """Channels of a delta action, and of a pose for the controller."""
        return self.arms * DELTA_SIZE

    @property
    def policy_size(self) -> int:
        """Channels of an absolute action as a policy gives it."""
        return self.arms * POLICY_SIZE

    def settings(
        self, *, absolute: bool, images: tuple[str, ...] = (), image_size: int | None = None
    ) -> dict[str, Any]:
        """Return the arguments of the simulation as the published data sets carry them (``env_kwargs``)."""
        size = self.image_size if image_size is None else image_size
        cameras = {"camera_names": [key.removesuffix(IMAGE) for key in images]} if images else {}
        return {
            "has_renderer": False,
            "has_offscreen_renderer": bool(images),
            "ignore_done": True,
            "use_object_obs": True,
            "use_camera_obs": bool(images),
            "control_freq": int(RATE_HZ),
            "controller_configs": _CONTROLLER | {"control_delta": not absolute},
            "robots": ["Panda"] * self.arms,
            "camera_depths": False,
            "camera_heights": size,
            "camera_widths": size,
            "reward_shaping": False,
            **cameras,
            **self.extra,
        }


TASKS: Mapping[str, RobomimicTask] = MappingProxyType(
    {
        task.name: task
        for task in (
            RobomimicTask("lift", "Lift", object_size=10),
            RobomimicTask("can", "PickPlaceCan", object_size=14),
            RobomimicTask("square", "NutAssemblySquare", object_size=14),
            RobomimicTask(
                "tool_hang",
                "ToolHang",
                object_size=44,
                max_steps=700,
                cameras=("sideview", "robot0_eye_in_hand"),
                image_size=240,
            ),
            RobomimicTask(
                "transport",
                "TwoArmTransport",
                object_size=41,
                max_steps=700,
                cameras=("shouldercamera0", "robot0_eye_in_hand", "shouldercamera1", "robot1_eye_in_hand"),
                arms=2,
                extra={"env_configuration": "single-arm-opposed"},
            ),
        )
    }
)
"""Name -> task."""


def robomimic_task(name: str) -> RobomimicTask:
    """Return the task called ``name``.

    Raises:
        EnvError: there is none.
    """
    if name not in TASKS:
        raise EnvError(f"robomimic task: expected one of {sorted(TASKS)}, got {name!r}; choose one of these.")
    return TASKS[name]


def is_absolute(name: str, action_size: int) -> bool:
    """Return whether actions of so many channels are absolute ones of the task called ``name``, or else deltas.

    Raises:
        EnvError: they are neither, or there is no such task.
    """
    task = robomimic_task(name)
    if action_size not in {task.policy_size, task.delta_size}:
        raise EnvError(
            f"{name} actions: expected {task.policy_size} channels (absolute) or {task.delta_size} (delta), got "
            f"{action_size}; change task.action_dim or give the data of this task."
        )
    return action_size == task.policy_size
