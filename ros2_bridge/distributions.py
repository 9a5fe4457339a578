"""What differs between ROS 2 distributions on the wire, and how names become DDS names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from bac.choices import Choice
from bac.errors import InvalidInput, sentence


class Distribution(Choice):
    """Distributions whose wire format is known here."""

    HUMBLE = "humble"
    JAZZY = "jazzy"
    KILTED = "kilted"


GID_BYTES: Mapping[Distribution, int] = MappingProxyType(
    {Distribution.HUMBLE: 24, Distribution.JAZZY: 16, Distribution.KILTED: 16}
)
"""Of an endpoint's id in the graph. The wrong size hides the node, and a Humble node that reads it logs errors."""


def dds_type(type_name: str) -> str:
    """Return the DDS name of a message type: ``std_msgs/msg/String`` is ``std_msgs::msg::dds_::String_``.

    Raises:
        InvalidInput: the name has another form.
    """
    parts = type_name.split("/")
    if len(parts) != 3 or not all(parts):
        raise InvalidInput(
            sentence("message type", expected="package/msg/Type", got=type_name, mend="write it in full")
        )
    package, kind, name = parts
    return f"{package}::{kind}::dds_::{name}_"


def dds_topic(topic: str) -> str:
    """Return the DDS name of an absolute topic: ``/joint_states`` is ``rt/joint_states``."""
    return f"rt{topic}"


def absolute_topic(topic: str, namespace: str, node: str) -> str:
    """Resolve a topic name as ROS 2 does.

    Args:
        topic: ``/absolute``, ``relative``, or ``~/private``.
        namespace: of the node, ``/`` or ``/robot1``.
        node: its name.

    Raises:
        InvalidInput: no such name can exist.
    """
    root = namespace.rstrip("/")
    if topic.startswith("~/"):
        topic = f"{root}/{node}/{topic[2:]}"
    elif not topic.startswith("/"):
        topic = f"{root}/{topic}"
    words = topic[1:].split("/")
    if not all(word.replace("_", "a").isalnum() and word.isascii() and not word[0].isdigit() for word in words):
        raise InvalidInput(
            sentence("topic", expected="words of letters, digits and _, joined by /", got=topic, mend="rename it")
        )
    return topic
