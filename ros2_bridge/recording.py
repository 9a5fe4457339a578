"""A transport that also writes everything that comes and goes into an MCAP bag, which ``ros2 bag play`` plays.

The disk never holds the loop: messages wait in a queue of bounded length for a thread of their own, and when the disk
is full or the queue too long, messages are left out and counted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.rosbag2.errors import WriterError

from bac.errors import InvalidInput, sentence
from ros2_bridge.distributions import Distribution, absolute_topic
from ros2_bridge.messages import MessageTypes
from ros2_bridge.node_clock import NodeClock
from ros2_bridge.transport import Handle, OnMalformed, OnMessage, Profile, Publisher, Transport

_WAITING = 1024
_POLL_S = 0.2

_log = logging.getLogger(__name__)
_Entry = tuple[str, str, int, Any]


class RecordingTransport:
    """Wraps a transport.

    Args:
        inner: carries the messages.
        folder: of the new bag.
        clock: its ROS time is the time of recording.
        distro: whose message definitions the bag holds.
        node: to resolve ``~/``.
        namespace: to resolve relative topics.

    Raises:
        InvalidInput: the folder exists already, or cannot be made.
    """

    def __init__(
        self,
        inner: Transport,
        folder: Path,
        clock: NodeClock,
        distro: Distribution | str = Distribution.JAZZY,
        node: str = "policy_node",
        namespace: str = "/",
    ) -> None:
        self._inner, self._clock = inner, clock
        self._node, self._namespace = node, namespace
        self._recorder = _Recorder(folder, MessageTypes(distro), inner.serialize)

    @property
    def name(self) -> str:
        """That of the inner one."""
        return self._inner.name

    @property
    def node_name(self) -> str:
        """That of the inner one."""
        return self._inner.node_name

    @property
    def figures(self) -> Mapping[str, object]:
        """Messages given to the bag's writer and left out, each once, and why it failed, for diagnostics.

        The writer collects a mebibyte at a time: of a recording that failed, what it collected last is in no file.
        """
        recorder = self._recorder
        return {"recorded": recorder.written, "unrecorded": recorder.lost, "recorder_failure": recorder.failure}

    def make(self, type_name: str, **fields: Any) -> Any:
        """Return a message."""
        return self._inner.make(type_name, **fields)

    def serialize(self, type_name: str, message: Any) -> bytes:
        """Return CDR."""
        return self._inner.serialize(type_name, message)

    def publisher(self, topic: str, type_name: str, profile: Profile) -> Publisher:
        """Open a topic for sending and recording."""
        return _Recorded(self._inner.publisher(topic, type_name, profile), self._entering(topic, type_name))

    def subscribe(
        self, topic: str, type_name: str, profile: Profile, on_message: OnMessage, on_malformed: OnMalformed
    ) -> Handle:
        """Listen and record; bytes that are no message are not recorded."""
        enter = self._entering(topic, type_name)

        def record(message: Any, source: str) -> None:
            enter(message)
            on_message(message, source)

        return self._inner.subscribe(topic, type_name, profile, record, on_malformed)

    def every(self, period_s: float, call: Callable[[], None]) -> Handle:
        """Call this often."""
        return self._inner.every(period_s, call)

    def close(self) -> None:
        """Close the inner one, write what waits, close the bag."""
        self._inner.close()
        self._recorder.close()

    def _entering(self, topic: str, type_name: str) -> Callable[[Any], None]:
        name = absolute_topic(topic, self._namespace, self._node)
        return lambda message: self._recorder.put((name, type_name, self._clock.ros_ns(), message))


class _Recorded:
    """A publisher whose messages are recorded."""

    def __init__(self, inner: Publisher, enter: Callable[[Any], None]) -> None:
        self._inner, self._enter = inner, enter

    def publish(self, message: Any) -> None:
        self._inner.publish(message)
        self._enter(message)

    def close(self) -> None:
        self._inner.close()


class _Recorder:
    """The thread that writes."""

    def __init__(self, folder: Path, types: MessageTypes, serialize: Callable[[str, Any], bytes]) -> None:
        self._types, self._serialize = types, serialize
        try:
            self._writer = Writer(folder, version=Writer.VERSION_LATEST, storage_plugin=StoragePlugin.MCAP)
            self._writer.open()
        except (OSError, WriterError) as error:
            raise InvalidInput(
                sentence("record", expected=f"a new folder {folder}", got=error, mend="choose another")
            ) from error
        self._connections: dict[tuple[str, str], Any] = {}
        self._waiting: Queue[_Entry] = Queue(_WAITING)
        self._over = threading.Event()
        # So that a message either waits for the thread or is counted as left out, whenever that ends.
        self._counting = threading.Lock()
        self._ended = False
        self.written, self.lost, self.failure = 0, 0, ""
        self._thread = threading.Thread(target=self._run, name="ros2-bridge-recorder", daemon=True)
        self._thread.start()

    def put(self, entry: _Entry) -> None:
        with self._counting:
            if self._ended or self._waiting.full():
                self.lost += 1
            else:
                self._waiting.put_nowait(entry)

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self.failure:
            try:
                entry = self._waiting.get(timeout=_POLL_S)
            except Empty:
                if self._over.is_set():
                    break
                continue
            self._attempt(partial(self._write, entry))
        with self._counting:
            self._ended = True
            # What waits, and the message that could not be written.
            self.lost += self._waiting.qsize() + bool(self.failure)
        if not self.failure:
            self._attempt(self._writer.close)
        if self.failure:
            self._abandon()

    def _write(self, entry: _Entry) -> None:
        topic, type_name, when_ns, message = entry
        if (topic, type_name) not in self._connections:
            connection = self._writer.add_connection(topic, type_name, typestore=self._types.store)
            self._connections[topic, type_name] = connection
        self._writer.write(self._connections[topic, type_name], when_ns, self._serialize(type_name, message))
        self.written += 1

    def _attempt(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self.failure = f"recording ended: {error}"
            _log.error("%s", self.failure)

    def _abandon(self) -> None:
        """Close the file as it is; a full disk may refuse even that."""
        try:
            self._writer.abort()
        except OSError as error:
            _log.error("the bag was not closed: %s", error)
