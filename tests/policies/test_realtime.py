"""Chunks by level, and the program of docs/CONTROL.md as a user would copy it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bac
import bac.control
from bac.control import Command, Inference, LoopReport, Observation, Predict, Request, SimulatedInference, VirtualClock
from bac.errors import InvalidInput
from bac.schedule import CacheSchedule
from policies.diffusion_policy import DiffusionPolicy
from policies.realtime import ChunkSource
from tests.policies.networks import small_checkpoint

SEEN = {key: np.full((2, size), 0.2, np.float32) for key, size in (("keypoints", 3), ("agent_position", 2))}


@pytest.fixture(scope="module")
def levels() -> list[DiffusionPolicy]:
    torch.manual_seed(0)
    policy = DiffusionPolicy(small_checkpoint())
    mask = np.zeros((len(policy.trunk.blocks), policy.sampler.steps), dtype=bool)
    mask[:, ::5] = True
    cheap = CacheSchedule(mask, policy.trunk.blocks, policy.provenance, "sparse")
    return [policy, bac.accelerate(policy, cheap, "eager")]


@pytest.mark.parametrize("level", [2, -1])
def test_a_level_without_a_policy_refuses(levels: list[DiffusionPolicy], level: int) -> None:
    seen = {key: values[None] for key, values in SEEN.items()}
    with pytest.raises(InvalidInput, match=rf"^level: expected one of the 2 policies given, from 0, got {level}; let "):
        ChunkSource(levels).chunks(seen, [(0, 0)], [None], level)


class Enough(Exception):
    """Ends a program that would go on for ever."""


def play(
    monkeypatch: pytest.MonkeyPatch, levels: list[DiffusionPolicy], limit: float, latency: Callable[[Request], float]
) -> tuple[dict[str, Any], LoopReport]:
    """Run the last program of the document for 60 ticks of virtual time, with inference of a given latency."""

    def simulated(predict: Predict, clock: VirtualClock) -> Inference:
        return SimulatedInference(predict, latency, clock)

    def execute(command: Command) -> None:
        if command.tick == 59:
            raise Enough

    monkeypatch.setattr(bac.control, "MonotonicClock", VirtualClock)
    monkeypatch.setattr(bac.control, "ThreadInference", simulated)
    names: dict[str, Any] = {
        "levels": levels,
        "low": np.full(2, -limit),
        "high": np.full(2, limit),
        "observe": lambda: Observation(SEEN, names["clock"].now_ns()),
        "execute": execute,
    }
    document = Path(__file__).parents[2] / "docs" / "CONTROL.md"
    program = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)[-1]
    with pytest.raises(Enough):
        exec(compile(program, str(document), "exec"), names)
    return names, names["loop"].report()


def test_the_document_s_program_degrades_under_load(
    monkeypatch: pytest.MonkeyPatch, levels: list[DiffusionPolicy]
) -> None:
    asked: list[int] = []

    def latency(request: Request) -> float:
        asked.append(request.level)
        return 50.0 if request.level else 250.0

    names, report = play(monkeypatch, levels, 1e6, latency)
    # Chunks of 5 actions every 8 ticks: ticks 1 and 9 miss a chunk, and tick 8 is on hold between the two. These are
    # three ticks with a miss among fifty; what is asked for after them is asked of the cheaper schedule.
    assert asked[:2] == [0, 0]
    assert set(asked[2:]) == {1}
    assert (report.level, report.counters.degradations, report.counters.deadline_misses) == (1, 1, 2)
    assert report.counters.refused == 0
    assert report.counters.executed > 0
    settings = names["settings"]
    assert None not in (settings.observation_age_ms, settings.stall_ms)


def test_the_document_s_program_refuses_actions_beyond_the_limits(
    monkeypatch: pytest.MonkeyPatch, levels: list[DiffusionPolicy]
) -> None:
    _, report = play(monkeypatch, levels, 1e-9, lambda request: 50.0)
    assert report.counters.executed == 0
    assert report.counters.refused > 0
    assert (report.counters.last_refusal or "").startswith("chunk: expected actions within")
