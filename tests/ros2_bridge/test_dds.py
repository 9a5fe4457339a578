"""The transport over real DDS on loopback, within one process: what ROS 2 nodes would see, and what they may send."""

import itertools
import os
import queue
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cyclonedds")

from cyclonedds.builtin import BuiltinDataReader, BuiltinTopicDcpsPublication
from cyclonedds.core import DDSException
from cyclonedds.domain import DomainParticipant

from bac.control.clock import NS_PER_S
from bac.errors import InvalidInput
from ros2_bridge.conversion import Refusal, header
from ros2_bridge.core import PolicyCore
from ros2_bridge.dds import DdsTransport
from ros2_bridge.distributions import GID_BYTES
from ros2_bridge.messages import GRAPH_TYPE
from ros2_bridge.node_clock import SystemClock
from ros2_bridge.output import ActionOutput
from ros2_bridge.transport import COMMAND, EVENT, SENSOR, STATUS
from tests.ros2_bridge.toys import PARAMETERS, PATIENCE_S, loading

STRING = "std_msgs/msg/String"
_PAUSE_S = 0.001
"""Between messages of a burst: at 500 Hz and more."""
Open = Callable[..., DdsTransport]


@pytest.fixture
def open_dds(domain: int) -> Iterator[Open]:
    opened: list[DdsTransport] = []

    def begin(node: str, distro: str = "jazzy", namespace: str = "/") -> DdsTransport:
        opened.append(DdsTransport(node, namespace, distro, domain))
        return opened[-1]

    yield begin
    for each in reversed(opened):
        each.close()


class Inbox:
    """What a subscription got."""

    def __init__(self, transport: DdsTransport, topic: str, type_name: str = STRING, profile: Any = EVENT) -> None:
        self.messages: queue.Queue[tuple[Any, str]] = queue.Queue()
        self.malformed: queue.Queue[str] = queue.Queue()
        self.handle = transport.subscribe(
            topic, type_name, profile, lambda message, source: self.messages.put((message, source)), self.malformed.put
        )

    def get(self) -> Any:
        return self.messages.get(timeout=PATIENCE_S)[0]


def _string(transport: DdsTransport, text: str) -> Any:
    return transport.make(STRING, data=text)


def _connected(sender: DdsTransport, inbox: Inbox, topic: str, profile: Any = EVENT) -> Any:
    """Return a publisher whose messages arrive: repeated until the first does, for discovery takes its time."""
    publisher = sender.publisher(topic, STRING, profile)
    while True:
        publisher.publish(_string(sender, "are you there"))
        try:
            inbox.messages.get(timeout=0.05)
        except queue.Empty:
            continue
        break
    publisher.publish(_string(sender, "yes"))
    while inbox.get().data != "yes":
        pass
    return publisher


def test_messages_arrive_whole_and_in_order(open_dds: Open) -> None:
    robot, node = open_dds("robot"), open_dds("policy_node")
    inbox = Inbox(node, "words")
    publisher = _connected(robot, inbox, "/words")
    for number in range(10):
        publisher.publish(_string(robot, f"word {number}"))
    assert [inbox.get().data for _ in range(10)] == [f"word {number}" for number in range(10)]


def test_an_image_arrives_bit_for_bit(open_dds: Open) -> None:
    robot, node = open_dds("robot"), open_dds("policy_node")
    kind = "sensor_msgs/msg/Image"
    inbox = Inbox(node, "camera", kind, STATUS)
    pixels = np.random.default_rng(0).integers(0, 256, 480 * 640 * 3, np.uint8)
    message = robot.make(kind, height=480, width=640, encoding="rgb8", step=1920, data=pixels)
    robot.publisher("camera", kind, STATUS).publish(message)
    got = inbox.get()
    assert (got.height, got.width, got.encoding, got.step) == (480, 640, "rgb8", 1920)
    np.testing.assert_array_equal(got.data, pixels)


