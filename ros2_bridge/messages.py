"""ROS 2 messages without ROS: types, CDR, type hashes and the names they have in DDS, by rosbags' type store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rosbags.interfaces import Nodetype
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from bac.choices import choice
from bac.errors import CorruptArtefact, InvalidInput, sentence
from ros2_bridge.distributions import GID_BYTES, Distribution

_STORES: Mapping[Distribution, Stores] = {
    Distribution.HUMBLE: Stores.ROS2_HUMBLE,
    Distribution.JAZZY: Stores.ROS2_JAZZY,
    Distribution.KILTED: Stores.ROS2_KILTED,
}

GRAPH_TYPE = "rmw_dds_common/msg/ParticipantEntitiesInfo"

_NUMPY = {"bool": "bool", "byte": "uint8", "char": "uint8"}


class MalformedMessage(CorruptArtefact):
    """Bytes that are no message of their type."""


class MessageTypes:
    """The message types of one distribution.

    Args:
        distro: whose; the graph's type differs between Humble and the later ones.
    """

    def __init__(self, distro: Distribution | str = Distribution.JAZZY) -> None:
        self.distro = choice("ros_distro", distro, Distribution)
        self._store = get_typestore(_STORES[self.distro])
        # Replaced, for some stores hold the Gid of another distribution.
        for name in ("Gid", "NodeEntitiesInfo", "ParticipantEntitiesInfo"):
            self._store.fielddefs.pop(f"rmw_dds_common/msg/{name}", None)
            self._store.types.pop(f"rmw_dds_common/msg/{name}", None)
        self._store.register(_graph_types(GID_BYTES[self.distro]))

    @property
    def fields(self) -> Mapping[str, Any]:
        """Type name -> (constants, fields), as rosbags has them."""
        return self._store.fielddefs

    @property
    def store(self) -> Any:
        """The type store, for rosbags' own readers and writers."""
        return self._store

    def make(self, type_name: str, **fields: Any) -> Any:
        """Return a message; fields that are not given are zero, empty or, for messages, made of such.

        Raises:
            InvalidInput: no such type or field.
        """
        definitions = self._fields_of(type_name)
        unknown = sorted(fields.keys() - {name for name, _ in definitions})
        if unknown:
            known = [name for name, _ in definitions]
            raise InvalidInput(
                sentence(type_name, expected=f"fields {known}", got=f"{unknown}", mend="correct the names")
            )
        values = {name: fields[name] if name in fields else self._default(kind) for name, kind in definitions}
        return self._store.types[type_name](**values)

    def serialize(self, type_name: str, message: Any) -> bytes:
        """Return little-endian CDR behind its header of 4 bytes, byte for byte as ROS 2 sends it."""
        return bytes(self._store.serialize_cdr(message, type_name, little_endian=True))

    def deserialize(self, type_name: str, data: bytes) -> Any:
        """Return the message; its arrays are views of ``data``.

        Raises:
            MalformedMessage: ``data`` is none of this type.
        """
        try:
            return self._store.deserialize_cdr(data, type_name)
        # What rosbags' compiled codecs raise on bytes that end too early or hold lengths beyond them.
        except (SerdeError, ValueError, IndexError, OverflowError, MemoryError) as error:
            got = f"{len(data)} bytes ({error})"
            raise MalformedMessage(
                sentence(type_name, expected="CDR of it", got=got, mend="check the publisher's message type")
            ) from error

    def type_hash(self, type_name: str) -> str | None:
        """Return ``RIHS01_...``, or None in Humble, which has no type hashes."""
        if self.distro is Distribution.HUMBLE:
            return None
        return self._store.hash_rihs01(type_name)

    def warm_up(self, type_name: str) -> None:
        """Compile the codec of a type now: its first use takes up to 0.3 s, too long for a control loop."""
        self.deserialize(type_name, self.serialize(type_name, self.make(type_name)))

    def _fields_of(self, type_name: str) -> list[tuple[str, Any]]:
        if type_name not in self._store.types:
            raise InvalidInput(
                sentence("message type", expected=f"one of {self.distro}", got=type_name, mend="correct the name")
            )
        return list(self._store.fielddefs[type_name][1])

    def _default(self, kind: Any) -> Any:
        match kind:
            case (Nodetype.BASE, ("string", _)):
                return ""
            case (Nodetype.BASE, (base, _)):
                return False if base == "bool" else 0.0 if base.startswith("float") else 0
            case (Nodetype.NAME, name):
                return self.make(name)
            case (Nodetype.ARRAY | Nodetype.SEQUENCE as container, ((Nodetype.BASE, (base, _)), length)) if (
                base != "string"
            ):
                return np.zeros(length if container == Nodetype.ARRAY else 0, _NUMPY.get(base, base))
            case (Nodetype.ARRAY, (inner, length)):
                return [self._default(inner) for _ in range(length)]
            case _:
                return []


def _graph_types(gid_bytes: int) -> dict[str, Any]:
    """Return the types of ``ros_discovery_info``.

    The id's char is written as uint8, which it is in ROS: rosbags would take it into the type hash as another type.
    """
    package, gids = "rmw_dds_common", "rmw_dds_common/Gid[]"
    node = f"string<=256 node_namespace\nstring<=256 node_name\n{gids} reader_gid_seq\n{gids} writer_gid_seq"
    participant = f"{package}/Gid gid\n{package}/NodeEntitiesInfo[] node_entities_info_seq"
    return {
        **get_types_from_msg(f"uint8[{gid_bytes}] data", f"{package}/msg/Gid"),
        **get_types_from_msg(node, f"{package}/msg/NodeEntitiesInfo"),
        **get_types_from_msg(participant, GRAPH_TYPE),
    }
