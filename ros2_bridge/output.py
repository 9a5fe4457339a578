"""What the node sends to the robot: each action as it is due, or each chunk as a trajectory."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from bac.control import Command, CommandKind, ControlLoop
from ros2_bridge.conversion import action_message, trajectory_message
from ros2_bridge.node_clock import NodeClock
from ros2_bridge.settings import NodeSettings
from ros2_bridge.transport import COMMAND, Publisher, Transport

_LEASE_S = 1.0
"""Silence after which a subscriber may hold the node for dead."""

_LONGEST_CHUNK = 64


class Output(Protocol):
    """Sends commands."""

    sent: int

    def send(self, command: Command, loop: ControlLoop) -> None:
        """Send what a tick's command needs, if anything."""

    def close(self) -> None:
        """Give the topic back."""


def open_output(settings: NodeSettings, transport: Transport, clock: NodeClock) -> Output:
    """Open the output that the parameters ask for."""
    return (TrajectoryOutput if settings.values["output"] == "trajectory" else ActionOutput)(settings, transport, clock)


class ActionOutput:
    """Every tick's action as ``std_msgs/Float64MultiArray``."""

    def __init__(self, settings: NodeSettings, transport: Transport, clock: NodeClock) -> None:
        self._transport, self._silent = transport, settings.values["hold"] == "silent"
        self.sent = 0
        self._publisher = _open(settings, transport, "std_msgs/msg/Float64MultiArray")

    def send(self, command: Command, loop: ControlLoop) -> None:
        """Send the action to execute or to hold."""
        if command.action is None or (self._silent and command.kind is CommandKind.HOLD):
            return
        self._publisher.publish(action_message(self._transport.make, command.action))
        self.sent += 1

    def close(self) -> None:
        """Give the topic back."""
        self._publisher.close()


class TrajectoryOutput:
    """Every chunk, from the action that is due now, as ``trajectory_msgs/JointTrajectory``.

    Where no action is due any more, a trajectory of one point, the last action, ends the motion.
    """

    def __init__(self, settings: NodeSettings, transport: Transport, clock: NodeClock) -> None:
        self._transport, self._clock = transport, clock
        self._names, self._silent = settings.values["action_names"], settings.values["hold"] == "silent"
        self.sent = 0
        self._last: tuple[CommandKind, int | None] | None = None
        self._publisher = _open(settings, transport, "trajectory_msgs/msg/JointTrajectory")

    def send(self, command: Command, loop: ControlLoop) -> None:
        """Send a trajectory where a chunk begins or motion ends."""
        now = (command.kind, command.chunk)
        changed, self._last = now != self._last, now
        if not changed or command.action is None or (self._silent and command.kind is CommandKind.HOLD):
            return
        actions = [command.action]
        if command.kind is CommandKind.EXECUTE:
            actions += list(loop.ahead(_LONGEST_CHUNK))
        make, period_ns = self._transport.make, float(loop.grid.period_ns)
        self._publisher.publish(
            trajectory_message(make, self._names, np.array(actions), period_ns, self._clock.ros_ns())
        )
        self.sent += 1

    def close(self) -> None:
        """Give the topic back."""
        self._publisher.close()


def _open(settings: NodeSettings, transport: Transport, type_name: str) -> Publisher:
    period_s = 1 / settings.values["rate_hz"]
    # A chunk is republished only every few ticks.
    ticks = settings.values["replan_ticks"] or _LONGEST_CHUNK if type_name.endswith("JointTrajectory") else 2
    profile = COMMAND.promising(deadline_s=ticks * period_s, liveliness_s=max(_LEASE_S, 2 * period_s))
    return transport.publisher(settings.values["action_topic"], type_name, profile)
