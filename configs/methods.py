"""Typed configuration of the caching methods: a schema for each, made from the method itself.

A method is a dataclass in a file of ``bac/methods``; its attributes are the keys of ``configs/cache/<name>.yaml``.
A new method needs no line here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, make_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, cast, get_type_hints

from omegaconf import DictConfig, OmegaConf

import bac.methods
from bac.choices import Choice, choice
from bac.errors import InvalidInput, sentence
from bac.methods import Method

_VALUES = Path(__file__).parent / "cache"


def default_method(name: str) -> Method:
    """Return a method with the values of its YAML file.

    Raises:
        InvalidInput: there is no such method.
    """
    if name not in METHODS:
        raise InvalidInput(sentence("method", expected=f"one of {sorted(METHODS)}", got=name, mend="correct the name"))
    values = cast(DictConfig, OmegaConf.load(_VALUES / f"{name}.yaml"))
    del values["defaults"]
    typed: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(METHODS[name]), values))
    return cast(Method, typed.build())


def _methods() -> Iterator[Any]:
    """Yield every dataclass of ``bac/methods`` that has a name and makes schedules."""
    for module in iter_modules(bac.methods.__path__, "bac.methods."):
        for each in vars(import_module(module.name)).values():
            if not isinstance(each, type) or each.__module__ != module.name:
                continue
            if is_dataclass(each) and hasattr(each, "name") and hasattr(each, "schedule"):
                yield each


def _schema(method: Any) -> type:
    """Return a dataclass with the method's attributes, choices as text, and ``build()`` that returns the method."""
    hints = get_type_hints(method)
    kinds = {field.name: hints[field.name] for field in fields(method) if field.name != "name"}

    def build(self: Any) -> Method:
        values = {name: getattr(self, name) for name in kinds}
        choices = {name: choice(f"cache.{name}", values[name], kinds[name]) for name in filter(is_choice, kinds)}
        return cast(Method, method(**values | choices))

    def is_choice(name: str) -> bool:
        return isinstance(kinds[name], type) and issubclass(kinds[name], Choice)

    return make_dataclass(
        f"{method.__name__}Config",
        [(name, str if is_choice(name) else kind) for name, kind in kinds.items()],
        namespace={"__doc__": f"See ``{method.__module__}.{method.__name__}``.", "build": build},
        kw_only=True,
        slots=True,
    )


METHODS: dict[str, type] = {method.name: _schema(method) for method in _methods()}
"""The choices of ``cache=``."""
