"""Bags: what is written can be read by others, and a disk that fails stops the recording and nothing else."""

import errno
import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rosbags")

from rosbags.rosbag2 import Reader, Writer

from bac.errors import CorruptArtefact, InvalidInput, MissingArtefact
from ros2_bridge.node_clock import SystemClock
from ros2_bridge.recording import RecordingTransport
from ros2_bridge.replay import ReplayTransport
from ros2_bridge.transport import EVENT
from tests.ros2_bridge.toys import PATIENCE_S, LocalTransport

STRING = "std_msgs/msg/String"


def _recording(folder: Path) -> tuple[LocalTransport, RecordingTransport]:
    inner = LocalTransport()
    return inner, RecordingTransport(inner, folder, SystemClock(), namespace="/robot")


def test_what_comes_and_goes_is_in_the_bag(tmp_path: Path) -> None:
    inner, recording = _recording(tmp_path / "bag")
    got: list[str] = []
    recording.subscribe("words", STRING, EVENT, lambda message, source: got.append(message.data), pytest.fail)
    publisher = recording.publisher("~/answers", STRING, EVENT)
    for number in range(100):
        inner.deliver("words", inner.make(STRING, data=f"word {number}"))
        publisher.publish(inner.make(STRING, data=f"answer {number}"))
    recording.close()
    assert len(got) == len(inner.sent["~/answers"]) == 100
    assert recording.figures == {"recorded": 200, "unrecorded": 0, "recorder_failure": ""}
    read: dict[str, list[str]] = {}
    with Reader(tmp_path / "bag") as reader:
        assert [path.suffix for path in (tmp_path / "bag").glob("bag*")] == [".mcap"]
        for connection, _, data in reader.messages():
            read.setdefault(connection.topic, []).append(inner.types.deserialize(connection.msgtype, data).data)
    assert read == {
        "/robot/words": [f"word {number}" for number in range(100)],
        "/robot/policy_node/answers": [f"answer {number}" for number in range(100)],
    }


def test_a_folder_that_is_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="a new folder"):
        _recording(tmp_path)


_FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import numpy as np
from ros2_bridge.diagnostics import read_diagnostics
from ros2_bridge.node_clock import SystemClock
from ros2_bridge.recording import RecordingTransport
from ros2_bridge.transport import EVENT
from tests.ros2_bridge.test_recording import _recording
from tests.ros2_bridge.toys import Bench, driving
ARRAY = "std_msgs/msg/Float64MultiArray"

def fill_the_disk():
    # The kernel refuses to let any file of this process grow beyond this, as a full disk does.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
"""
_ALONE = """
inner, recording = _recording(Path(sys.argv[1]))
publisher = recording.publisher("words", ARRAY, EVENT)
message = inner.make(ARRAY, data=np.zeros(100_000))
fill_the_disk()
for _ in range(60):
    publisher.publish(message)
recording.close()
print(json.dumps([len(inner.sent["words"]), recording.figures]))
"""


def test_a_full_disk_ends_the_recording_and_every_message_is_counted_once(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    output, _ = start("-c", _FULL_DISK + _ALONE, str(tmp_path / "bag")).communicate(timeout=60)
    sent, figures = json.loads(output.splitlines()[-1])
    assert sent == 60
    assert "recording ended" in figures["recorder_failure"]
    assert figures["unrecorded"] > 0
    assert figures["recorded"] + figures["unrecorded"] == 60


_DRIVING = """
recordings = []

def recorded(inner):
    recordings.append(RecordingTransport(inner, Path(sys.argv[1]), SystemClock()))
    return recordings[0]

node = Bench(wrapped=recorded)
node.transport.types.warm_up(ARRAY)
(recording,) = recordings
# As large as a camera's image, and there is none among the toys.
image = recording.publisher("image", ARRAY, EVENT)
fill_the_disk()
driving(node, replan_ticks=4)

def tick():
    image.publish(node.transport.make(ARRAY, data=np.zeros(100_000)))
    node.tick()