def test_a_latched_message_waits_for_late_comers(open_dds: Open) -> None:
    node = open_dds("policy_node")
    publisher = node.publisher("~/status", STRING, STATUS)
    for text in ("old", "new"):
        publisher.publish(_string(node, text))
    inbox = Inbox(open_dds("robot"), "/policy_node/status", profile=STATUS)
    assert inbox.get().data == "new"


def test_malformed_bytes_are_told_and_the_next_message_arrives(open_dds: Open) -> None:
    robot, node = open_dds("robot"), open_dds("policy_node")
    inbox = Inbox(node, "words")
    publisher = _connected(robot, inbox, "words")
    # No UTF-8: the only malformed string that Cyclone carries.
    publisher.publish_cdr(bytes.fromhex("0001000004000000") + b"\xff\xfe\xfd\0")
    publisher.publish(_string(robot, "sound"))
    assert "expected CDR" in inbox.malformed.get(timeout=PATIENCE_S)
    assert inbox.get().data == "sound"
    assert inbox.malformed.empty()


def test_bytes_that_end_too_early_do_not_even_leave(open_dds: Open) -> None:
    """Cyclone checks every sample against the type, where it is sent and where it arrives: what is cut is dropped."""
    robot = open_dds("robot")
    publisher = robot.publisher("words", STRING, EVENT)
    with pytest.raises(DDSException, match="BAD_PARAMETER"):
        publisher.publish_cdr(bytes.fromhex("0001000064000000") + b"abc\0")


def test_a_callback_that_fails_is_logged_and_the_next_message_arrives(
    open_dds: Open, caplog: pytest.LogCaptureFixture
) -> None:
    robot, node = open_dds("robot"), open_dds("policy_node")
    inbox = Inbox(node, "words")
    failed: list[str] = []

    def fail(message: Any, source: str) -> None:
        failed.append(message.data)
        raise RuntimeError(f"cannot take {message.data!r}")

    node.subscribe("words", STRING, EVENT, fail, pytest.fail)
    publisher = _connected(robot, inbox, "words")
    for text in ("first", "second"):
        while text not in failed:
            publisher.publish(_string(robot, text))
            assert inbox.get().data == text
    # One thread hands over: when the third is there, what the second raised has been logged.
    publisher.publish(_string(robot, "third"))
    assert inbox.get().data == "third"
    assert "cannot take 'first'" in caplog.text
    assert "cannot take 'second'" in caplog.text


def test_publishers_are_told_apart(open_dds: Open) -> None:
    inbox = Inbox(open_dds("policy_node"), "words")
    sources = []
    for name in ("robot", "other", "robot again"):
        sender = open_dds(name.replace(" ", "_"))
        _connected(sender, inbox, "words").publish(_string(sender, name))
        message, source = inbox.messages.get(timeout=PATIENCE_S)
        assert message.data == name
        sources.append(source)
    assert len(set(sources)) == 3


@pytest.mark.parametrize(
    ("distro", "namespace", "told"), [("humble", "/", "/"), ("jazzy", "/", "/"), ("jazzy", "robot/", "/robot")]
)
def test_the_graph_names_the_node_and_its_endpoints(open_dds: Open, distro: str, namespace: str, told: str) -> None:
    """What ``ros2 node list`` and ``ros2 node info`` are made from."""
    node = open_dds("policy_node", distro, namespace)
    node.subscribe("words", STRING, SENSOR, lambda message, source: None, lambda told: None)
    writer = node.publisher("action", "std_msgs/msg/Float64MultiArray", COMMAND)
    looking = open_dds("looking", distro)
    seen: queue.Queue[Any] = queue.Queue()
    reader = _graph_reader(looking, seen)
    while True:
        (info,) = seen.get(timeout=PATIENCE_S).node_entities_info_seq
        if (info.node_name, len(info.reader_gid_seq), len(info.writer_gid_seq)) == ("policy_node", 1, 1):
            break
    assert info.node_namespace == told
    assert node.node_name == f"{told.rstrip('/')}/policy_node"
    assert len(info.writer_gid_seq[0].data) == GID_BYTES[looking.messages.distro]
    assert bytes(info.writer_gid_seq[0].data[:16]) == writer.entity.get_guid().bytes
    reader.close()


