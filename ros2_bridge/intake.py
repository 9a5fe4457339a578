"""What came in: the newest value of every observation key, with its age, and a count of all that was refused."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bac.control.clock import NS_PER_MS
from bac.errors import sentence
from ros2_bridge.conversion import Refusal, RefusedMessage, stamp_ns
from ros2_bridge.mapping import KeySource, Shape
from ros2_bridge.node_clock import NodeClock, loop_ns
from ros2_bridge.transport import CONTESTED


@dataclass(frozen=True)
class Frame:
    """One observation of all keys.

    Attributes:
        values: key -> float32[channels] or uint8[height, width, 3].
        stamp_ns: when the oldest of them was sensed, on the loop's clock.
    """

    values: Mapping[str, np.ndarray]
    stamp_ns: int


class Intake:
    """Takes messages from a transport's threads, gives frames to the loop.

    Args:
        sources: where the keys come from.
        observation: key -> shape.
        clock: for arrival and age.
        silence_ms: a publisher that was silent for so long may be replaced by another; before, only one may talk.
        ahead_ms: how far in the future a stamp may lie, for clocks of two computers never agree.
    """

    def __init__(
        self,
        sources: Sequence[KeySource],
        observation: Mapping[str, Shape],
        clock: NodeClock,
        *,
        silence_ms: float,
        ahead_ms: float,
    ) -> None:
        self._observation, self._clock = dict(observation), clock
        self._silence_ns, self._ahead_ns = silence_ms * NS_PER_MS, ahead_ms * NS_PER_MS
        self._channels = {topic: _Channel(topic) for topic in dict.fromkeys(each.topic for each in sources)}
        for source in sources:
            self._channels[source.topic].sources.append(source)
        self._changed = threading.Condition()
        self._seen: tuple[int, ...] = ()
        self._epoch = 0
        self.refused: Counter[Refusal] = Counter()
        self.received = 0
        self.last_refusal = ""

    @property
    def topics(self) -> Mapping[str, str]:
        """Topic -> message type."""
        return {topic: channel.sources[0].type_name for topic, channel in self._channels.items()}

    @property
    def missing(self) -> list[str]:
        """Topics that gave nothing yet."""
        return [topic for topic, channel in self._channels.items() if not channel.values]

    def receive(self, topic: str, message: Any, source: str) -> None:
        """Take a message, or refuse and count it, whatever is in it; for one thread per topic."""
        channel, epoch = self._channels[topic], self._epoch
        arrived_ns = self._clock.now_ns()
        try:
            when_ns = self._admit(channel, message, source, arrived_ns)
            # Without the lock, for the loop must not wait for a picture to be decoded.
            values = {each.key: _read(each, message, self._observation[each.key]) for each in channel.sources}
        except RefusedMessage as refusal:
            self._refuse(refusal.kind, f"{topic}: {refusal}")
            return
        # On the loop's clock once, at arrival: a date that is set later must not change an age.
        sensed_ns = min(loop_ns(self._clock, when_ns), self._clock.now_ns())
        with self._changed:
            self.received += 1
            if epoch == self._epoch:
                channel.values, channel.stamp_ns, channel.source, channel.heard_ns = values, when_ns, source, arrived_ns
                channel.loop_ns = max(channel.loop_ns, sensed_ns)
                self._changed.notify_all()

    def malformed(self, topic: str, told: str) -> None:
        """Count bytes that were no message."""
        self._refuse(Refusal.MALFORMED, f"{topic}: {told}")

    def frame(self) -> Frame | None:
        """Return the newest frame if any of it is newer than the last that was returned."""
        with self._changed:
            channels = list(self._channels.values())
            stamps = tuple(channel.stamp_ns for channel in channels)
            if stamps == self._seen or not all(channel.values for channel in channels):
                return None
            self._seen = stamps
            values = {key: value for channel in channels for key, value in channel.values.items()}
            return Frame({key: values[key] for key in self._observation}, min(each.loop_ns for each in channels))

    def wait_complete(self, given_up: threading.Event) -> bool:
        """Wait until every topic gave something; return False if given up before, and ``wake`` called."""
        with self._changed:
            self._changed.wait_for(lambda: given_up.is_set() or not self.missing)
            return not given_up.is_set()

    def wake(self) -> None:
        """Let ``wait_complete`` look whether it was given up."""
        with self._changed:
            self._changed.notify_all()

    def clear(self) -> None:
        """Forget values, stamps and publishers, not the counts."""
        with self._changed:
            for channel in self._channels.values():
                channel.forget()
            self._seen = ()
            self._epoch += 1

    def _admit(self, channel: _Channel, message: Any, source: str, arrived_ns: int) -> int:
        """Return when a message was sensed, ROS time, if it is the publisher's turn and the stamp's."""
        self._require_one_publisher(channel, source, arrived_ns)
        ros_ns = self._clock.ros_ns()
        sensed = stamp_ns(message)
        when_ns = ros_ns if sensed is None else sensed
        if when_ns < channel.stamp_ns:
            back_ms = (channel.stamp_ns - when_ns) / NS_PER_MS
            raise _refusal(Refusal.BACKWARDS, "a stamp not before the last", f"{back_ms:.3f} ms before it")
        if when_ns > ros_ns + self._ahead_ns:
            ahead_ms = (when_ns - ros_ns) / NS_PER_MS
            raise _refusal(Refusal.FUTURE, "a stamp that is past", f"{ahead_ms:.3f} ms ahead")
        return when_ns

    def _require_one_publisher(self, channel: _Channel, source: str, now_ns: int) -> None:
        quiet = now_ns - channel.heard_ns > self._silence_ns
        if source == CONTESTED or (channel.values and source != channel.source and not quiet):
            raise _refusal(Refusal.SECOND_PUBLISHER, "one publisher", "another one beside it")

    def _refuse(self, kind: Refusal, told: str) -> None:
        with self._changed:
            self.received += 1
            self.refused[kind] += 1
            self.last_refusal = told


class _Channel:
    """One topic: the keys it gives and what it gave last."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.sources: list[KeySource] = []
        self.forget()

    def forget(self) -> None:
        self.values: dict[str, np.ndarray] = {}
        self.stamp_ns = -1
        self.loop_ns = -(2**63)
        self.source = ""
        self.heard_ns = -(2**63)


def _read(source: KeySource, message: Any, shape: Shape) -> np.ndarray:
    try:
        return source.read(message, shape)
    except RefusedMessage:
        raise
    # No message may end the thread that hands messages over, which the whole node listens by.
    except Exception as error:
        got = f"{type(error).__name__} {error}"
        told = sentence(source.type_name, expected="fields that can be read", got=got, mend="fix its publisher")
        raise RefusedMessage(Refusal.MALFORMED, told) from error


def _refusal(kind: Refusal, expected: str, got: str) -> RefusedMessage:
    return RefusedMessage(kind, sentence("message", expected=expected, got=got, mend="check its publishers and clocks"))
