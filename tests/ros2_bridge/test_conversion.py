"""Messages to observation values and back; what must not be taken is refused with its kind."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ros2_bridge import conversion
from ros2_bridge.conversion import Refusal, RefusedMessage
from ros2_bridge.mapping import KeySource, SourceKind
from ros2_bridge.messages import MessageTypes
from ros2_bridge.robot_messages import image_message, robot_messages

TYPES = MessageTypes("jazzy")
NOW_NS = 12_000_000_345


def _joints(names: list[str], **quantities: list[float]) -> object:
    arrays = {name: np.array(values, np.float64) for name, values in quantities.items()}
    return TYPES.make("sensor_msgs/msg/JointState", name=names, **arrays)


def _image(encoding: str = "rgb8", **changed: object) -> object:
    fields: dict[str, object] = {"height": 2, "width": 3, "step": 9, "data": np.arange(18, dtype=np.uint8)}
    return TYPES.make("sensor_msgs/msg/Image", encoding=encoding, **fields | changed)


def test_joints_are_found_by_name_whatever_their_order() -> None:
    message = _joints(["elbow", "gripper", "shoulder"], position=[1, 2, 3], velocity=[4, 5, 6])
    np.testing.assert_array_equal(conversion.joint_state(message, ["shoulder", "elbow"], "position"), [3, 1])
    np.testing.assert_array_equal(conversion.joint_state(message, ["gripper"], "velocity"), [5])


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (_joints(["elbow"], position=[1]), Refusal.NAMES),
        (_joints(["elbow", "shoulder", "elbow"], position=[1, 2, 3]), Refusal.NAMES),
        (_joints(["shoulder", "elbow"], position=[1]), Refusal.SIZE),
        (_joints(["shoulder", "elbow"], position=[]), Refusal.SIZE),
        (_joints(["shoulder", "elbow"], position=[1, np.nan]), Refusal.NOT_FINITE),
    ],
)
def test_joint_states_that_do_not_fit_are_refused(message: object, kind: Refusal) -> None:
    with pytest.raises(RefusedMessage) as refused:
        conversion.joint_state(message, ["shoulder", "elbow"], "position")
    assert refused.value.kind is kind


def test_images_become_rgb() -> None:
    rgb = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    np.testing.assert_array_equal(conversion.image(_image(), 2, 3), rgb)
    np.testing.assert_array_equal(conversion.image(_image("bgr8"), 2, 3), rgb[..., ::-1])


def test_padding_behind_rows_is_left_out() -> None:
    rows = np.concatenate([np.arange(18, dtype=np.uint8).reshape(2, 9), np.full((2, 3), 99, np.uint8)], axis=1)
    padded = _image(step=12, data=rows.reshape(-1))
    np.testing.assert_array_equal(conversion.image(padded, 2, 3), conversion.image(_image(), 2, 3))


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (_image("mono8"), Refusal.ENCODING),
        (_image("RGB8"), Refusal.ENCODING),
        (_image(height=3), Refusal.SIZE),
        (_image(width=2), Refusal.SIZE),
        (_image(step=8), Refusal.SIZE),
        (_image(data=np.zeros(17, np.uint8)), Refusal.SIZE),
    ],
)
def test_images_that_do_not_fit_are_refused(message: object, kind: Refusal) -> None:
    with pytest.raises(RefusedMessage) as refused:
        conversion.image(message, 2, 3)
    assert refused.value.kind is kind


def _compressed(form: str, size: tuple[int, int] = (3, 2), cut: int | None = None) -> object:
    stream = io.BytesIO()
    pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    Image.fromarray(pixels).save(stream, form)
    data = np.frombuffer(stream.getvalue()[:cut], np.uint8)
    return TYPES.make("sensor_msgs/msg/CompressedImage", format=form.lower(), data=data)


def test_png_is_exact_and_jpeg_is_near() -> None:
    expected = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    np.testing.assert_array_equal(conversion.compressed_image(_compressed("PNG"), 2, 3), expected)
    # JPEG's default quality loses a few grey levels in so small a picture.
    np.testing.assert_allclose(conversion.compressed_image(_compressed("JPEG"), 2, 3), expected, atol=8)


def _with_an_empty_profile() -> object:
    """A PNG with a colour profile without a byte behind its pixels, over which Pillow raises an IndexError."""
    whole = bytes(_compressed("PNG").data)  # type: ignore[attr-defined]
    end, kind = whole.index(b"IEND") - 4, b"iCCP"
    chunk = struct.pack(">I", 0) + kind + struct.pack(">I", zlib.crc32(kind))
    data = np.frombuffer(whole[:end] + chunk + whole[end:], np.uint8)
    return TYPES.make("sensor_msgs/msg/CompressedImage", format="png", data=data)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (_with_an_empty_profile(), Refusal.ENCODING),
        (_compressed("PNG", (4, 2)), Refusal.SIZE),
        (_compressed("PNG", cut=40), Refusal.ENCODING),
        (_compressed("PNG", cut=8), Refusal.ENCODING),
        (_compressed("JPEG", cut=0), Refusal.ENCODING),
        (_compressed("GIF"), Refusal.ENCODING),
    ],
)
def test_compressed_images_that_do_not_fit_are_refused(message: object, kind: Refusal) -> None:
    with pytest.raises(RefusedMessage) as refused:
        conversion.compressed_image(message, 2, 3)
    assert refused.value.kind is kind


def test_arrays_have_their_size_and_are_finite() -> None:
    message = TYPES.make("std_msgs/msg/Float64MultiArray", data=np.array([1.0, np.inf]))
    with pytest.raises(RefusedMessage) as refused:
        conversion.array(message, 2)
    assert refused.value.kind is Refusal.NOT_FINITE
    with pytest.raises(RefusedMessage) as refused:
        conversion.array(message, 3)
    assert refused.value.kind is Refusal.SIZE


def test_a_header_without_time_is_refused_and_a_type_without_header_has_none() -> None:
    with pytest.raises(RefusedMessage) as refused:
        conversion.stamp_ns(TYPES.make("sensor_msgs/msg/JointState"))
    assert refused.value.kind is Refusal.UNSTAMPED
    assert conversion.stamp_ns(TYPES.make("std_msgs/msg/Float64MultiArray")) is None
    stamped = TYPES.make("sensor_msgs/msg/JointState", header=conversion.header(TYPES.make, NOW_NS))
    assert conversion.stamp_ns(stamped) == NOW_NS


def test_what_the_robot_publishes_is_what_the_node_reads() -> None:
    """The inverse pair, over bytes: several keys of one topic join in one message."""
    sources = [
        KeySource("arm", "joints", SourceKind.JOINT_STATE, ("b", "a")),
        KeySource("speed", "joints", SourceKind.JOINT_STATE, ("a",), "velocity"),
        KeySource("place", "pose", SourceKind.POSE, ("x", "z")),
        KeySource("turn", "pose", SourceKind.POSE, ("qw", "qx", "qy", "qz")),
        KeySource("object", "object", SourceKind.ARRAY),
        KeySource("camera", "camera", SourceKind.IMAGE),
    ]
    values = {
        "arm": np.array([0.1, 0.2], np.float32),
        "speed": np.array([7], np.float32),
        "place": np.array([1.5, -2.5], np.float32),
        "turn": np.array([0.4, 0.1, 0.2, 0.3], np.float32),
        "object": np.arange(5, dtype=np.float32),
        "camera": np.arange(18, dtype=np.uint8).reshape(2, 3, 3),
    }
    messages = robot_messages(TYPES.make, sources, values, NOW_NS)
    assert sorted(messages) == ["camera", "joints", "object", "pose"]
    for source in sources:
        sent = TYPES.serialize(source.type_name, messages[source.topic])
        message = TYPES.deserialize(source.type_name, sent)
        np.testing.assert_array_equal(source.read(message, values[source.key].shape), values[source.key])


def test_float_images_become_bytes() -> None:
    pixels = np.linspace(0, 1, 18, dtype=np.float32).reshape(3, 2, 3)
    read = conversion.image(image_message(TYPES.make, pixels, NOW_NS), 2, 3)
    np.testing.assert_array_equal(read, np.rint(pixels.transpose(1, 2, 0) * 255))


def test_an_action_is_an_array_with_a_named_dimension() -> None:
    message = conversion.action_message(TYPES.make, np.array([1.5, 2.5], np.float32))
    assert message.data.tolist() == [1.5, 2.5]
    assert [(each.label, each.size, each.stride) for each in message.layout.dim] == [("action", 2, 2)]


def test_a_chunk_is_a_trajectory_with_times() -> None:
    actions = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    message = conversion.trajectory_message(TYPES.make, ["x", "y"], actions, 1e9 / 3, NOW_NS)
    assert message.joint_names == ["x", "y"]
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (12, 345)
    times = [(point.time_from_start.sec, point.time_from_start.nanosec) for point in message.points]
    assert times == [(0, 333_333_333), (0, 666_666_667), (1, 0)]
    np.testing.assert_array_equal([point.positions for point in message.points], actions)
