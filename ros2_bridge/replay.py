"""A bag as the robot: its messages come at the pace of their recording, and what the node sends goes nowhere.

ROS time is the bag's, so that observations are as old as they were.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rosbags.rosbag2 import Reader
from rosbags.rosbag2.errors import ReaderError

from bac.errors import CorruptArtefact, MissingArtefact, sentence
from ros2_bridge.distributions import Distribution, absolute_name, absolute_topic
from ros2_bridge.messages import MalformedMessage, MessageTypes
from ros2_bridge.node_clock import SystemClock
from ros2_bridge.timer import Timer
from ros2_bridge.transport import Handle, OnMalformed, OnMessage, Profile, Publisher


class ReplayTransport:
    """Plays a bag once, from ``start`` on.

    Args:
        folder: of the bag, MCAP or SQLite.
        node: the node's name.
        namespace: of the node.
        distro: whose message types.
        over: called after the last message.

    Raises:
        MissingArtefact: no such bag.
        CorruptArtefact: it cannot be read, or is empty.
    """

    name = "replay"

    def __init__(
        self,
        folder: Path,
        node: str = "policy_node",
        namespace: str = "/",
        distro: Distribution | str = Distribution.JAZZY,
        over: Callable[[], None] = lambda: None,
    ) -> None:
        if not folder.exists():
            raise MissingArtefact(sentence("replay", expected=f"a bag {folder}", got="none", mend="check the path"))
        self._node, self._namespace, self._over = node, namespace, over
        self.node_name = absolute_name(node, namespace)
        self.messages = MessageTypes(distro)
        self._lock = threading.Lock()
        self._listeners: dict[str, list[tuple[str, OnMessage, OnMalformed]]] = defaultdict(list)
        self._timers: list[Timer] = []
        self._stopped = threading.Event()
        try:
            self._reader = Reader(folder)
            self._reader.open()
        except (ReaderError, OSError) as error:
            told = sentence(f"bag {folder}", expected="a bag", got=error, mend="record again")
            raise CorruptArtefact(told) from error
        if not self._reader.message_count:
            raise CorruptArtefact(sentence(f"bag {folder}", expected="messages", got="none", mend="record again"))
        self.clock = SystemClock()
        self.clock.set_ros_ns(self._reader.start_time)
        self._thread = threading.Thread(target=self._play, name="ros2-bridge-replay", daemon=True)

    def make(self, type_name: str, **fields: Any) -> Any:
        """Return a message."""
        return self.messages.make(type_name, **fields)

    def serialize(self, type_name: str, message: Any) -> bytes:
        """Return CDR."""
        return self.messages.serialize(type_name, message)

    def publisher(self, topic: str, type_name: str, profile: Profile) -> Publisher:
        """Return what sends nowhere: the robot of the bag has moved already."""
        return _Nowhere()

    def subscribe(
        self, topic: str, type_name: str, profile: Profile, on_message: OnMessage, on_malformed: OnMalformed
    ) -> Handle:
        """Listen to a topic of the bag; commands to the node itself are not replayed."""
        name, listener = absolute_topic(topic, self._namespace, self._node), (type_name, on_message, on_malformed)
        with self._lock:
            if not topic.startswith("~"):
                self._listeners[name].append(listener)
        return _Removing(self._listeners[name], listener)

    def every(self, period_s: float, call: Callable[[], None]) -> Handle:
        """Call this often."""
        timer = Timer(period_s, call)
        self._timers.append(timer)
        return timer

    def start(self) -> None:
        """Begin to play; the node is active now."""
        # Loading took time in which no bag played.
        self.clock.set_ros_ns(self._reader.start_time)
        self._thread.start()

    def close(self) -> None:
        """Stop playing."""
        self._stopped.set()
        for timer in self._timers:
            timer.close()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        if self._reader.is_open:
            self._reader.close()

    def _play(self) -> None:
        for connection, when_ns, data in self._reader.messages():
            wait_ns = when_ns - self.clock.ros_ns()
            if self._stopped.wait(max(wait_ns, 0) / 1e9):
                return
            with self._lock:
                listeners = list(self._listeners.get(connection.topic, ()))
            for type_name, on_message, on_malformed in listeners:
                self._deliver(type_name, data, on_message, on_malformed)
        self._over()

    def _deliver(self, type_name: str, data: bytes, on_message: OnMessage, on_malformed: OnMalformed) -> None:
        try:
            message = self.messages.deserialize(type_name, data)
        except MalformedMessage as refusal:
            on_malformed(str(refusal))
        else:
            on_message(message, "bag")


class _Nowhere:
    def publish(self, message: Any) -> None:
        """Drop it."""

    def close(self) -> None:
        """Nothing to give back."""


class _Removing:
    def __init__(self, listeners: list[Any], listener: Any) -> None:
        self._listeners, self._listener = listeners, listener

    def close(self) -> None:
        if self._listener in self._listeners:
            self._listeners.remove(self._listener)
