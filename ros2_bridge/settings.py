"""What the parameters mean together: checked once, when the node is configured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bac.control import ActionLimits, Degradation, Fallback, LoopSettings, Seam, ticks_for
from bac.control.loop import Hold, repeat
from bac.errors import InvalidInput, sentence
from ros2_bridge.mapping import KeySource, SourceKind
from ros2_bridge.parameters import read_values


@dataclass(frozen=True)
class NodeSettings:
    """The parameters of a node.

    Attributes:
        values: name -> value, every parameter.
        sources: where the observation comes from.
        limits: of actions, or None.
    """

    values: Mapping[str, Any]
    sources: tuple[KeySource, ...]
    limits: ActionLimits | None

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> NodeSettings:
        """Check parameters.

        Raises:
            InvalidInput: an unknown name, a value that does not fit, or two that do not fit together.
        """
        values: dict[str, Any] = dict(read_values(given))
        sources = tuple(_source(key, values) for key in values["observation_keys"])
        low, high = values["action_low"], values["action_high"]
        limits = ActionLimits(np.array(low), np.array(high)) if low or high else None
        if values["output"] == "trajectory" and not values["action_names"]:
            raise InvalidInput(
                sentence("action_names", expected="a joint per action channel", got="none", mend="name them")
            )
        if values["output"] == "trajectory" and values["hold"] == "zero":
            expected, mend = "repeat or silent with output: trajectory", "its points are positions"
            raise InvalidInput(sentence("hold", expected=expected, got="zero", mend=mend))
        settings = cls(values, sources, limits)
        settings._degradation(schedules=1)
        return settings

    @property
    def hold(self) -> Hold:
        """What keeps the robot where it is."""
        return np.zeros_like if self.values["hold"] == "zero" else repeat

    def loop(self, action_steps: int, slowest_ms: float, schedules: int) -> LoopSettings:
        """Return the control loop's settings.

        Args:
            action_steps: of the policy.
            slowest_ms: what the slowest warm call took.
            schedules: how many were built, to degrade to.

        Raises:
            InvalidInput: values that do not fit together.
        """
        given, rate_hz = self.values, self.values["rate_hz"]
        deadline = given["deadline_ticks"]
        return LoopSettings(
            rate_hz=rate_hz,
            replan_ticks=given["replan_ticks"] or action_steps,
            deadline_ticks=ticks_for(slowest_ms, rate_hz) if deadline < 0 else deadline,
            seam=Seam(given["seam"]),
            fallback=Fallback.HOLD,
            observation_age_ms=given["observation_age_ms"],
            stall_ms=given["stall_ms"],
            restarts=given["restarts"],
            degradation=self._degradation(schedules),
        )

    def _degradation(self, schedules: int) -> Degradation:
        misses = self.values["degrade_misses"]
        if not misses:
            return Degradation()
        return Degradation(schedules, misses, self.values["degrade_window"], self.values["degrade_recover"])


def _source(key: str, values: Mapping[str, Any]) -> KeySource:
    group = f"observation.{key}"
    return KeySource(
        key,
        values[f"{group}.topic"],
        SourceKind(values[f"{group}.type"]),
        tuple(values[f"{group}.names"]),
        values[f"{group}.quantity"],
    )
