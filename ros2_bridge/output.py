"""What the node sends to the robot: each action as it is due, or each chunk as a trajectory."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from bac.control import Command, CommandKind, ControlLoop
from bac.control.clock import NS_PER_S
from ros2_bridge.conversion import action_message, trajectory_message
from ros2_bridge.node_clock import NodeClock
from ros2_bridge.settings import NodeSettings
from ros2_bridge.transport import COMMAND, Publisher, Transport

_LEASE_S = 1.0
"""Of liveliness, which is the process's: the middleware renews it whatever the loop does, so only the deadline tells of
a loop that is silent."""

_LONGEST_CHUNK = 64


class Output(Protocol):
    """Sends commands."""

    sent: int

    def send(self, command: Command, loop: ControlLoop) -> None:
        """Send what a tick's command needs, if anything."""

    def rest(self) -> None:
        """Send what ends the motion, if what was sent would go on by itself; the next tick is another loop's."""

    def close(self) -> None:
        """Give the topic back."""


def open_output(settings: NodeSettings, transport: Transport, clock: NodeClock, chunk_ticks: int) -> Output:
    """Open the output that the parameters ask for.

    Args:
        settings: parameters.
        transport: carries the messages.
        clock: stamps trajectories.
        chunk_ticks: ticks from a chunk to the next at the latest.
    """
    if settings.values["output"] == "trajectory":
        return TrajectoryOutput(settings, transport, clock, chunk_ticks)
    return ActionOutput(settings, transport)


class ActionOutput:
    """Every tick's action as ``std_msgs/Float64MultiArray``; zeros at the end where they are what holds the robot."""

    def __init__(self, settings: NodeSettings, transport: Transport) -> None:
        self._transport, self._hold = transport, settings.values["hold"]
        self.sent = 0
        self._last: np.ndarray | None = None
        # An action per tick, of which one may be late.
        self._publisher = _open(settings, transport, "std_msgs/msg/Float64MultiArray", ticks=2)

    def send(self, command: Command, loop: ControlLoop) -> None:
        """Send the action to execute or to hold."""
        if command.action is None or (self._hold == "silent" and command.kind is CommandKind.HOLD):
            return
        self._publish(command.action)

    def rest(self) -> None:
        """Send zeros if they hold the robot and were not sent last: a velocity stays in force, a position is a rest."""
        if self._hold == "zero" and self._last is not None and self._last.any():
            self._publish(np.zeros_like(self._last))

    def close(self) -> None:
        """Give the topic back."""
        self._publisher.close()

    def _publish(self, action: np.ndarray) -> None:
        self._last = action
        self._publisher.publish(action_message(self._transport.make, action))
        self.sent += 1


class TrajectoryOutput:
    """Every chunk, from the action that is due now, as ``trajectory_msgs/JointTrajectory``.

    A trajectory of one point, the last action, ends the motion where no action is due any more; with ``hold: silent``
    only where points that were sent are still to come, for the robot would go on through them.
    """

    def __init__(self, settings: NodeSettings, transport: Transport, clock: NodeClock, chunk_ticks: int) -> None:
        self._transport, self._clock = transport, clock
        self._names, self._silent = settings.values["action_names"], settings.values["hold"] == "silent"
        self._period_ns = NS_PER_S / settings.values["rate_hz"]
        self.sent = 0
        self._told: tuple[CommandKind, int | None] | None = None
        self._at: np.ndarray | None = None
        self._to_come = 0
        self._publisher = _open(settings, transport, "trajectory_msgs/msg/JointTrajectory", chunk_ticks)

    def send(self, command: Command, loop: ControlLoop) -> None:
        """Send a trajectory where a chunk begins or motion ends."""
        now = (command.kind, command.chunk)
        changed, self._told = now != self._told, now
        if command.action is None:
            return
        self._at = command.action
        if command.kind is not CommandKind.EXECUTE:
            if self._to_come or (changed and not self._silent):
                self._publish([command.action])
        elif changed:
            self._publish([command.action, *loop.ahead(_LONGEST_CHUNK)])
        else:
            self._to_come = max(self._to_come - 1, 0)

    def rest(self) -> None:
        """Let the trajectory end at the action that was executed last, if it goes on."""
        if self._at is not None and self._to_come:
            self._publish([self._at])
        self._told = None

    def close(self) -> None:
        """Give the topic back."""
        self._publisher.close()

    def _publish(self, actions: list[np.ndarray]) -> None:
        self._to_come = len(actions) - 1
        self._publisher.publish(
            trajectory_message(
                self._transport.make, self._names, np.array(actions), self._period_ns, self._clock.ros_ns()
            )
        )
        self.sent += 1


def _open(settings: NodeSettings, transport: Transport, type_name: str, ticks: int) -> Publisher:
    period_s = 1 / settings.values["rate_hz"]
    profile = COMMAND.promising(deadline_s=ticks * period_s, liveliness_s=max(_LEASE_S, 2 * period_s))
    return transport.publisher(settings.values["action_topic"], type_name, profile)
