"""The node's parameters: one table, from which rclpy declares them and the command line reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bac.choices import Choice
from bac.errors import CorruptArtefact, InvalidInput, MissingArtefact, sentence

Value = bool | int | float | str | list[str] | list[float]


class ParameterType(Choice):
    """Types of ROS 2 parameters, in the words of ``ros2 param describe``."""

    BOOL = "boolean"
    INTEGER = "integer"
    DOUBLE = "double"
    STRING = "string"
    STRINGS = "string array"
    DOUBLES = "double array"


@dataclass(frozen=True)
class Parameter:
    """One declared parameter.

    Attributes:
        name: dots separate groups.
        default: its value unless given; its type is the parameter's, but that of an empty list is ``kind``.
        description: what it is, with its unit.
        kind: its type.
        low, high: range of numbers, both included.
        choices: the only values there are; empty allows all.
        live: may be changed while the node is active; others take effect at the next ``configure``.
        read_only: is what it was when the node started.
    """

    name: str
    default: Value
    description: str
    kind: ParameterType
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    live: bool = False
    read_only: bool = False

    @property
    def constraints(self) -> str:
        """What type and range do not tell: the choices, and when a change takes effect; empty if there is nothing."""
        told = [f"one of {', '.join(self.choices)}"] if self.choices else []
        if not self.live and not self.read_only:
            told.append("takes effect at the next configure")
        return "; ".join(told)

    def read(self, value: Any) -> Value:
        """Return a value of this parameter's type.

        Raises:
            InvalidInput: another type, outside its range, or none of its choices.
        """
        converted = _CONVERSIONS[self.kind](value)
        if converted is None:
            raise self._wrong(f"a {self.kind}", value)
        if isinstance(converted, int | float) and not self.low <= converted <= self.high:
            raise self._wrong(f"{self.low:g} to {self.high:g}", value)
        if self.choices and converted not in self.choices:
            raise self._wrong(f"one of {', '.join(self.choices)}", value)
        return converted

    def _wrong(self, expected: str, got: object) -> InvalidInput:
        return InvalidInput(sentence(f"parameter {self.name}", expected=expected, got=got, mend="correct it"))


def _number(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def _strings(value: Any) -> list[str] | None:
    fine = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    return list(value) if fine else None


def _numbers(value: Any) -> list[float] | None:
    numbers = [_number(each) for each in value] if isinstance(value, list | tuple) else [None]
    plain = [each for each in numbers if each is not None]
    return plain if len(plain) == len(numbers) else None


_CONVERSIONS: Mapping[ParameterType, Any] = {
    ParameterType.BOOL: lambda value: value if isinstance(value, bool) else None,
    ParameterType.INTEGER: lambda value: value if isinstance(value, int) and not isinstance(value, bool) else None,
    ParameterType.DOUBLE: _number,
    ParameterType.STRING: lambda value: value if isinstance(value, str) else None,
    ParameterType.STRINGS: _strings,
    ParameterType.DOUBLES: _numbers,
}


def _string(name: str, default: str, description: str, choices: tuple[str, ...] = (), live: bool = False) -> Parameter:
    return Parameter(name, default, description, ParameterType.STRING, choices=choices, live=live)


def _integer(name: str, default: int, description: str, low: int, high: int) -> Parameter:
    return Parameter(name, default, description, ParameterType.INTEGER, low, high)


def _double(name: str, default: float, description: str, low: float, high: float) -> Parameter:
    return Parameter(name, default, description, ParameterType.DOUBLE, low, high)


def _list(name: str, description: str, kind: ParameterType = ParameterType.STRINGS) -> Parameter:
    return Parameter(name, [], description, kind)


PARAMETERS: tuple[Parameter, ...] = (
    _string("task", "push_t", "Task of the policy; the one that ships for it is loaded unless checkpoint is given."),
    _string("checkpoint", "", "Path of a checkpoint, ours or an original .ckpt; empty takes the shipped one."),
    _string(
        "cache",
        "bac",
        "Schedule in use: none, a schedule's name (bac-s10), or a method's (bac), its most accurate kept schedule.",
        live=True,
    ),
    _list("caches", "Further schedules to build and warm, cheaper from one to the next: cache can be set to them."),
    _integer("degrade_misses", 0, "So many misses among degrade_window ticks: the next of caches; 0 never.", 0, 1000),
    _integer("degrade_window", 50, "Ticks that misses are counted over.", 1, 100_000),
    _integer("degrade_recover", 200, "So many ticks in a row without a miss lead one schedule back.", 1, 100_000),
    _double(
        "budget_ms", 0.0, "Take cache from the schedule bank: the best whose p99 here is within; 0 is off.", 0, 1e5
    ),
    _string("device", "cpu", "Device of the network: cpu, cuda, cuda:1."),
    _string("executor", "auto", "Executor of the plan.", ("auto", "eager", "compiled", "cuda_graph", "onnx")),
    _integer("threads", 0, "CPU threads of the network; 0 leaves torch's.", 0, 1024),
    _integer("warmup_calls", 5, "Chunks that configure computes of each schedule before the node is ready.", 1, 1000),
    _integer("noise_seed", -1, "Episode n draws its noise under this seed plus n; -1 draws fresh noise.", -1, 2**31),
    _double("rate_hz", 10.0, "Ticks per second: one action each.", 0.1, 1000.0),
    _double("phase_ms", 20.0, "Ticks begin so long after the first observation, so that it is there.", 0.0, 1e4),
    _integer(
        "replan_ticks", 0, "Ticks from one request of a chunk to the next; 0: the policy's action steps.", 0, 1000
    ),
    _integer("deadline_ticks", -1, "A chunk should be there after so many ticks; -1: what warm-up took.", -1, 1000),
    _string("seam", "replace", "How a new chunk takes over.", ("replace", "blend", "inpaint")),
    _string(
        "hold",
        "repeat",
        "At a tick without an action: repeat the last (absolute targets), send zeros (deltas, velocities), or nothing.",
        ("repeat", "zero", "silent"),
    ),
    _double("observation_age_ms", 500.0, "An older observation stops motion.", 1.0, 1e6),
    _double("ahead_ms", 50.0, "How far in the future a stamp may lie: the clocks' disagreement.", 0.0, 1e6),
    _double("stall_ms", 5000.0, "Inference that takes longer is given up.", 1.0, 1e6),
    _integer("restarts", 0, "How often inference that died or stalled is started again.", 0, 1000),
    Parameter(
        "observation_keys",
        [],
        "Keys of the policy's observation; each has observation.<key>.* parameters.",
        ParameterType.STRINGS,
        read_only=True,
    ),
    _string("output", "array", "What is published: each action, or each chunk with times.", ("array", "trajectory")),
    _string("action_topic", "action", "Topic of the output."),
    _list("action_names", "Joint of each action channel, for output: trajectory."),
    _list(
        "action_low", "Least action, task units; a chunk below is refused. Empty is unlimited.", ParameterType.DOUBLES
    ),
    _list("action_high", "Greatest action, task units.", ParameterType.DOUBLES),
)
"""Every parameter but those of the observation keys. ``use_sim_time`` is rclpy's own."""


