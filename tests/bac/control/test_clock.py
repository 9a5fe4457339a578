import random

import pytest

from bac.control import MonotonicClock, TickGrid, VirtualClock, ticks_for
from bac.errors import InvalidInput


@pytest.mark.parametrize("rate_hz", [10.0, 30.0, 1000 / 7, 29.97, 1e6])
def test_ticks_do_not_drift_and_index_undoes_at(rate_hz: float) -> None:
    grid = TickGrid(origin_ns=12_345, rate_hz=rate_hz)
    draw = random.Random(0)
    for tick in [*range(50), *(draw.randrange(10**9) for _ in range(500))]:
        begins = grid.at_ns(tick)
        exact = grid.period_ns * tick + 12_345
        assert 0 <= exact - begins < 1
        assert grid.index(begins) == tick
        assert grid.index(begins - 1) == tick - 1
        assert grid.index(grid.at_ns(tick + 1) - 1) == tick


def test_whole_periods_are_exact() -> None:
    grid = TickGrid(0, 10.0)
    assert [grid.at_ns(tick) for tick in (0, 1, 36_000)] == [0, 100_000_000, 3_600_000_000_000]


def test_latency_in_ticks_rounds_up() -> None:
    assert [ticks_for(ms, 10.0) for ms in (0, 0.001, 99.9, 100, 100.1, 451)] == [0, 1, 1, 1, 2, 5]


def test_virtual_clock_moves_only_when_told() -> None:
    clock = VirtualClock(5)
    clock.sleep_until_ns(3)
    assert clock.now_ns() == 5
    clock.sleep_until_ns(9)
    clock.advance_ns(2)
    assert clock.now_ns() == 11
    with pytest.raises(InvalidInput, match=r"^virtual clock: expected time to go on, got -1 ns; add time\.$"):
        clock.advance_ns(-1)


def test_monotonic_clock_has_reached_what_it_slept_for() -> None:
    clock = MonotonicClock()
    when = clock.now_ns() + 2_000_000
    clock.sleep_until_ns(when)
    assert clock.now_ns() >= when
    clock.sleep_until_ns(0)


@pytest.mark.parametrize("rate_hz", [0.0, -1.0, 2e6, float("nan"), float("inf")])
def test_a_rate_that_is_none_refuses(rate_hz: float) -> None:
    with pytest.raises(InvalidInput, match=r"^rate_hz: expected more than 0, at most 1e6, got"):
        TickGrid(0, rate_hz)


@pytest.mark.parametrize("latency_ms", [-1.0, float("nan"), float("inf")])
def test_a_latency_that_is_none_refuses(latency_ms: float) -> None:
    with pytest.raises(InvalidInput, match=r"^latency: expected at least 0 ms, finite, got"):
        ticks_for(latency_ms, 10.0)