def _graph_reader(transport: DdsTransport, seen: queue.Queue[Any]) -> Any:
    """Subscribe to ``ros_discovery_info``, which has no ``rt/`` before its name."""
    from cyclonedds.sub import DataReader

    from ros2_bridge.dds import _Reader

    _, topic = transport._topic("ros_discovery_info", GRAPH_TYPE)
    entity = DataReader(transport._participant, topic, transport._qos(GRAPH_TYPE, replace(STATUS, depth=100)))
    reader = _Reader(transport, entity, GRAPH_TYPE, lambda message, source: seen.put(message), lambda told: None)
    transport._readers.append(reader)
    transport._waits.attach(reader.condition)
    transport._wake.set(True)
    return reader


def test_endpoints_have_ros_names_hashes_and_qualities(open_dds: Open, domain: int) -> None:
    """As a ROS 2 node discovers them: topic and type mangled, the hash in the user data, deadline and lease."""
    node = open_dds("policy_node")
    promised = COMMAND.promising(deadline_s=0.2, liveliness_s=1.0)
    node.publisher("action", "std_msgs/msg/Float64MultiArray", promised)
    participant = DomainParticipant(domain)
    reader = BuiltinDataReader(participant, BuiltinTopicDcpsPublication)
    found: dict[str, Any] = {}
    for sample in _until(reader, lambda sample: sample.topic_name == "rt/action"):
        found[sample.topic_name] = sample
    action = found["rt/action"]
    assert action.type_name == "std_msgs::msg::dds_::Float64MultiArray_"
    shown = str(action.qos)
    assert f"typehash={node.messages.type_hash('std_msgs/msg/Float64MultiArray')};" in shown
    assert "deadline=200000000" in shown
    assert "lease_duration=1000000000" in shown
    assert "KeepLast(depth=1)" in shown
    assert "Reliable" in shown


def _until(reader: Any, so: Callable[[Any], bool]) -> list[Any]:
    from cyclonedds.util import duration

    samples = []
    for sample in reader.take_iter(timeout=duration(seconds=PATIENCE_S)):
        samples.append(sample)
        if so(sample):
            return samples
    raise AssertionError("not discovered")


