from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from bac.control import LatencyBudget, VirtualClock
from bac.errors import InvalidInput

pytest_plugins = ["pytester"]


class Call:
    """Lets virtual time pass; writes down when it began."""

    def __init__(self, clock: VirtualClock, taken_ms: Iterable[float]) -> None:
        self.clock, self.taken_ms = clock, iter(taken_ms)
        self.began_ms: list[float] = []

    def __call__(self) -> None:
        self.began_ms.append(self.clock.now_ns() / 1e6)
        self.clock.advance_ns(round(next(self.taken_ms) * 1e6))


def cycle(*values: float) -> Iterator[float]:
    while True:
        yield from values


def measured(budget: LatencyBudget, taken_ms: Iterable[float], calls: int = 100, warmup: int = 0):
    clock = VirtualClock()
    call = Call(clock, taken_ms)
    return budget.measure(call, calls=calls, warmup=warmup, clock=clock), call


def test_calls_begin_at_the_rate_and_overruns_skip_a_tick() -> None:
    verdict, call = measured(LatencyBudget(80, 10), [30, 130, 30, *[30] * 97])
    assert call.began_ms[:5] == [0, 100, 300, 400, 500]
    assert (verdict.overruns, verdict.p50_ms, verdict.p99_ms, verdict.kept) == (1, 30, 30, True)
    assert str(verdict) == (
        "latency budget kept: p99 30.0 ms of 80 ms (p50 30.0, max 130.0, 100 calls at 10 Hz, 1 overrun(s))"
    )


def test_without_a_rate_calls_follow_each_other_and_warm_up_is_not_timed() -> None:
    verdict, call = measured(LatencyBudget(80), [500, 500, *[20] * 100], warmup=2)
    assert call.began_ms[:4] == [0, 500, 1000, 1020]
    assert max(verdict.taken_ms) == 20
    assert verdict.overruns == 0


def test_one_slow_call_of_a_hundred_is_within_p99_and_two_are_not() -> None:
    assert measured(LatencyBudget(80, 10), [90, *[10] * 99])[0].kept
    exceeded, _ = measured(LatencyBudget(80, 10), [90, 90, *[10] * 98])
    assert not exceeded.kept
    assert str(exceeded).startswith("latency budget exceeded: p99 90.0 ms of 80 ms")
    assert measured(LatencyBudget(90, 10), [90, 90, *[10] * 98])[0].kept


def test_histogram_counts_every_call_and_marks_the_budget() -> None:
    verdict, _ = measured(LatencyBudget(50, 10), cycle(10, 20, 30, 40), calls=200)
    lines = verdict.histogram().splitlines()
    assert len(lines) == 20
    assert sum(int(line.split()[4]) for line in lines) == 200
    assert [line for line in lines if "<- budget" in line] == lines[-1:]
    assert len(measured(LatencyBudget(50), [50] * 100)[0].histogram().splitlines()) == 20
    for taken_ms, line in (([*range(50, 150)], 0), ([10] * 100, 19)):  # the budget is below, or above, them all
        lines = measured(LatencyBudget(20), taken_ms)[0].histogram().splitlines()
        assert [number for number, told in enumerate(lines) if "<- budget" in told] == [line]


def test_a_call_that_begins_late_overruns_though_it_takes_no_longer() -> None:
    class Sleepy(VirtualClock):
        def sleep_until_ns(self, when_ns: int) -> None:
            super().sleep_until_ns(when_ns + 30_000_000)

    clock = Sleepy()
    verdict = LatencyBudget(90, 10).measure(Call(clock, [80] * 100), calls=100, warmup=0, clock=clock)
    assert (verdict.p99_ms, verdict.overruns) == (80, 100)


@pytest.mark.parametrize(
    ("p99_ms", "rate_hz"), [(0, None), (-1, 10), (101, 10), (float("nan"), 10), (float("inf"), None)]
)
def test_a_budget_that_is_none_refuses(p99_ms: float, rate_hz: float | None) -> None:
    with pytest.raises(
        InvalidInput, match=r"^latency budget: expected more than 0 ms(, at most the period of 100 ms)?, "
    ):
        LatencyBudget(p99_ms, rate_hz)


def test_too_few_calls_or_no_latencies_refuse() -> None:
    with pytest.raises(InvalidInput, match=r"^latency calls: expected at least 100 timed and 0 warm-up calls, got 99"):
        measured(LatencyBudget(80), [1] * 99, calls=99)
    for bad in ([], [float("nan")], [-1.0]):
        with pytest.raises(InvalidInput, match=r"^latencies: expected at least one, finite, in ms"):
            LatencyBudget(80).judge(bad)


