"""Message classes as strict as those that ROS generates for rclpy: they refuse what their fields are not."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
from rosbags.interfaces import Nodetype

from ros2_bridge.messages import MessageTypes

_TYPES = MessageTypes("jazzy")
_CODES = {"float64": "d", "float32": "f", "uint8": "B", "int8": "b", "int32": "i", "uint32": "I"}
_NAMES = {"float64": "double", "float32": "float", "byte": "octet", "bool": "boolean"}


def _message_type(type_name: str) -> Any:
    """Return a message class as strict as rclpy's generated ones."""
    fields = _TYPES.fields[type_name][1]

    def __init__(self: Any, **given: Any) -> None:  # noqa: N807 - of the class below
        assert given.keys() <= {name for name, _ in fields}, f"{type_name} has no {given.keys()}"
        for name, kind in fields:
            value = given.get(name, _default(kind))
            assert _fits(kind, value), f"{type_name}.{name} takes no {value!r}"
            setattr(self, name, value)

    def names(cls: Any) -> dict[str, str]:
        return {name: _written(kind) for name, kind in fields}

    body = {"__init__": __init__, "get_fields_and_field_types": classmethod(names), "type_name": type_name}
    return type(type_name.rsplit("/", 1)[-1], (), body)


def _default(kind: Any) -> Any:
    match kind:
        case (Nodetype.NAME, name):
            return MESSAGES[name]()
        case (Nodetype.BASE, ("string", _)):
            return ""
        case (Nodetype.BASE, ("byte", _)):
            return b"\0"
        case (Nodetype.BASE, (base, _)):
            return {"bool": False}.get(base, 0.0 if base.startswith("float") else 0)
        case (_, ((Nodetype.BASE, (base, _)), _)) if base in _CODES:
            return array.array(_CODES[base])
        case _:
            return []


def _fits(kind: Any, value: Any) -> bool:
    match kind:
        case (Nodetype.NAME, name):
            return isinstance(value, MESSAGES[name])
        case (Nodetype.BASE, ("string", _)):
            return isinstance(value, str)
        case (Nodetype.BASE, ("byte", _)):
            return isinstance(value, bytes) and len(value) == 1
        case (Nodetype.BASE, (base, _)):
            wanted = {"bool": bool}.get(base, float if base.startswith("float") else int)
            return isinstance(value, wanted) and (base != "uint32" or 0 <= value < 2**32)
        case (_, ((Nodetype.BASE, (base, _)), _)) if base in _CODES:
            # The fast way in: anything else is looked at value by value, 50 ms for an image.
            return isinstance(value, array.array) and value.typecode == _CODES[base]
        case (_, (inner, _)):
            return isinstance(value, list) and all(_fits(inner, each) for each in value)
        case _:
            return False


def _written(kind: Any) -> str:
    match kind:
        case (Nodetype.BASE, (base, _)):
            return _NAMES.get(base, base)
        case (Nodetype.NAME, name):
            return name.replace("/msg/", "/")
        case (_, (inner, _)):
            return f"sequence<{_written(inner)}>"
        case _:
            raise AssertionError(kind)


_PACKAGES = (
    "builtin_interfaces",
    "std_msgs",
    "geometry_msgs",
    "sensor_msgs",
    "trajectory_msgs",
    "diagnostic_msgs",
    "rosgraph_msgs",
)
MESSAGES = {name: _message_type(name) for name in _TYPES.fields if name.split("/")[0] in _PACKAGES}


def to_rclpy(message: Any) -> Any:
    """Return a message of rosbags as the middleware would hand it to rclpy."""
    made = {}
    for name, kind in _TYPES.fields[message.__msgtype__][1]:
        value = getattr(message, name)
        if hasattr(value, "__msgtype__"):
            value = to_rclpy(value)
        elif isinstance(value, np.ndarray):
            value = array.array(_CODES[value.dtype.name], value.tobytes())
        elif isinstance(value, list):
            value = [to_rclpy(each) if hasattr(each, "__msgtype__") else each for each in value]
        elif _written(kind) == "octet":
            value = bytes([value])
        made[name] = value
    return MESSAGES[message.__msgtype__](**made)
