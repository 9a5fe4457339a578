"""Which topic gives which observation key of the policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bac.choices import Choice
from bac.errors import InvalidInput, Mismatch, sentence
from ros2_bridge import conversion

Shape = tuple[int, ...]
"""Of one observation value: (channels,), or (height, width, 3) of an image."""

QUANTITIES = ("position", "velocity", "effort")


class SourceKind(Choice):
    """What an observation key is read from."""

    JOINT_STATE = "joint_state"
    IMAGE = "image"
    COMPRESSED_IMAGE = "compressed_image"
    POSE = "pose"
    ARRAY = "array"


MESSAGE_TYPES: Mapping[SourceKind, str] = {
    SourceKind.JOINT_STATE: "sensor_msgs/msg/JointState",
    SourceKind.IMAGE: "sensor_msgs/msg/Image",
    SourceKind.COMPRESSED_IMAGE: "sensor_msgs/msg/CompressedImage",
    SourceKind.POSE: "geometry_msgs/msg/PoseStamped",
    SourceKind.ARRAY: "std_msgs/msg/Float64MultiArray",
}
_PICTURES = {SourceKind.IMAGE, SourceKind.COMPRESSED_IMAGE}
_NAMED = {SourceKind.JOINT_STATE, SourceKind.POSE}


@dataclass(frozen=True)
class KeySource:
    """Where one observation key comes from; several may share a topic.

    Attributes:
        key: of the policy's observation.
        topic: its topic.
        kind: its message type.
        names: joints, or components of a pose (x y z qx qy qz qw), in the policy's order; empty for the others.
        quantity: of a joint state: position, velocity or effort.
    """

    key: str
    topic: str
    kind: SourceKind
    names: tuple[str, ...] = ()
    quantity: str = "position"

    def __post_init__(self) -> None:
        strange = [name for name in self.names if name not in conversion.POSE_COMPONENTS]
        if self.kind is SourceKind.POSE and strange:
            raise self._wrong("names", f"of {conversion.POSE_COMPONENTS}", strange)
        if (self.kind in _NAMED) != bool(self.names):
            raise self._wrong("names", "joints or pose components, and none of other types", list(self.names))
        if self.quantity not in QUANTITIES:
            raise self._wrong("quantity", f"one of {QUANTITIES}", self.quantity)
        if not self.topic:
            raise self._wrong("topic", "a topic", "none")

    @property
    def type_name(self) -> str:
        """Its message type in ROS' words."""
        return MESSAGE_TYPES[self.kind]

    def read(self, message: Any, shape: Shape) -> np.ndarray:
        """Return the key's value: float32[channels], or uint8[height, width, 3].

        Raises:
            RefusedMessage: the message is not what it should be.
        """
        match self.kind:
            case SourceKind.JOINT_STATE:
                return conversion.joint_state(message, self.names, self.quantity)
            case SourceKind.POSE:
                return conversion.pose(message, self.names)
            case SourceKind.ARRAY:
                return conversion.array(message, shape[0])
            case SourceKind.IMAGE:
                return conversion.image(message, *shape[:2])
            case SourceKind.COMPRESSED_IMAGE:
                return conversion.compressed_image(message, *shape[:2])

    def require(self, shape: Shape) -> None:
        """Refuse to stand for a value of another shape.

        Raises:
            Mismatch: an image key from numbers or the other way round, or another number of channels.
        """
        picture = len(shape) == 3
        if picture != (self.kind in _PICTURES):
            expected, got = "an image topic" if picture else f"a topic of {shape[0]} numbers", str(self.kind)
        elif self.names and len(self.names) != shape[0]:
            expected, got = f"{shape[0]} names", str(list(self.names))
        else:
            return
        raise Mismatch(
            sentence(f"observation.{self.key}", expected=expected, got=got, mend="correct its type and names")
        )

    def _wrong(self, what: str, expected: str, got: object) -> InvalidInput:
        return InvalidInput(
            sentence(f"observation.{self.key}.{what}", expected=expected, got=got, mend="correct the parameter")
        )


def require_sources(sources: Sequence[KeySource], observation: Mapping[str, Shape]) -> None:
    """Refuse sources that are not exactly the policy's observation.

    Raises:
        Mismatch: a key is missing, unknown or of another shape, or one topic is to have two types.
    """
    if sorted(each.key for each in sources) != sorted(observation):
        raise Mismatch(
            sentence(
                "observation_keys",
                expected=f"{sorted(observation)} as the policy",
                got=sorted(each.key for each in sources),
                mend="map each key to a topic once",
            )
        )
    for source in sources:
        source.require(observation[source.key])
    types: dict[str, str] = {}
    for source in sources:
        if types.setdefault(source.topic, source.type_name) != source.type_name:
            got = f"{types[source.topic]} and {source.type_name}"
            raise Mismatch(sentence(f"topic {source.topic}", expected="one type", got=got, mend="correct the types"))
