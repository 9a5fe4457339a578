"""A transport by the publishers, subscriptions and timers of an rclpy node."""

from __future__ import annotations

import array
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from rclpy.duration import Duration
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import DurabilityPolicy, HistoryPolicy, LivelinessPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message

from ros2_bridge.transport import CONTESTED, Handle, OnMalformed, OnMessage, Profile, Publisher

RclError = rclpy_implementation.RCLError
"""What rcl and the middleware below it refuse."""
_ARRAY_CODES = {"float64": "d", "float32": "f", "uint8": "B", "int8": "b", "uint32": "I", "int32": "i"}


class RclpyTransport:
    """Carries messages by the publishers, subscriptions and timers of an rclpy node.

    Args:
        node: whose they are; its executor runs the callbacks.
    """

    name = "rclpy"

    def __init__(self, node: LifecycleNode) -> None:
        self._node = node

    @property
    def node_name(self) -> str:
        """What ROS calls the node, remapped or not."""
        return str(self._node.get_fully_qualified_name())

    def make(self, type_name: str, **fields: Any) -> Any:
        """Return a message; numpy arrays become ``array.array``, which rclpy takes without looking at each value."""
        message_type = _message_type(type_name)
        kinds = message_type.get_fields_and_field_types()
        return message_type(**{name: _field(value, kinds.get(name)) for name, value in fields.items()})

    def serialize(self, type_name: str, message: Any) -> bytes:
        """Return CDR as rclpy's own type support writes it."""
        return bytes(serialize_message(message))

    def publisher(self, topic: str, type_name: str, profile: Profile) -> Publisher:
        """Open a topic for sending."""
        return _Publisher(self._node, self._node.create_publisher(_message_type(type_name), topic, _qos(profile)))

    def subscribe(
        self, topic: str, type_name: str, profile: Profile, on_message: OnMessage, on_malformed: OnMalformed
    ) -> Handle:
        """Call ``on_message`` from the node's executor; what is malformed, the middleware drops."""
        node = self._node

        def deliver(message: Any) -> None:
            # rclpy does not say whose message it is, only how many publishers there are; and counts them by a name that
            # it does not remap.
            on_message(message, CONTESTED if node.count_publishers(entity.topic_name) > 1 else "")

        entity = node.create_subscription(_message_type(type_name), topic, deliver, _qos(profile))
        return _Closing(node.destroy_subscription, entity)

    def every(self, period_s: float, call: Callable[[], None]) -> Handle:
        """Call this often from the node's executor."""
        return _Closing(self._node.destroy_timer, self._node.create_timer(period_s, call))

    def close(self) -> None:
        """Nothing to do: everything belongs to the node."""


class _Publisher:
    def __init__(self, node: LifecycleNode, entity: Any) -> None:
        self._node, self._entity = node, entity

    def publish(self, message: Any) -> None:
        entity, context = self._entity, self._node.context
        # Others may shut ROS down, and the node must still end in order.
        if entity is None or not context.ok():
            return
        try:
            entity.publish(message)
        except RclError:
            if context.ok():
                raise

    def close(self) -> None:
        if self._entity is not None:
            self._node.destroy_publisher(self._entity)
            self._entity = None


class _Closing:
    """Destroys an entity once."""

    def __init__(self, destroy: Callable[[Any], object], entity: Any) -> None:
        self._destroy, self._entity = destroy, entity

    def close(self) -> None:
        if self._entity is not None:
            self._destroy(self._entity)
            self._entity = None


def _message_type(type_name: str) -> Any:
    package, kind, name = type_name.split("/")
    return getattr(importlib.import_module(f"{package}.{kind}"), name)


def _field(value: Any, kind: str | None) -> Any:
    if isinstance(value, np.ndarray):
        return array.array(_ARRAY_CODES[value.dtype.name], value.tobytes())
    # A byte of a message is bytes in rclpy.
    return bytes([value]) if kind == "octet" else value


def _qos(profile: Profile) -> QoSProfile:
    timed: dict[str, Any] = {}
    if profile.deadline_s is not None:
        timed["deadline"] = Duration(seconds=profile.deadline_s)
    if profile.liveliness_s is not None:
        timed["liveliness"] = LivelinessPolicy.AUTOMATIC
        timed["liveliness_lease_duration"] = Duration(seconds=profile.liveliness_s)
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=profile.depth,
        reliability=ReliabilityPolicy.RELIABLE if profile.reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if profile.latched else DurabilityPolicy.VOLATILE,
        **timed,
    )
