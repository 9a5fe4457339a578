"""Latency by a clock that the tests turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bac.errors import InvalidInput
from bac.timing import device_synchroniser, measure_interleaved, measure_stages


def rig(log: list[str]) -> tuple[Callable[[], float], Callable[[str, list[float]], Callable[[], None]]]:
    """Return a clock, and a maker of callables that take the given seconds, call after call."""
    now = [100.0]

    def clock() -> float:
        log.append("clock")
        return now[0]

    def taking(name: str, seconds: list[float]) -> Callable[[], None]:
        remaining = iter(seconds)

        def call() -> None:
            log.append(name)
            now[0] += next(remaining)

        return call

    return clock, taking


def test_percentiles_of_the_timed_calls() -> None:
    clock, taking = rig([])
    # 1 to 101 ms in a mixed order: the 51st is the median and the 100th the 99th percentile.
    timed = [(37 * call % 101 + 1) / 1e3 for call in range(101)]
    latency = measure_interleaved({"a": taking("a", [5.0, 2.0, *timed])}, calls=101, clock=clock)["a"]
    assert latency.p50_ms == pytest.approx(51)
    assert latency.p99_ms == pytest.approx(100)
    assert latency.mean_ms == pytest.approx(51)
    assert latency.warmup_s == pytest.approx(7)
    assert latency.calls == 101
    assert latency.to_json()["p99"] == latency.p99_ms


def test_candidates_do_not_share_their_times() -> None:
    clock, taking = rig([])
    candidates = {"fast": taking("fast", [9.0] + [0.001] * 3), "slow": taking("slow", [7.0] + [0.002] * 3)}
    latency = measure_interleaved(candidates, calls=3, warmup=1, clock=clock)
    assert (latency["fast"].p50_ms, latency["slow"].p50_ms) == (pytest.approx(1), pytest.approx(2))
    assert (latency["fast"].warmup_s, latency["slow"].warmup_s) == (pytest.approx(9), pytest.approx(7))


def test_calls_in_turn_and_waits_for_the_device_before_every_reading() -> None:
    log: list[str] = []
    clock, taking = rig(log)
    candidates = {name: taking(name, [0.0] * 4) for name in "ab"}
    measure_interleaved(candidates, calls=2, clock=clock, synchronise=lambda: log.append("wait"))
    reading = ["wait", "clock"]
    warmup = [*reading, "a", "a", *reading, *reading, "b", "b", *reading]
    one_round = [*reading, "a", *reading, *reading, "b", *reading]
    assert log == warmup + 2 * one_round


def test_tells_of_every_timed_call_while_no_clock_runs() -> None:
    log: list[str] = []
    clock, taking = rig(log)
    candidates = {name: taking(name, [0.0] * 2) for name in "ab"}
    measure_interleaved(candidates, calls=1, warmup=1, clock=clock, on_call=lambda: log.append("told"))
    warmup = ["clock", "a", "clock", "clock", "b", "clock"]
    assert log == [*warmup, "clock", "a", "clock", "told", "clock", "b", "clock", "told"]


def test_a_time_limit_ends_the_rounds_but_not_before_three() -> None:
    for limit, done in [(0.0, 3), (6.5, 4), (100.0, 10)]:
        clock, taking = rig([])
        candidates = {"slow": taking("slow", [1.5] * 10), "fast": taking("fast", [0.5] * 10)}
        latency = measure_interleaved(candidates, calls=10, warmup=0, limit_s=limit, clock=clock)
        assert {name: each.calls for name, each in latency.items()} == {"slow": done, "fast": done}


def test_refuses_no_calls() -> None:
    with pytest.raises(InvalidInput, match="latency calls: expected at least 1, got 0; time more calls"):
        measure_interleaved({}, calls=0)


def test_a_cpu_needs_no_waiting_and_a_gpu_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_synchroniser(torch.device("cpu"))() is None
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device_synchroniser(torch.device("cuda:1"))()
    assert waited == [torch.device("cuda:1")]


def test_stages_of_a_call_add_up_to_it() -> None:
    now = [0.0]

    def stage(seconds: float) -> Callable[[list[float]], list[float]]:
        def run(passed: list[float]) -> list[float]:
            now[0] += seconds
            return [*passed, seconds]

        return run

    seen: list[list[float]] = []
    stages = {"encode": stage(0.5), "denoise": stage(4.0), "decode": seen.append}
    latency = measure_stages(stages, [], calls=3, warmup=2, clock=lambda: now[0])
    assert seen == [[0.5, 4.0]] * 5
    assert {name: each.p50_ms for name, each in latency.items()} == {
        "encode": 500,
        "denoise": 4000,
        "decode": 0,
        "total": 4500,
    }
    assert {name: each.warmup_s for name, each in latency.items()} == {
        "encode": 1,
        "denoise": 8,
        "decode": 0,
        "total": 9,
    }


def test_stages_read_the_clock_after_the_device() -> None:
    log: list[str] = []
    stages = {name: lambda passed, name=name: log.append(name) for name in ("a", "b")}
    measure_stages(
        stages,
        None,
        calls=1,
        warmup=0,
        synchronise=lambda: log.append("sync"),
        clock=lambda: log.append("clock") or 0.0,
    )
    assert log == ["sync", "clock", "a", "sync", "clock", "b", "sync", "clock"]


def test_stages_without_a_call_refuse() -> None:
    with pytest.raises(InvalidInput, match="latency calls: expected at least 1, got 0"):
        measure_stages({"a": lambda passed: passed}, None, calls=0)