while not recording.figures["recorder_failure"]:
    tick()
before = len(node.actions())
for _ in range(10):
    tick()
moved = node.actions()[before:]
node.core.publish_diagnostics()
told = read_diagnostics(node.transport.sent["/diagnostics"][-1])
driven = node.core.driver.counters()
received = node.core.figures()["received"]
node.core.shutdown()
recording.close()
passed = received + sum(len(sent) for sent in node.transport.sent.values())
print(json.dumps([moved, driven, told, passed, recording.figures]))
"""


def test_a_full_disk_does_not_stop_the_robot_and_is_told_in_diagnostics(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    output, _ = start("-c", _FULL_DISK + _DRIVING, str(tmp_path / "bag")).communicate(timeout=60)
    moved, driven, told, passed, figures = json.loads(output.splitlines()[-1])
    assert len(moved) == 10
    assert driven["held"] == driven["skipped"] == 0
    assert [action[0] % 100 for action in moved] == [7] * 10
    assert told["recorder_failure"] == figures["recorder_failure"]
    assert "recording ended" in told["recorder_failure"]
    # Since then at least an image, two sensors' messages and an action per tick.
    assert int(told["unrecorded"]) >= 4 * 10
    assert figures["recorded"] + figures["unrecorded"] == passed


def test_a_bag_that_cannot_be_closed_is_a_failure_of_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, recording = _recording(tmp_path / "bag")

    def close(writer: Writer) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Writer, "close", close)
    publisher = recording.publisher("words", STRING, EVENT)
    for _ in range(5):
        publisher.publish(inner.make(STRING, data="word"))
    recording.close()
    publisher.publish(inner.make(STRING, data="after the end"))
    assert "No space left" in str(recording.figures["recorder_failure"])
    assert (recording.figures["recorded"], recording.figures["unrecorded"]) == (5, 1)


def test_what_the_disk_is_too_slow_for_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, recording = _recording(tmp_path / "bag")
    writing, go_on, write = threading.Event(), threading.Event(), Writer.write

    def slowly(writer: Writer, connection: Any, when_ns: int, data: bytes) -> None:
        writing.set()
        assert go_on.wait(PATIENCE_S)
        write(writer, connection, when_ns, data)

    monkeypatch.setattr(Writer, "write", slowly)
    publisher = recording.publisher("words", STRING, EVENT)
    publisher.publish(inner.make(STRING, data="the first"))
    assert writing.wait(PATIENCE_S)
    for _ in range(1024 + 10):
        publisher.publish(inner.make(STRING, data="word"))
    go_on.set()
    recording.close()
    assert len(inner.sent["words"]) == 1035
    # One is written, 1024 wait.
    assert recording.figures == {"recorded": 1025, "unrecorded": 10, "recorder_failure": ""}


def test_a_bag_plays_in_order_and_once(tmp_path: Path) -> None:
    inner, recording = _recording(tmp_path / "bag")
    publisher = recording.publisher("/words", STRING, EVENT)
    for number in range(20):
        publisher.publish(inner.make(STRING, data=str(number)))
    recording.close()
    over, got = threading.Event(), []
    replay = ReplayTransport(tmp_path / "bag", over=over.set)

    def hear(message: Any, source: str) -> None:
        got.append(message.data)

    replay.subscribe("words", STRING, EVENT, hear, pytest.fail)
    closed = replay.subscribe("words", STRING, EVENT, hear, pytest.fail)
    closed.close()
    replay.start()
    assert over.wait(30)
    replay.close()
    assert got == [str(number) for number in range(20)]


def test_bags_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefact, match="a bag"):
        ReplayTransport(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    with pytest.raises(CorruptArtefact, match="a bag"):
        ReplayTransport(tmp_path / "other")
    _, recording = _recording(tmp_path / "empty")
    recording.close()
    with pytest.raises(CorruptArtefact, match="messages"):
        ReplayTransport(tmp_path / "empty")
