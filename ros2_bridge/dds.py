"""A ROS 2 node's transport without ROS: Eclipse Cyclone DDS from PyPI, with the wire conventions of ROS 2."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from cyclonedds.core import (
    DDSException,
    GuardCondition,
    InstanceState,
    Policy,
    Qos,
    ReadCondition,
    SampleState,
    ViewState,
    WaitSet,
)
from cyclonedds.domain import DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration

from bac.errors import BacError, InvalidInput, sentence
from ros2_bridge.dds_types import wire_type
from ros2_bridge.distributions import (
    GID_BYTES,
    Distribution,
    absolute_name,
    absolute_namespace,
    absolute_topic,
    dds_topic,
    require_domain,
)
from ros2_bridge.messages import GRAPH_TYPE, MalformedMessage, MessageTypes
from ros2_bridge.timer import Timer
from ros2_bridge.transport import STATUS, OnMalformed, OnMessage, Profile

_ANY = ViewState.Any | InstanceState.Any | SampleState.Any
_BATCH = 64

_log = logging.getLogger(__name__)


class DdsTransport:
    """One participant with one ROS 2 node in it.

    Args:
        node: the node's name.
        namespace: of the node.
        distro: whose wire format; the robot's.
        domain: DDS domain; None takes ``ROS_DOMAIN_ID``, else 0.

    Raises:
        InvalidInput: no such domain.
    """

    name = "dds"

    def __init__(
        self,
        node: str = "policy_node",
        namespace: str = "/",
        distro: Distribution | str = Distribution.JAZZY,
        domain: int | None = None,
    ) -> None:
        self._node, self._namespace = node, absolute_namespace(namespace)
        self.node_name = absolute_name(node, namespace)
        self.messages = MessageTypes(distro)
        number = require_domain(_domain_of_environment() if domain is None else domain)
        # The enclave marks the participant as one of ROS 2.
        self._participant = DomainParticipant(number, Qos(Policy.Userdata(data=b"enclave=/;")))
        self._lock = threading.RLock()
        self._topics: dict[tuple[str, str], tuple[Any, Topic[Any]]] = {}
        self._writers: list[_Writer] = []
        self._readers: list[_Reader] = []
        self._timers: list[Timer] = []
        self._graph = self._writer("ros_discovery_info", GRAPH_TYPE, STATUS)
        self._announce()
        self._waits = WaitSet(self._participant)
        self._wake = GuardCondition(self._participant)
        self._waits.attach(self._wake)
        self._closed = False
        self._thread = threading.Thread(target=self._receive, name="ros2-bridge-dds", daemon=True)
        self._thread.start()

    def make(self, type_name: str, **fields: Any) -> Any:
        """Return a message; see ``MessageTypes.make``."""
        return self.messages.make(type_name, **fields)

    def serialize(self, type_name: str, message: Any) -> bytes:
        """Return CDR; see ``MessageTypes.serialize``."""
        return self.messages.serialize(type_name, message)

    def publisher(self, topic: str, type_name: str, profile: Profile) -> _Writer:
        """Open a topic for sending."""
        name = dds_topic(absolute_topic(topic, self._namespace, self._node))
        self.messages.warm_up(type_name)
        with self._lock:
            writer = self._writer(name, type_name, profile)
            self._writers.append(writer)
            self._announce()
        return writer

    def subscribe(
        self, topic: str, type_name: str, profile: Profile, on_message: OnMessage, on_malformed: OnMalformed
    ) -> _Reader:
        """Call ``on_message`` from this transport's thread."""
        name = dds_topic(absolute_topic(topic, self._namespace, self._node))
        self.messages.warm_up(type_name)
        with self._lock:
            _, known = self._topic(name, type_name)
            entity = DataReader(self._participant, known, self._qos(type_name, profile))
            reader = _Reader(self, entity, type_name, on_message, on_malformed)
            self._readers.append(reader)
            self._waits.attach(reader.condition)
            self._announce()
        self._wake.set(True)
        return reader

    def every(self, period_s: float, call: Callable[[], None]) -> Timer:
        """Call this often from a thread of its own."""
        timer = Timer(period_s, call)
        self._timers.append(timer)
        return timer

    def close(self) -> None:
        """End timers and callbacks, then leave the domain; a second call does nothing."""
        for timer in self._timers:
            timer.close()
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wake.set(True)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for reader in list(self._readers):
            reader.close()
        for writer in list(self._writers):
            writer.close()
        self._topics.clear()
        # Their finalisers leave the domain: other nodes see this one go at once and not after a lease.
        del self._graph, self._waits, self._wake, self._participant

    def forget(self, endpoint: _Reader | _Writer) -> None:
        """Take an endpoint that is being closed out of the graph."""
        with self._lock:
            if isinstance(endpoint, _Reader) and endpoint in self._readers:
                self._waits.detach(endpoint.condition)
                self._readers.remove(endpoint)
            elif isinstance(endpoint, _Writer) and endpoint in self._writers:
                self._writers.remove(endpoint)
            if not self._closed:
                self._announce()

    def _receive(self) -> None:
        while not self._closed:
            self._waits.wait(duration(seconds=1))
            self._wake.set(False)
            with self._lock:
                readers = list(self._readers)
            for reader in readers:
                reader.deliver(self.messages)

    def _writer(self, name: str, type_name: str, profile: Profile) -> _Writer:
        wire, topic = self._topic(name, type_name)
        entity = DataWriter(self._participant, topic, self._qos(type_name, profile))
        return _Writer(self, entity, wire, type_name)

    def _topic(self, name: str, type_name: str) -> tuple[Any, Topic[Any]]:
        key = (name, type_name)
        if key not in self._topics:
            wire = wire_type(self.messages, type_name)
            self._topics[key] = wire, Topic(self._participant, name, wire)
        return self._topics[key]

    def _qos(self, type_name: str, profile: Profile) -> Qos:
        kept = Policy.History.KeepLast(profile.depth)
        policies = [
            Policy.Reliability.Reliable(duration(milliseconds=100))
            if profile.reliable
            else Policy.Reliability.BestEffort,
            kept,
            Policy.Durability.TransientLocal if profile.latched else Policy.Durability.Volatile,
            # ROS 2 speaks the first version of extended CDR only.
            Policy.DataRepresentation(use_cdrv0_representation=True, use_xcdrv2_representation=False),
        ]
        if profile.latched:
            # What latecomers get is kept by the durability service, by default one message whatever the history says.
            policies.append(Policy.DurabilityService(duration(seconds=0), kept, -1, -1, -1))
        if profile.deadline_s is not None:
            policies.append(Policy.Deadline(duration(seconds=profile.deadline_s)))
        if profile.liveliness_s is not None:
            policies.append(Policy.Liveliness.Automatic(duration(seconds=profile.liveliness_s)))
        type_hash = self.messages.type_hash(type_name)
        if type_hash is not None:
            policies.append(Policy.Userdata(f"typehash={type_hash};".encode()))
        return Qos(*policies)

    def _announce(self) -> None:
        """Tell the graph which endpoints the node has: without it ``ros2 node list`` does not see the node."""
        messages = self.messages
        node = messages.make(
            "rmw_dds_common/msg/NodeEntitiesInfo",
            node_namespace=self._namespace,
            node_name=self._node,
            reader_gid_seq=[self._gid(each.entity) for each in self._readers],
            writer_gid_seq=[self._gid(each.entity) for each in self._writers],
        )
        self._graph.publish(messages.make(GRAPH_TYPE, gid=self._gid(self._participant), node_entities_info_seq=[node]))

    def _gid(self, entity: Any) -> Any:
        size = GID_BYTES[self.messages.distro]
        data = np.frombuffer(entity.get_guid().bytes.ljust(size, b"\0"), np.uint8)
        return self.messages.make("rmw_dds_common/msg/Gid", data=data)


