"""Messages to observation values, actions to messages: pure functions, the same over every transport.

What a robot must not act on is refused with its kind, which diagnostics count, and its sentence.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from bac.choices import Choice
from bac.control.clock import NS_PER_S
from bac.errors import InvalidInput, sentence

Make = Callable[..., Any]
"""``Transport.make``: (type name, fields by name) -> message."""

_CHANNEL_ORDER = {"rgb8": slice(None), "bgr8": slice(None, None, -1)}
POSE_COMPONENTS = ("x", "y", "z", "qx", "qy", "qz", "qw")


class Refusal(Choice):
    """Why a message is not taken."""

    MALFORMED = "malformed"
    ENCODING = "encoding"
    SIZE = "size"
    NAMES = "names"
    NOT_FINITE = "not_finite"
    UNSTAMPED = "unstamped"
    BACKWARDS = "backwards"
    FUTURE = "future"
    SECOND_PUBLISHER = "second_publisher"


class RefusedMessage(InvalidInput):
    """A message that nothing may be inferred from.

    Attributes:
        kind: what diagnostics count it under.
    """

    def __init__(self, kind: Refusal, told: str) -> None:
        super().__init__(told)
        self.kind = kind


def joint_state(message: Any, names: Sequence[str], quantity: str) -> np.ndarray:
    """Return float32[len(names)] of a ``sensor_msgs/JointState``, by joint name, whatever their order in the message.

    Args:
        message: the joint state.
        names: joints in the policy's order.
        quantity: ``position`` (rad, m), ``velocity`` or ``effort``.

    Raises:
        RefusedMessage: a joint is missing or there twice, the quantity is not there for each, or a value is not finite.
    """
    given = list(message.name)
    places = {name: place for place, name in enumerate(given)}
    missing = [name for name in names if name not in places]
    if missing or len(places) != len(given):
        told = sentence("JointState.name", expected=f"{list(names)}, each once", got=given, mend="correct `names`")
        raise RefusedMessage(Refusal.NAMES, told)
    values = np.asarray(getattr(message, quantity), np.float64)
    if len(values) != len(given):
        told = sentence(
            f"JointState.{quantity}", expected=f"{len(given)} values, as names", got=len(values), mend="fix the driver"
        )
        raise RefusedMessage(Refusal.SIZE, told)
    return _finite("JointState", values[[places[name] for name in names]])


def pose(message: Any, components: Sequence[str]) -> np.ndarray:
    """Return float32[len(components)] of a ``geometry_msgs/PoseStamped``: x, y, z in m, qx, qy, qz, qw.

    Raises:
        RefusedMessage: a value is not finite.
    """
    position, turn = message.pose.position, message.pose.orientation
    values = (position.x, position.y, position.z, turn.x, turn.y, turn.z, turn.w)
    return _finite("PoseStamped", np.array([values[POSE_COMPONENTS.index(each)] for each in components]))


def array(message: Any, size: int) -> np.ndarray:
    """Return float32[size] of a ``std_msgs/Float64MultiArray``.

    Raises:
        RefusedMessage: another size, or a value that is not finite.
    """
    values = np.asarray(message.data, np.float64)
    if values.shape != (size,):
        told = sentence("Float64MultiArray", expected=f"{size} values", got=len(values), mend="correct the publisher")
        raise RefusedMessage(Refusal.SIZE, told)
    return _finite("Float64MultiArray", values)


def image(message: Any, height: int, width: int) -> np.ndarray:
    """Return uint8[height, width, 3], RGB, of a ``sensor_msgs/Image`` in rgb8 or bgr8; a view of it where it can be.

    Raises:
        RefusedMessage: another encoding or size, or a step that its data does not have.
    """
    if message.encoding not in _CHANNEL_ORDER:
        told = sentence(
            "Image.encoding", expected="rgb8 or bgr8", got=repr(message.encoding), mend="convert with image_proc"
        )
        raise RefusedMessage(Refusal.ENCODING, told)
    data = np.frombuffer(message.data, np.uint8)
    shaped = (message.height, message.width) == (height, width)
    if not shaped or message.step < width * 3 or data.size != message.step * height:
        got = f"{message.height} x {message.width}, step {message.step}, {data.size} bytes"
        told = sentence("Image", expected=f"{height} x {width} pixels", got=got, mend="resize with image_proc")
        raise RefusedMessage(Refusal.SIZE, told)
    pixels = data.reshape(height, message.step)[:, : width * 3].reshape(height, width, 3)
    return pixels[..., _CHANNEL_ORDER[message.encoding]]


def compressed_image(message: Any, height: int, width: int) -> np.ndarray:
    """Return uint8[height, width, 3], RGB, of a ``sensor_msgs/CompressedImage`` in JPEG or PNG.

    Raises:
        RefusedMessage: bytes that are neither, or another size.
    """
    try:
        with Image.open(io.BytesIO(bytes(message.data)), formats=("JPEG", "PNG")) as opened:
            # Its size stands in its header: what does not fit is not decoded.
            size = opened.size
            pixels = np.asarray(opened.convert("RGB")) if size == (width, height) else None
    # Pillow lets through whatever its decoders stumble over: no list of types is whole.
    except Exception as error:
        told = sentence("CompressedImage", expected="JPEG or PNG", got=message.format, mend="correct the publisher")
        raise RefusedMessage(Refusal.ENCODING, told) from error
    if pixels is None:
        got = f"{size[1]} x {size[0]}"
        told = sentence("CompressedImage", expected=f"{height} x {width} pixels", got=got, mend="resize at the camera")
        raise RefusedMessage(Refusal.SIZE, told)
    return pixels


def stamp_ns(message: Any) -> int | None:
    """Return when a message's data were sensed, ROS time in nanoseconds, or None for a type without header.

    Raises:
        RefusedMessage: there is a header without a time.
    """
    header = getattr(message, "header", None)
    if header is None:
        return None
    when = header.stamp.sec * NS_PER_S + header.stamp.nanosec
    if when == 0:
        told = sentence("header.stamp", expected="when the data were sensed", got="0", mend="stamp in the driver")
        raise RefusedMessage(Refusal.UNSTAMPED, told)
    return when


def time_message(make: Make, when_ns: int) -> Any:
    """Return a ``builtin_interfaces/Time``."""
    return make("builtin_interfaces/msg/Time", sec=when_ns // NS_PER_S, nanosec=when_ns % NS_PER_S)


def header(make: Make, when_ns: int, frame: str = "") -> Any:
    """Return a ``std_msgs/Header``."""
    return make("std_msgs/msg/Header", stamp=time_message(make, when_ns), frame_id=frame)


def action_message(make: Make, action: np.ndarray) -> Any:
    """Return a ``std_msgs/Float64MultiArray`` of one action float[Da], task units."""
    size = len(action)
    dimension = make("std_msgs/msg/MultiArrayDimension", label="action", size=size, stride=size)
    layout = make("std_msgs/msg/MultiArrayLayout", dim=[dimension])
    return make("std_msgs/msg/Float64MultiArray", layout=layout, data=np.asarray(action, np.float64))


def trajectory_message(make: Make, names: Sequence[str], actions: np.ndarray, period_ns: float, begins_ns: int) -> Any:
    """Return a ``trajectory_msgs/JointTrajectory`` of consecutive actions.

    Args:
        make: of the transport.
        names: joint of each channel.
        actions: float[N, Da], task units.
        period_ns: from action to action; the first is to be reached one period after the trajectory begins.
        begins_ns: ROS time; controllers take it as the header's stamp.
    """
    points = []
    for number, action in enumerate(actions, start=1):
        after = round(number * period_ns)
        duration = make("builtin_interfaces/msg/Duration", sec=after // NS_PER_S, nanosec=after % NS_PER_S)
        positions = np.asarray(action, np.float64)
        points.append(make("trajectory_msgs/msg/JointTrajectoryPoint", positions=positions, time_from_start=duration))
    return make(
        "trajectory_msgs/msg/JointTrajectory",
        header=header(make, begins_ns),
        joint_names=list(names),
        points=points,
    )


def _finite(what: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        told = sentence(what, expected="finite values", got=values.tolist(), mend="check the sensor")
        raise RefusedMessage(Refusal.NOT_FINITE, told)
    return values.astype(np.float32)