def key_parameters(key: str) -> tuple[Parameter, ...]:
    """Return the parameters of one observation key."""
    kinds = ("joint_state", "image", "compressed_image", "pose", "array")
    group = f"observation.{key}"
    return (
        _string(f"{group}.topic", key, f"Topic that gives {key}."),
        _string(f"{group}.type", "array", "Its message.", kinds),
        _list(f"{group}.names", "Joints, or pose components (x y z qx qy qz qw), in the policy's order."),
        _string(f"{group}.quantity", "position", "Of a joint state.", ("position", "velocity", "effort")),
    )


def read_values(given: Mapping[str, Any]) -> dict[str, Value]:
    """Return every parameter's value, the given ones checked, the others by default.

    Raises:
        InvalidInput: an unknown name, or a value that does not fit.
    """
    known = {each.name: each for each in (*PARAMETERS, _USE_SIM_TIME)}
    for key in known["observation_keys"].read(given.get("observation_keys", [])):  # type: ignore[union-attr]
        known |= {each.name: each for each in key_parameters(str(key))}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise InvalidInput(
            sentence("parameters", expected=f"of {sorted(known)}", got=unknown, mend="correct the names")
        )
    return {name: each.read(given.get(name, each.default)) for name, each in known.items()}


def parameter_file(path: Path) -> dict[str, Any]:
    """Return name -> value of a ROS 2 parameter file, of all its nodes together.

    Raises:
        MissingArtefact: no such file.
        CorruptArtefact: no parameter file.
    """
    if not path.is_file():
        raise MissingArtefact(sentence("parameters", expected=f"a file {path}", got="none", mend="check the path"))
    try:
        document = yaml.safe_load(path.read_text())
        values: dict[str, Any] = {}
        for node in document.values():
            values |= dict(_flattened(node["ros__parameters"]))
        return values
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        got = f"{type(error).__name__} {error}"
        raise CorruptArtefact(
            sentence(f"parameters {path}", expected="node: ros__parameters: ...", got=got, mend="correct it")
        ) from error


_USE_SIM_TIME = Parameter("use_sim_time", False, "Take time from /clock.", ParameterType.BOOL)


def _flattened(group: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in group.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
