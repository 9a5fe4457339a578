"""What the node tells about itself: latched status, and diagnostics once a second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from ros2_bridge.conversion import Make, header


class Level(IntEnum):
    """Levels of ``diagnostic_msgs/DiagnosticStatus``."""

    OK = 0
    WARN = 1
    ERROR = 2
    STALE = 3


def diagnostics_message(
    make: Make, when_ns: int, name: str, device: str, level: Level, told: str, values: Mapping[str, object]
) -> Any:
    """Return a ``diagnostic_msgs/DiagnosticArray`` with one status."""
    pairs = [make("diagnostic_msgs/msg/KeyValue", key=key, value=_shown(value)) for key, value in values.items()]
    status = make(
        "diagnostic_msgs/msg/DiagnosticStatus",
        level=int(level),
        name=name,
        message=told,
        hardware_id=device,
        values=pairs,
    )
    return make("diagnostic_msgs/msg/DiagnosticArray", header=header(make, when_ns), status=[status])


def status_message(make: Make, values: Mapping[str, object]) -> Any:
    """Return a ``std_msgs/String`` with a JSON object."""
    return make("std_msgs/msg/String", data=json.dumps(values))


def read_diagnostics(message: Any) -> dict[str, str]:
    """Return key -> value of the first status, with its ``level`` and ``message``."""
    status = message.status[0]
    # rclpy has a byte as bytes, rosbags as a number.
    level = status.level[0] if isinstance(status.level, bytes) else int(status.level)
    told = {each.key: each.value for each in status.values}
    return told | {"level": Level(level).name, "message": status.message}


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
