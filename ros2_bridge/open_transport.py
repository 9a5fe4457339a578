"""From the command line to a node over DDS, or over a bag that is replayed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bac.errors import MissingArtefact, sentence
from ros2_bridge.core import PolicyCore
from ros2_bridge.distributions import Distribution
from ros2_bridge.node_clock import NodeClock, SimulatedTime, SystemClock
from ros2_bridge.standalone import StandaloneNode
from ros2_bridge.transport import Transport


@dataclass(frozen=True)
class OpenNode:
    """A node, unconfigured, and what carries its messages.

    Attributes:
        node: the node.
        transport: to be closed after it.
        begin: to be called when the node is active; starts a replay.
    """

    node: StandaloneNode
    transport: Transport
    begin: Callable[[], None]


def open_node(options: argparse.Namespace, given: Mapping[str, Any], over: Callable[[], None]) -> OpenNode:
    """Open what the command line asks for.

    Args:
        options: the command line.
        given: parameters.
        over: called when a replayed bag has ended.

    Raises:
        MissingArtefact: a package or the bag is not there.
    """
    clock: NodeClock
    transport: Transport
    begin: Callable[[], None] = _nothing
    if options.replay:
        from ros2_bridge.replay import ReplayTransport

        replayed = ReplayTransport(Path(options.replay), options.node, options.namespace, _distro(options), over)
        clock, transport, begin = replayed.clock, replayed, replayed.start
    else:
        clock, transport = SystemClock(), open_dds(options)
    if given.get("use_sim_time"):
        clock = SimulatedTime()
    if options.record:
        from ros2_bridge.recording import RecordingTransport

        names = (_distro(options), options.node, options.namespace)
        transport = RecordingTransport(transport, Path(options.record), clock, *names)
    return OpenNode(StandaloneNode(PolicyCore(transport, clock), transport), transport, begin)


def open_dds(options: argparse.Namespace) -> Transport:
    """Return a transport over DDS.

    Raises:
        MissingArtefact: the packages of the extra ``ros`` are not installed.
    """
    try:
        from ros2_bridge.dds import DdsTransport
    except ImportError as error:
        mend = "pip install 'bac-diffusion-policy[ros]', which has no cyclonedds for aarch64: use rclpy there"
        raise MissingArtefact(
            sentence("transport dds", expected="cyclonedds and rosbags", got=str(error), mend=mend)
        ) from error
    return DdsTransport(options.node, options.namespace, _distro(options), options.domain)


def _distro(options: argparse.Namespace) -> str:
    return options.ros_distro or Distribution.JAZZY


def _nothing() -> None:
    """Live messages come by themselves."""
