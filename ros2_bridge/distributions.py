"""What differs between ROS 2 distributions on the wire, how names become DDS names, and which domains there are."""

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


LARGEST_DOMAIN = 232
"""Beyond it the ports of DDS are no ports."""


def require_domain(number: int) -> int:
    """Return the number of a DDS domain.

    Raises:
        InvalidInput: there is no such domain.
    """
    if not 0 <= number <= LARGEST_DOMAIN:
        raise InvalidInput(
            sentence("DDS domain", expected=f"0 to {LARGEST_DOMAIN}", got=number, mend="correct ROS_DOMAIN_ID")
        )
    return number


def absolute_namespace(namespace: str) -> str:
    """Return a namespace as ROS 2 has it: ``robot1`` and ``/robot1/`` are ``/robot1``, and none is ``/``."""
    return "/" + namespace.strip("/")


def absolute_name(node: str, namespace: str) -> str:
    """Return the fully qualified name of a node: ``/robot1/policy_node``."""
    return f"{absolute_namespace(namespace).rstrip('/')}/{node}"


def absolute_topic(topic: str, namespace: str, node: str) -> str:
    """Resolve a topic name as ROS 2 does.

    Args:
        topic: ``/absolute``, ``relative``, or ``~/private``.
        namespace: of the node, in any form that ``absolute_namespace`` takes.
        node: its name.

    Raises:
        InvalidInput: no such name can exist.
    """
    if topic.startswith("~/"):
        topic = f"{absolute_name(node, namespace)}/{topic[2:]}"
    elif not topic.startswith("/"):
        topic = absolute_name(topic, namespace)
    words = topic[1:].split("/")
    if not all(word.replace("_", "a").isalnum() and word.isascii() and not word[0].isdigit() for word in words):
        raise InvalidInput(
            sentence("topic", expected="words of letters, digits and _, joined by /", got=topic, mend="rename it")
        )
    return topic
