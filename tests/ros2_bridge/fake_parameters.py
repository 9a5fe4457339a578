"""Parameters as strict as those of rclpy's nodes: static types, descriptors, overrides, who may refuse a value."""

from __future__ import annotations

import array
import enum
from collections.abc import Callable
from typing import Any


class Type(enum.Enum):
    NOT_SET, BOOL, INTEGER, DOUBLE, STRING, BYTE_ARRAY, BOOL_ARRAY, INTEGER_ARRAY, DOUBLE_ARRAY, STRING_ARRAY = range(
        10
    )

    @classmethod
    def from_parameter_value(cls, value: Any) -> Type:
        plain = {type(None): cls.NOT_SET, bool: cls.BOOL, int: cls.INTEGER, float: cls.DOUBLE, str: cls.STRING}
        if type(value) in plain:
            return plain[type(value)]
        if isinstance(value, list | tuple | array.array):
            # rclpy asks for bytes first, and all of nothing are bytes.
            for kind, made in ((bytes, 5), (bool, 6), (int, 7), (float, 8), (str, 9)):
                if all(type(each) is kind for each in value):
                    return cls(made)
        raise TypeError(f"{value!r} is no parameter value")


class Parameter:
    Type = Type

    def __init__(self, name: str, type_: Type | None = None, value: Any = None) -> None:
        self.name, self.value = name, value
        self.type_ = Type.from_parameter_value(value) if type_ is None else type_


class ParameterRefused(Exception):
    """rclpy's InvalidParameterType- and ValueException."""


class ParameterTable:
    """What a node has of them.

    Args:
        overrides: values in place of the defaults.
    """

    def __init__(self, overrides: list[Parameter] | None) -> None:
        self._overrides = {each.name: each for each in overrides or []}
        self._parameters: dict[str, Parameter] = {}
        self.descriptors: dict[str, Any] = {}
        self._on_set: list[Callable[[list[Parameter]], Any]] = []

    def declare_parameter(self, name: str, value: Any, descriptor: Any) -> Parameter:
        assert name not in self._parameters, f"{name} was declared"
        declared = value if isinstance(value, Type) else Type.from_parameter_value(value)
        assert descriptor is None or descriptor.type == declared.value, (name, descriptor.type, declared)
        self.descriptors[name] = descriptor
        plain = Parameter(name, Type.NOT_SET) if isinstance(value, Type) else Parameter(name, declared, value)
        self._parameters[name] = plain
        chosen = self._overrides.get(name)
        if chosen is not None:
            self._check(chosen, declared, declaring=True)
            self._parameters[name] = chosen
        return self._parameters[name]

    def _check(self, parameter: Parameter, declared: Type, declaring: bool = False) -> None:
        if parameter.type_ is not declared:
            raise ParameterRefused(f"{parameter.name}: {declared} was declared, not {parameter.type_}")
        descriptor = self.descriptors[parameter.name]
        if descriptor is not None and descriptor.read_only and not declaring:
            raise ParameterRefused(f"Trying to set a read-only parameter: {parameter.name}.")
        for allowed in [] if descriptor is None else [*descriptor.integer_range, *descriptor.floating_point_range]:
            if not allowed.from_value <= parameter.value <= allowed.to_value:
                raise ParameterRefused(f"{parameter.name}: {parameter.value} is outside its range")

    def get_parameter(self, name: str) -> Parameter:
        found = self._parameters[name]
        if found.type_ is Type.NOT_SET:
            raise ParameterRefused(f"{name} is not initialised")
        return found

    def get_parameter_or(self, name: str, alternative: Parameter) -> Parameter:
        found = self._parameters.get(name)
        return alternative if found is None or found.type_ is Type.NOT_SET else found

    def add_on_set_parameters_callback(self, callback: Callable[[list[Parameter]], Any]) -> None:
        """In front: rclpy's own, which lets its clock follow use_sim_time, is asked last."""
        self._on_set.insert(0, callback)

    def set_parameters(self, parameters: list[Parameter]) -> list[Any]:
        """What the service ``set_parameters`` does: one by one."""
        return [self.set_parameters_atomically([each]) for each in parameters]

    def set_parameters_atomically(self, parameters: list[Parameter]) -> Any:
        """What the service of that name does: all of them, or none; descriptors are held to first."""
        try:
            for each in parameters:
                descriptor = self.descriptors[each.name]
                self._check(each, Type.BOOL if descriptor is None else Type(descriptor.type))
        except ParameterRefused as refusal:
            return SetParametersResult(successful=False, reason=str(refusal))
        for callback in self._on_set:
            if not (result := callback(parameters)).successful:
                return result
        self._parameters |= {each.name: each for each in parameters}
        return SetParametersResult(successful=True)


class SetParametersResult:
    def __init__(self, successful: bool = False, reason: str = "") -> None:
        self.successful, self.reason = successful, reason


def record(*names: str) -> Any:
    """Return a class that keeps exactly these keyword arguments."""

    def __init__(self: Any, **given: Any) -> None:  # noqa: N807 - of the class below
        assert given.keys() <= set(names), given
        self.__dict__ |= {"read_only": False, "integer_range": [], "floating_point_range": []} | given

    return type("Record", (), {"__init__": __init__})
