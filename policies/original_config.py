"""The training configuration inside an original ``.ckpt``: omegaconf's tree as plain values, and questions to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import Self

from bac.errors import Mismatch, sentence
from policies.restricted_archive import InertNode, corrupt

_Kind = TypeVar("_Kind", int, float, str, bool)

_REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")


@dataclass(frozen=True)
class OriginalConfig:
    """The configuration ``cfg`` of a checkpoint.

    Attributes:
        path: the checkpoint, for refusals.
        values: nested dicts and lists. A value that is one ``${a.b}`` is resolved; references inside longer text and
            other resolvers (``${eval:...}``, ``${now:...}``) stay as written.
    """

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path, node: object) -> Self:
        """Read what the archive returned for ``cfg``.

        Raises:
            CorruptArtefact: it is no omegaconf dict of plain values.
        """
        try:
            written = _plain(node)
            values = _resolve(written, written)
        except (RecursionError, TypeError) as error:
            raise corrupt(path, "cfg as an omegaconf tree of plain values", error) from error
        if not isinstance(values, dict):
            raise corrupt(path, "cfg as an omegaconf DictConfig", type(node).__name__)
        return cls(path, values)

    def stated(self, where: str) -> Any:
        """Return the value at a dotted path; None where it is absent or an unresolved reference."""
        node: Any = self.values
        for key in where.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        return None if isinstance(node, str) and "${" in node else node

    def needed(self, where: str, kind: type[_Kind]) -> _Kind:
        """Return the value at a dotted path.

        Raises:
            CorruptArtefact: it is absent, unresolved, or of another type.
        """
        value = self.stated(where)
        # bool is an int, and YAML writes a round float as an int.
        if type(value) is kind or (kind is float and type(value) is int):
            return kind(value)
        raise corrupt(self.path, f"cfg.{where} of type {kind.__name__}", repr(value))

    def require(self, ours: Mapping[str, object], because: str = "") -> None:
        """Refuse a configuration that states other values than ``ours`` (dotted path -> value); silence is consent.

        Raises:
            Mismatch: it does.
        """
        for where, value in ours.items():
            stated = self.stated(where)
            if stated is not None and stated != value:
                raise self.foreign(f"cfg.{where}={value}{because}", stated)

    def foreign(self, expected: object, got: object) -> Mismatch:
        """Return the refusal of a checkpoint whose policy is none of ours."""
        mend = "use a checkpoint of a policy that is supported here (README, original checkpoints)"
        return Mismatch(sentence(f"checkpoint {self.path}", expected=expected, got=got, mend=mend))


def _plain(node: object) -> Any:
    if isinstance(node, InertNode):
        return _plain(node.state.get("_content", node.state.get("_val")))
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    if node is None or isinstance(node, str | int | float):
        return node
    raise TypeError(f"a {type(node).__name__}")


def _resolve(value: Any, root: Any, trail: tuple[str, ...] = ()) -> Any:
    """Return ``value`` with references followed; one that leads nowhere or round in a circle stays as written."""
    if isinstance(value, dict):
        return {key: _resolve(item, root, trail) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, root, trail) for item in value]
    reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if reference is None or reference[1] in trail:
        return value
    trail = (*trail, reference[1])
    node = root
    for key in reference[1].split("."):
        if isinstance(node, str):
            node = _resolve(node, root, trail)
        if not isinstance(node, dict) or key not in node:
            return value
        node = node[key]
    return _resolve(node, root, trail)
