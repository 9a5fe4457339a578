"""The node without ROS: services are topics, and it configures and activates itself.

Requests of DDS services are framed differently by ROS 2's middlewares, so there are topics instead: ``~/reset``
(std_msgs/Empty), ``~/set_cache`` (std_msgs/String) and ``~/enable`` (std_msgs/Bool). ``~/status`` tells the outcome.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from bac.errors import BacError
from ros2_bridge.core import NodeState, PolicyCore
from ros2_bridge.transport import EVENT, Transport

_log = logging.getLogger(__name__)


class StandaloneNode:
    """A core and its control topics.

    Args:
        core: the node.
        transport: the core's.
    """

    def __init__(self, core: PolicyCore, transport: Transport) -> None:
        self.core = core
        verbs: Mapping[str, tuple[str, Callable[[Any], object]]] = {
            "~/reset": ("std_msgs/msg/Empty", lambda message: core.reset()),
            "~/set_cache": ("std_msgs/msg/String", lambda message: core.set_cache(message.data)),
            "~/enable": ("std_msgs/msg/Bool", lambda message: self.enable(message.data)),
        }
        self._handles = [
            transport.subscribe(topic, type_name, EVENT, self._obeying(topic, verb), _ignore)
            for topic, (type_name, verb) in verbs.items()
        ]

    def enable(self, on: bool) -> None:
        """Activate or deactivate; nothing if it is so already."""
        if on and self.core.state is NodeState.INACTIVE:
            self.core.activate()
        elif not on and self.core.state is NodeState.ACTIVE:
            self.core.deactivate()

    def close(self) -> None:
        """Shut the node down."""
        for handle in self._handles:
            handle.close()
        self.core.shutdown()

    def _obeying(self, topic: str, verb: Callable[[Any], object]) -> Callable[[Any, str], None]:
        def obey(message: Any, source: str) -> None:
            try:
                verb(message)
            except BacError as refusal:
                _log.error("%s: %s", topic, refusal)
                self.core.refuse_request(f"{topic}: {refusal}")

        return obey


def _ignore(told: str) -> None:
    _log.error("%s", told)