CONFTEST = """
    import pytest
    from bac.control import VirtualClock

    @pytest.fixture
    def latency_clock():
        return VirtualClock()
"""
SUITE = """
    import pytest

    @pytest.mark.latency_budget(p99_ms=80, rate_hz=10, calls=100)
    def test_kept(latency_budget, latency_clock):
        verdict = latency_budget(lambda: latency_clock.advance_ns(60_000_000))
        assert (verdict.p99_ms, len(verdict.taken_ms)) == (60, 100)
        assert latency_clock.now_ns() == 9_960_000_000 + 10 * 60_000_000

    @pytest.mark.latency_budget(80, 10)
    def test_exceeded(latency_budget, latency_clock):
        latency_budget(lambda: latency_clock.advance_ns(81_000_000))

    @pytest.mark.latency_budget(80, 10, 120, 3)
    def test_positional(latency_budget, latency_clock):
        assert len(latency_budget(lambda: latency_clock.advance_ns(60_000_000)).taken_ms) == 120
        assert latency_clock.now_ns() == 3 * 60_000_000 + 11_960_000_000

    @pytest.mark.latency_budget(80, 10)
    def test_exceeded_where_nobody_hears(latency_budget, latency_clock):
        with pytest.raises(BaseException):
            latency_budget(lambda: latency_clock.advance_ns(82_000_000))

    @pytest.mark.latency_budget(p99_ms=80)
    def test_without_the_fixture():
        pass

    @pytest.mark.latency_budget(p99_ms=80)
    def test_measures_nothing(latency_budget):
        pass

    @pytest.mark.latency_budget(p99_ms=80)
    def test_skips_itself(latency_budget):
        pytest.skip("no accelerator here")

    @pytest.mark.skip
    @pytest.mark.latency_budget(p99_ms=80)
    def test_skipped():
        pass

    @pytest.mark.latency_budget(p99_ms=80)
    def test_fails_before_it_measures(latency_budget):
        raise RuntimeError("no robot")

    def test_unmarked(latency_budget):
        pass

    @pytest.mark.latency_budget(p99_ms=101, rate_hz=10)
    def test_impossible(latency_budget):
        pass

    @pytest.mark.latency_budget(p99=80)
    def test_misspelt(latency_budget):
        pass

    @pytest.mark.latency_budget(80, 10, 120, 3, "more")
    def test_too_many(latency_budget):
        pass
"""


def test_the_plugin_passes_and_fails_tests_by_their_budget(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Named here and not found by its entry point, so that this holds in a checkout that was never installed.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_inprocess("-p", "bac.control.pytest_plugin", "--strict-markers")
    # What measures nothing, or hides its verdict, passes its body and fails at its teardown.
    result.assert_outcomes(passed=4, failed=2, skipped=2, errors=7)
    result.stdout.fnmatch_lines_random(
        [
            "latency budget exceeded: p99 81.0 ms of 80 ms (p50 81.0, max 81.0, 200 calls at 10 Hz, 0 overrun(s))",
            "*200 ####*",
            "the fixture latency_budget needs the marker: @pytest.mark.latency_budget(p99_ms=..., rate_hz=...)",
            "@pytest.mark.latency_budget: latency budget: expected more than 0 ms, at most the period of 100 ms, *",
            "@pytest.mark.latency_budget: *unexpected keyword argument 'p99'",
            "@pytest.mark.latency_budget: *takes from 1 to 4 positional arguments but 5 were given",
            "@pytest.mark.latency_budget: expected a test that requests the fixture latency_budget, got "
            "test_without_the_fixture; take latency_budget as an argument and call it.",
            "fixture latency_budget: expected a call to time, got none; call latency_budget with what is to be timed.",
            "latency budget exceeded: p99 82.0 ms of 80 ms (p50 82.0, max 82.0, 200 calls at 10 Hz, 0 overrun(s))",
            "*ERROR at teardown of test_exceeded_where_nobody_hears*",
            "*ERROR at teardown of test_measures_nothing*",
            "*ERROR at setup of test_without_the_fixture*",
        ]
    )


def test_the_plugin_is_an_entry_point_of_the_package() -> None:
    from pathlib import Path

    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"bac_latency_budget": "bac.control.pytest_plugin"}
