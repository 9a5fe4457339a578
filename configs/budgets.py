"""Typed configuration of ``scripts/latency_budget.py``."""

from __future__ import annotations

from dataclasses import dataclass

from bac.control.latency_budget import FEWEST_CALLS
from bac.errors import InvalidInput, sentence
from configs.schema import ExecutorConfig, TaskConfig


@dataclass(kw_only=True, slots=True)
class LatencyBudgetConfig:
    """``scripts/latency_budget.py``: select from the schedule bank, and hold this device to the budget.

    Attributes:
        checkpoint: path of a checkpoint; null takes the task's shipped policy.
        budget_ms: what a chunk may take at the 99th percentile, milliseconds.
        rate_hz: chunks begin so often; null lets one follow the other.
        measure: time the bank's schedules on this device anew; what was not timed here yet is timed in any case.
        measure_calls: timed calls of each, at least 100.
        calls: timed chunks, at least 100.
        warmup: untimed chunks before them.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; null leaves torch's choice.
    """

    task: TaskConfig
    executor: ExecutorConfig
    checkpoint: str | None
    budget_ms: float
    rate_hz: float | None
    measure: bool
    measure_calls: int
    calls: int
    warmup: int
    device: str
    threads: int | None

    def __post_init__(self) -> None:
        for name, least in {"measure_calls": FEWEST_CALLS, "calls": FEWEST_CALLS, "warmup": 0}.items():
            if (given := getattr(self, name)) < least:
                why = ", for fewer have no 99th percentile" if least else ""
                raise InvalidInput(sentence(name, expected=f"at least {least}{why}", got=given, mend="time more calls"))