def _counted(transport: DdsTransport, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Keep what the transport hands over from now on, by topic: best effort may lose, and nobody tells what."""
    heard: dict[str, list[Any]] = defaultdict(list)
    subscribe = transport.subscribe

    def keeping(topic: str, type_name: str, profile: Any, on_message: Any, on_malformed: Any) -> Any:
        def hear(message: Any, source: str) -> None:
            on_message(message, source)
            heard[topic].append(message)

        return subscribe(topic, type_name, profile, hear, on_malformed)

    monkeypatch.setattr(transport, "subscribe", keeping)
    return heard


class Hand:
    """A robot's sensors: what the toys' node observes, sent when the test says so."""

    def __init__(self, transport: DdsTransport) -> None:
        self._make, self._clock = transport.make, SystemClock()
        self._joints = transport.publisher("joint_states", "sensor_msgs/msg/JointState", SENSOR)
        self._place = transport.publisher("place", "geometry_msgs/msg/PoseStamped", SENSOR)

    def joints(self) -> None:
        position, names = np.array([0.5, -1.25]), ["shoulder", "elbow"]
        stamped = header(self._make, self._clock.ros_ns())
        self._joints.publish(self._make("sensor_msgs/msg/JointState", header=stamped, name=names, position=position))

    def place(self, x: float, ahead_s: float = 0.0) -> None:
        pose = self._make("geometry_msgs/msg/Pose", position=self._make("geometry_msgs/msg/Point", x=x, y=2.0))
        stamped = header(self._make, self._clock.ros_ns() + round(ahead_s * NS_PER_S))
        self._place.publish(self._make("geometry_msgs/msg/PoseStamped", header=stamped, pose=pose))


def test_a_node_drives_through_a_burst_of_500_hz(open_dds: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """One action per tick, of sound messages only; what best effort loses is lost, and the newest wins."""
    robot, transport = open_dds("robot"), open_dds("policy_node")
    heard = _counted(transport, monkeypatch)
    core = PolicyCore(transport, SystemClock(), loading())
    core.configure(PARAMETERS | {"observation_age_ms": 60_000.0})
    output, intake = core._output, core._intake
    assert isinstance(output, ActionOutput)
    assert intake is not None
    # Deeper than a robot's own: every action that was sent is to be counted, however long this process stands still.
    actions = Inbox(robot, "action", "std_msgs/msg/Float64MultiArray", replace(COMMAND, depth=1000))
    while not output._publisher.entity.get_matched_subscriptions():
        time.sleep(_PAUSE_S)
    hand = Hand(robot)
    core.activate()
    driver = core.driver
    assert driver is not None
    for number in itertools.count():
        hand.joints()
        # Every tenth is of a time to come and of half a place, which would be seen in the actions.
        hand.place(*((0.5, 3600.0) if number % 10 == 9 else (float(number % 100), 0.0)))
        if len(heard["place"]) >= 500 and output.sent >= 10:
            break
        time.sleep(_PAUSE_S)
    for _ in range(round(PATIENCE_S / _PAUSE_S)):
        if intake._channels["place"].values["place"][0] == 1000:
            break
        hand.place(1000.0)
        time.sleep(_PAUSE_S)
    else:
        pytest.fail("the newest does not win")
    core.deactivate()
    counted = driver.counters()
    assert output.sent == counted["executed"] + counted["held"]
    assert output.sent == counted["ticks"] - counted["waited"] - counted["stops"]
    sent = [actions.get().data[0] for _ in range(output.sent)]
    assert actions.messages.empty()
    # Row i of a chunk is the place + 100 i.
    assert [x for x in sent if x % 1] == []
    assert len(set(sent)) > 1
    # With the transport's thread ends what is still on its way.
    transport.close()
    bad = sum(message.pose.position.x == 0.5 for message in heard["place"])
    assert bad > 0
    assert intake.refused == {Refusal.FUTURE: bad}
    assert intake.received == len(heard["joint_states"]) + len(heard["place"])
    core.shutdown()


def test_two_publishers_of_one_topic_are_refused_until_one_is_silent(open_dds: Open) -> None:
    transport = open_dds("policy_node")
    core = PolicyCore(transport, SystemClock(), loading())
    core.configure(PARAMETERS | {"observation_age_ms": 60_000.0})
    intake = core._intake
    assert intake is not None
    kind, clock = "sensor_msgs/msg/JointState", SystemClock()
    robots = [open_dds("robot"), open_dds("intruder")]
    publishers = [each.publisher("joint_states", kind, SENSOR) for each in robots]

    def send(which: int) -> None:
        make = robots[which].make
        position = np.array([float(which), 0.0])
        names = ["shoulder", "elbow"]
        publishers[which].publish(make(kind, header=header(make, clock.ros_ns()), name=names, position=position))

    while "joint_states" in intake.missing:
        send(0)
    while not intake.refused:
        send(1)
    assert set(intake.refused) == {Refusal.SECOND_PUBLISHER}
    assert intake._channels["joint_states"].values["joints"][0] == 0
    core.shutdown()


def test_what_is_closed_leaves_the_topic_and_close_ends_every_thread(open_dds: Open) -> None:
    import threading

    before = threading.active_count()
    robot, node = open_dds("robot"), open_dds("policy_node")
    inbox = Inbox(node, "words")
    publisher = _connected(robot, inbox, "words")
    inbox.handle.close()
    inbox.handle.close()
    publisher.close()
    publisher.publish(_string(robot, "nobody hears this"))
    node.close()
    robot.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("given", ["x", "-1", "233"])
def test_domains_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch, domain: int, given: str) -> None:
    monkeypatch.setitem(os.environ, "ROS_DOMAIN_ID", given)
    with pytest.raises(InvalidInput, match=r"domain|ROS_DOMAIN_ID"):
        DdsTransport()
