"""Bags: what is written can be read by others, and a disk that fails stops the recording and nothing else."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rosbags")

from rosbags.rosbag2 import Reader

from bac.errors import CorruptArtefact, InvalidInput, MissingArtefact
from ros2_bridge.node_clock import SystemClock
from ros2_bridge.recording import RecordingTransport
from ros2_bridge.replay import ReplayTransport
from ros2_bridge.transport import EVENT
from tests.ros2_bridge.toys import LocalTransport

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


FULL = """
import json, resource, signal, sys
from pathlib import Path
import numpy as np
from ros2_bridge.transport import EVENT
from tests.ros2_bridge.test_recording import _recording
inner, recording = _recording(Path(sys.argv[1]))
publisher = recording.publisher("words", "std_msgs/msg/Float64MultiArray", EVENT)
message = inner.make("std_msgs/msg/Float64MultiArray", data=np.zeros(100_000))
# The kernel refuses to let any file of this process grow beyond this, as a full disk does.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
for _ in range(60):
    publisher.publish(message)
recording.close()
print(json.dumps([len(inner.sent["words"]), recording.figures]))
"""


def test_a_full_disk_ends_the_recording_and_nothing_else(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    output, _ = start("-c", FULL, str(tmp_path / "bag")).communicate(timeout=60)
    sent, figures = json.loads(output.splitlines()[-1])
    assert sent == 60
    assert "recording ended" in figures["recorder_failure"]
    assert figures["recorded"] + figures["unrecorded"] >= 60
    assert figures["unrecorded"] > 0


def test_a_bag_plays_in_order_and_once(tmp_path: Path) -> None:
    inner, recording = _recording(tmp_path / "bag")
    publisher = recording.publisher("/words", STRING, EVENT)
    for number in range(20):
        publisher.publish(inner.make(STRING, data=str(number)))
    recording.close()
    import threading

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