class _Writer:
    """A topic that is open for sending."""

    def __init__(self, transport: DdsTransport, entity: Any, wire: Any, type_name: str) -> None:
        self._transport, self.entity, self._wire, self._type_name = transport, entity, wire, type_name

    def publish(self, message: Any) -> None:
        """Send."""
        self.publish_cdr(self._transport.serialize(self._type_name, message))

    def publish_cdr(self, cdr: bytes) -> None:
        """Send what was serialised before."""
        entity = self.entity
        if entity is None:
            return
        try:
            entity.write(self._wire(cdr))
        except DDSException as error:
            if error.code != DDSException.DDS_RETCODE_TIMEOUT:
                raise
            # A reader that does not keep up holds a reliable writer; with depth 1 the next message replaces this one.
            _log.debug("%s: not sent within 100 ms", self._type_name)

    def close(self) -> None:
        """Leave the topic."""
        if self.entity is not None:
            self._transport.forget(self)
            self.entity = None


class _Reader:
    """A topic that is listened to."""

    def __init__(
        self, transport: DdsTransport, entity: Any, type_name: str, on_message: OnMessage, on_malformed: OnMalformed
    ) -> None:
        self._transport, self.entity, self._type_name = transport, entity, type_name
        self._on_message, self._on_malformed = on_message, on_malformed
        self.condition = ReadCondition(entity, _ANY)

    def deliver(self, messages: MessageTypes) -> None:
        """Hand over what has come."""
        entity = self.entity
        for sample in [] if entity is None else entity.take(_BATCH):
            if not sample.sample_info.valid_data:  # a publisher left
                continue
            try:
                message = messages.deserialize(self._type_name, sample.cdr)
            except MalformedMessage as refusal:
                self._on_malformed(str(refusal))
                continue
            try:
                self._on_message(message, str(sample.sample_info.publication_handle))
            except BacError as refusal:
                self._on_malformed(str(refusal))
            except Exception:  # noqa: BLE001 - one thread serves every topic: one callback must not deafen the node
                _log.exception("%s: a callback failed", self._type_name)

    def close(self) -> None:
        """Listen no more."""
        if self.entity is not None:
            self._transport.forget(self)
            self.entity = None


def _domain_of_environment() -> int:
    given = os.environ.get("ROS_DOMAIN_ID", "0") or "0"
    if not given.isdigit():
        raise InvalidInput(sentence("ROS_DOMAIN_ID", expected="a number", got=given, mend="correct or unset it"))
    return int(given)
