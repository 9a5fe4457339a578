"""Bytes, hashes and names on the wire, against those of genuine ROS 2."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from bac.errors import InvalidInput
from ros2_bridge.distributions import GID_BYTES, Distribution, absolute_topic, dds_topic, dds_type
from ros2_bridge.messages import GRAPH_TYPE, MalformedMessage, MessageTypes

HERE = Path(__file__).parent
CDR = json.loads((HERE / "golden_cdr.json").read_text())
"""Type -> bytes that genuine ROS 2 Jazzy wrote for the messages of ``_golden``."""
HASHES = json.loads((HERE / "golden_hashes.json").read_text())
"""Type -> hash that ROS 2 Jazzy prints (``ros2 topic info -v``, published by others; the graph's measured by us)."""


@pytest.fixture(scope="module")
def types() -> MessageTypes:
    return MessageTypes("jazzy")


def _header(types: MessageTypes) -> object:
    stamp = types.make("builtin_interfaces/msg/Time", sec=12, nanosec=345)
    return types.make("std_msgs/msg/Header", stamp=stamp, frame_id="base")


def _golden(types: MessageTypes) -> dict[str, object]:
    """The messages that were given to genuine ROS 2, written by hand."""
    make, header = types.make, _header(types)
    dimension = make("std_msgs/msg/MultiArrayDimension", label="t", size=2, stride=4)
    layout = make("std_msgs/msg/MultiArrayLayout", dim=[dimension], data_offset=7)
    points = [
        make(
            "trajectory_msgs/msg/JointTrajectoryPoint",
            positions=np.array([1.0, 2.0]),
            time_from_start=make("builtin_interfaces/msg/Duration", nanosec=50_000_000),
        ),
        make(
            "trajectory_msgs/msg/JointTrajectoryPoint",
            positions=np.array([3.0, 4.0]),
            velocities=np.array([0.1, 0.2]),
            time_from_start=make("builtin_interfaces/msg/Duration", sec=1),
        ),
    ]
    return {
        "sensor_msgs/msg/JointState": make(
            "sensor_msgs/msg/JointState",
            header=header,
            name=["shoulder", "elb"],
            position=np.array([0.5, -1.25]),
            velocity=np.array([1.0, 2.0]),
        ),
        "sensor_msgs/msg/Image": make(
            "sensor_msgs/msg/Image",
            header=header,
            height=2,
            width=3,
            encoding="rgb8",
            step=9,
            data=np.arange(18, dtype=np.uint8),
        ),
        "std_msgs/msg/Float64MultiArray": make(
            "std_msgs/msg/Float64MultiArray", layout=layout, data=np.array([1.0, 2.0, 3.0, 4.0])
        ),
        "trajectory_msgs/msg/JointTrajectory": make(
            "trajectory_msgs/msg/JointTrajectory", header=header, joint_names=["a", "bc"], points=points
        ),
        "std_msgs/msg/String": make("std_msgs/msg/String", data="ready"),
        "std_msgs/msg/Bool": make("std_msgs/msg/Bool", data=True),
    }


@pytest.mark.parametrize("name", sorted(CDR))
def test_bytes_are_those_of_ros(types: MessageTypes, name: str) -> None:
    assert types.serialize(name, _golden(types)[name]).hex() == CDR[name]


@pytest.mark.parametrize("name", sorted(CDR))
def test_bytes_of_ros_are_read_back(types: MessageTypes, name: str) -> None:
    assert types.serialize(name, types.deserialize(name, bytes.fromhex(CDR[name]))).hex() == CDR[name]


@pytest.mark.parametrize("name", sorted(HASHES))
def test_type_hashes_are_those_of_ros(types: MessageTypes, name: str) -> None:
    assert types.type_hash(name) == HASHES[name]


def test_every_type_that_the_bridge_names_has_a_golden_hash() -> None:
    source = "".join(path.read_text() for path in (HERE.parents[1] / "ros2_bridge").glob("*.py"))
    named = set(re.findall(r'"(\w+_\w+/msg/\w+)"', source))
    parts = {"Duration", "Point", "Quaternion", "Pose", "JointTrajectoryPoint", "MultiArrayLayout"}
    parts |= {"MultiArrayDimension", "KeyValue", "DiagnosticStatus", "NodeEntitiesInfo", "Gid"}
    topics = {name for name in named if name.split("/")[-1] not in parts}
    assert len(topics) > 10
    # What is only part of a message is in its hash.
    assert topics <= HASHES.keys(), topics - HASHES.keys()


@pytest.mark.parametrize("name", sorted(set(HASHES) - {"rmw_dds_common/msg/ParticipantEntitiesInfo"}))
def test_an_independent_codec_writes_the_same_bytes(types: MessageTypes, name: str) -> None:
    """Cyclone DDS's own codec, for the types of which no bytes of genuine ROS 2 were kept as well."""
    pytest.importorskip("cyclonedds")
    from ros2_bridge.dds_types import described_type

    message = _golden(types).get(name) or _filled(types, name)
    theirs = _as_cyclone(types, name, message).serialize(use_version_2=False)
    ours = types.serialize(name, message)
    assert described_type(types, name).__idl_typename__ == dds_type(name)
    assert ours.ljust(len(theirs), b"\0") == theirs.ljust(len(ours), b"\0")
    assert abs(len(ours) - len(theirs)) < 4


def _filled(types: MessageTypes, name: str) -> object:
    """Return a message whose every field has another value than its default."""
    make, header = types.make, _header(types)
    pose = make(
        "geometry_msgs/msg/Pose",
        position=make("geometry_msgs/msg/Point", x=1.5, y=-2.5, z=3.5),
        orientation=make("geometry_msgs/msg/Quaternion", x=0.1, y=0.2, z=0.3, w=0.4),
    )
    pair = make("diagnostic_msgs/msg/KeyValue", key="misses", value="3")
    status = make(
        "diagnostic_msgs/msg/DiagnosticStatus", level=2, name="node", message="late", hardware_id="gpu", values=[pair]
    )
    fields: dict[str, dict[str, object]] = {
        "builtin_interfaces/msg/Time": {"sec": -3, "nanosec": 5},
        "std_msgs/msg/Header": {"frame_id": "abc"},
        "std_msgs/msg/Empty": {},
        "rosgraph_msgs/msg/Clock": {"clock": make("builtin_interfaces/msg/Time", sec=1, nanosec=2)},
        "geometry_msgs/msg/PoseStamped": {"header": header, "pose": pose},
        "sensor_msgs/msg/CompressedImage": {"header": header, "format": "png", "data": np.arange(5, dtype=np.uint8)},
        "diagnostic_msgs/msg/DiagnosticArray": {"header": header, "status": [status, status]},
    }
    return make(name, **fields[name])


def _as_cyclone(types: MessageTypes, name: str, message: object) -> object:
    from ros2_bridge.dds_types import described_type

    def converted(value: object) -> object:
        inner = getattr(value, "__msgtype__", None)
        if inner is not None:
            return _as_cyclone(types, inner, value)
        if isinstance(value, np.ndarray):
            return value.tolist()
        return [converted(each) for each in value] if isinstance(value, list) else value

    names = [field for field, _ in types.fields[name][1]]
    return described_type(types, name)(**{field: converted(getattr(message, field)) for field in names})


@pytest.mark.parametrize("cut", [0, 3, 4, 9, 30])
def test_bytes_that_end_too_early_are_malformed(types: MessageTypes, cut: int) -> None:
    whole = bytes.fromhex(CDR["sensor_msgs/msg/JointState"])
    with pytest.raises(MalformedMessage, match="expected CDR"):
        types.deserialize("sensor_msgs/msg/JointState", whole[:cut])


def test_a_length_beyond_the_bytes_is_malformed(types: MessageTypes) -> None:
    whole = bytearray.fromhex(CDR["std_msgs/msg/Float64MultiArray"])
    # Before the 4 bytes that align the doubles.
    whole[-40:-36] = (2**31).to_bytes(4, "little")
    with pytest.raises(MalformedMessage):
        types.deserialize("std_msgs/msg/Float64MultiArray", bytes(whole))


def test_unknown_fields_and_types_are_refused(types: MessageTypes) -> None:
    with pytest.raises(InvalidInput, match="dota"):
        types.make("std_msgs/msg/String", dota="x")
    with pytest.raises(InvalidInput, match="Strong"):
        types.make("std_msgs/msg/Strong")


@pytest.mark.parametrize("distro", list(Distribution))
def test_the_graph_has_the_distribution_s_id_size(distro: Distribution) -> None:
    gid = MessageTypes(distro).make("rmw_dds_common/msg/Gid")
    assert len(gid.data) == GID_BYTES[distro] == {"humble": 24}.get(distro, 16)


# By hand from the rules of CDR: a number stands at a multiple of its size, counted from behind the header of 4 bytes;
# a sequence is its count (uint32) and its elements; a string is its length with the closing zero (uint32), its letters
# and the zero; octets need no alignment, and an array has no count. 16 and 24 are multiples of 4, so that ids of either
# size leave the rest as it is.
_GRAPH = (
    "00010000"  # header: CDR version 1, little endian; no options
    "{participant}"
    "02000000"  # two nodes
    "02000000"  # of the first: length of "/" and its zero
    "2f00"
    "0000"  # pads 2 bytes to the next length
    "04000000"  # length of "arm" and its zero, which need no padding
    "61726d00"
    "01000000"  # one reader
    "{reader}"
    "02000000"  # two writers
    "{writer}"
    "{other_writer}"
    "05000000"  # of the second: length of "/lab" and its zero
    "2f6c616200"
    "000000"  # pads 5 bytes to the next length
    "07000000"  # length of "driver" and its zero
    "64726976657200"
    "00"  # pads 7 bytes to the next count
    "00000000"  # no reader
    "00000000"  # no writer
)
_IDS_16 = {
    "participant": "000102030405060708090a0b0c0d0e0f",
    "reader": "101112131415161718191a1b1c1d1e1f",
    "writer": "202122232425262728292a2b2c2d2e2f",
    "other_writer": "303132333435363738393a3b3c3d3e3f",
}
_IDS_24 = {name: f"{digits}a0a1a2a3a4a5a6a7" for name, digits in _IDS_16.items()}


@pytest.mark.parametrize(("distro", "ids"), [("jazzy", _IDS_16), ("kilted", _IDS_16), ("humble", _IDS_24)])
def test_the_graph_s_bytes_follow_from_the_rules_of_cdr(distro: str, ids: dict[str, str]) -> None:
    types, golden = MessageTypes(distro), _GRAPH.format(**ids)

    def gid(name: str) -> object:
        return types.make("rmw_dds_common/msg/Gid", data=np.frombuffer(bytes.fromhex(ids[name]), np.uint8))

    arm = types.make(
        "rmw_dds_common/msg/NodeEntitiesInfo",
        node_namespace="/",
        node_name="arm",
        reader_gid_seq=[gid("reader")],
        writer_gid_seq=[gid("writer"), gid("other_writer")],
    )
    driver = types.make("rmw_dds_common/msg/NodeEntitiesInfo", node_namespace="/lab", node_name="driver")
    message = types.make(GRAPH_TYPE, gid=gid("participant"), node_entities_info_seq=[arm, driver])
    assert types.serialize(GRAPH_TYPE, message).hex() == golden
    read = types.deserialize(GRAPH_TYPE, bytes.fromhex(golden))
    first, second = read.node_entities_info_seq
    assert bytes(read.gid.data).hex() == ids["participant"]
    assert (first.node_namespace, first.node_name) == ("/", "arm")
    assert [bytes(each.data).hex() for each in first.reader_gid_seq] == [ids["reader"]]
    assert [bytes(each.data).hex() for each in first.writer_gid_seq] == [ids["writer"], ids["other_writer"]]
    assert (second.node_namespace, second.node_name) == ("/lab", "driver")
    assert (second.reader_gid_seq, second.writer_gid_seq) == ([], [])


def test_humble_has_no_type_hashes() -> None:
    assert MessageTypes("humble").type_hash("std_msgs/msg/String") is None


def test_names_are_mangled_as_ros_does() -> None:
    assert dds_type("sensor_msgs/msg/JointState") == "sensor_msgs::msg::dds_::JointState_"
    assert dds_topic("/joint_states") == "rt/joint_states"
    with pytest.raises(InvalidInput, match="package/msg/Type"):
        dds_type("JointState")


@pytest.mark.parametrize(
    ("topic", "namespace", "resolved"),
    [
        ("/a/b", "/robot", "/a/b"),
        ("a", "/robot", "/robot/a"),
        ("a", "/", "/a"),
        ("~/status", "/", "/node/status"),
        ("~/status", "/robot", "/robot/node/status"),
        ("a", "", "/a"),
        ("a", "robot", "/robot/a"),
        ("~/status", "robot/arm/", "/robot/arm/node/status"),
    ],
)
def test_topics_are_resolved_as_ros_does(topic: str, namespace: str, resolved: str) -> None:
    assert absolute_topic(topic, namespace, "node") == resolved


@pytest.mark.parametrize("topic", ["", "/", "a//b", "a b", "1a", "a-b", "~x"])
def test_topics_that_ros_refuses_are_refused(topic: str) -> None:
    with pytest.raises(InvalidInput):
        absolute_topic(topic, "/", "node")
