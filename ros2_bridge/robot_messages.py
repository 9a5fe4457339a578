"""The inverse of ``conversion``: what a robot publishes so that the node reads a given observation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ros2_bridge.conversion import POSE_COMPONENTS, Make, header
from ros2_bridge.mapping import KeySource, SourceKind


def robot_messages(
    make: Make, sources: Sequence[KeySource], values: Mapping[str, np.ndarray], when_ns: int
) -> dict[str, Any]:
    """Return topic -> message for one observation.

    Args:
        make: of the transport.
        sources: where the node reads the keys; joint states and poses of several keys join in one message.
        values: key -> float[channels], or uint8[H, W, 3] or float[3, H, W] in [0, 1] of an image.
        when_ns: ROS time of sensing.
    """
    return {topic: _message(make, group, values, when_ns) for topic, group in _grouped(sources).items()}


def _grouped(sources: Sequence[KeySource]) -> dict[str, list[KeySource]]:
    return {topic: [each for each in sources if each.topic == topic] for topic in (each.topic for each in sources)}


def _message(make: Make, group: Sequence[KeySource], values: Mapping[str, np.ndarray], when_ns: int) -> Any:
    first = group[0]
    match first.kind:
        case SourceKind.JOINT_STATE:
            return _joint_state(make, group, values, when_ns)
        case SourceKind.POSE:
            return _pose(make, group, values, when_ns)
        case SourceKind.ARRAY:
            return make("std_msgs/msg/Float64MultiArray", data=np.asarray(values[first.key], np.float64))
        case _:
            return image_message(make, values[first.key], when_ns)


def image_message(make: Make, pixels: np.ndarray, when_ns: int) -> Any:
    """Return an rgb8 ``sensor_msgs/Image`` of uint8[H, W, 3], or of float[3, H, W] in [0, 1]."""
    if pixels.dtype != np.uint8:
        pixels = np.rint(pixels.transpose(1, 2, 0) * 255).astype(np.uint8)
    height, width, channels = pixels.shape
    return make(
        "sensor_msgs/msg/Image",
        header=header(make, when_ns),
        height=height,
        width=width,
        encoding="rgb8",
        step=width * channels,
        data=np.ascontiguousarray(pixels).reshape(-1),
    )


def _joint_state(make: Make, group: Sequence[KeySource], values: Mapping[str, np.ndarray], when_ns: int) -> Any:
    names = list(dict.fromkeys(name for source in group for name in source.names))
    quantities = {source.quantity: np.zeros(len(names)) for source in group}
    for source in group:
        places = [names.index(name) for name in source.names]
        quantities[source.quantity][places] = values[source.key]
    return make("sensor_msgs/msg/JointState", header=header(make, when_ns), name=names, **quantities)


def _pose(make: Make, group: Sequence[KeySource], values: Mapping[str, np.ndarray], when_ns: int) -> Any:
    numbers = dict.fromkeys(POSE_COMPONENTS, 0.0)
    for source in group:
        numbers |= dict(zip(source.names, np.asarray(values[source.key], np.float64).tolist(), strict=True))
    position = make("geometry_msgs/msg/Point", **{axis: numbers[axis] for axis in "xyz"})
    turn = make("geometry_msgs/msg/Quaternion", **{axis: numbers[f"q{axis}"] for axis in "xyzw"})
    pose = make("geometry_msgs/msg/Pose", position=position, orientation=turn)
    return make("geometry_msgs/msg/PoseStamped", header=header(make, when_ns), pose=pose)
