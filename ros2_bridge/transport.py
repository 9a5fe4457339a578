"""The narrow interface between the node and whatever carries its messages.

Message types have their ROS 2 names (``sensor_msgs/msg/JointState``); messages are objects with the fields that the
type has, arrays in anything that ``numpy.asarray`` takes. Topic names are as in ROS 2: ``/absolute``, ``relative`` to
the namespace, ``~/private`` to the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

CONTESTED: Final = "contested"
"""The source of a message where a transport only knows that several publishers are on the topic."""


@dataclass(frozen=True)
class Profile:
    """Quality of service of one endpoint.

    Attributes:
        reliable: resend what was lost; else best effort.
        depth: messages kept.
        latched: whoever subscribes later gets the last message too (transient local).
        deadline_s: a publisher promises a message this often; None promises nothing.
        liveliness_s: a publisher whose process is gone for so long counts as dead; None never does. The middleware
            renews it while the process lives, however silent the publisher is: that, only the deadline tells.
    """

    reliable: bool
    depth: int
    latched: bool = False
    deadline_s: float | None = None
    liveliness_s: float | None = None

    def promising(self, deadline_s: float, liveliness_s: float) -> Profile:
        """Return the same with a deadline and a liveliness lease."""
        return replace(self, deadline_s=deadline_s, liveliness_s=liveliness_s)


# A subscription asks for neither deadline nor liveliness: drivers promise none, and what asks for more than is promised
# is never connected.
SENSOR: Final = Profile(reliable=False, depth=5)
COMMAND: Final = Profile(reliable=True, depth=1)
EVENT: Final = Profile(reliable=True, depth=10)
STATUS: Final = Profile(reliable=True, depth=1, latched=True)

OnMessage = Callable[[Any, str], None]
"""(message, source): ``source`` names the publisher, is ``""`` where it is unknown, or ``CONTESTED``."""

OnMalformed = Callable[[str], None]
"""(sentence): bytes came that are no message of the type."""


class Handle(Protocol):
    """Something that was opened."""

    def close(self) -> None:
        """Give it back; a second call does nothing."""


class Publisher(Handle, Protocol):
    """Sends messages of one type to one topic; any thread may."""

    def publish(self, message: Any) -> None:
        """Send; never waits for a subscriber."""


class Transport(Protocol):
    """Carries messages. Callbacks come from its own thread and must return soon."""

    @property
    def name(self) -> str:
        """``dds``, ``rclpy`` or ``replay``."""

    @property
    def node_name(self) -> str:
        """Fully qualified name of the node: ``/robot1/policy_node``."""

    def make(self, type_name: str, **fields: Any) -> Any:
        """Return a message; fields that are not given have the type's default."""

    def serialize(self, type_name: str, message: Any) -> bytes:
        """Return a message as CDR, little endian, with its header of 4 bytes."""

    def publisher(self, topic: str, type_name: str, profile: Profile) -> Publisher:
        """Open a topic for sending."""

    def subscribe(
        self, topic: str, type_name: str, profile: Profile, on_message: OnMessage, on_malformed: OnMalformed
    ) -> Handle:
        """Call ``on_message`` with every message of a topic until the handle is closed."""

    def every(self, period_s: float, call: Callable[[], None]) -> Handle:
        """Call this often until the handle is closed."""

    def close(self) -> None:
        """End everything that is still open."""
