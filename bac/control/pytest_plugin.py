"""A pytest plug-in: latency budgets as tests, to run on the robot's own computer.

It comes with the package. In a test suite::

    @pytest.mark.latency_budget(p99_ms=80, rate_hz=10)
    def test_a_chunk_is_there_in_time(latency_budget):
        policy = bac.accelerate(load_policy("push_t"), schedule="bac_weighted-s10")
        latency_budget(lambda: policy.predict(observation))

The test fails with the verdict and a histogram when the 99th percentile exceeds the budget. A marked test that measures
nothing does not pass either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from bac.control.clock import Clock, MonotonicClock
from bac.control.latency_budget import LatencyBudget, LatencyVerdict
from bac.errors import BacError, sentence

if TYPE_CHECKING:
    from collections.abc import Generator

    from pluggy import Result

_MARKER = "latency_budget"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        f"{_MARKER}(p99_ms, rate_hz=None, calls=200, warmup=10): what the call that the test gives to the fixture "
        f"{_MARKER} may take, and how often it begins",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a marked test that does not request the fixture: it would pass untimed."""
    marked = item.get_closest_marker(_MARKER) is not None
    if marked and _MARKER not in getattr(item, "fixturenames", ()):
        told = sentence(
            f"@pytest.mark.{_MARKER}",
            expected=f"a test that requests the fixture {_MARKER}",
            got=item.name,
            mend=f"take {_MARKER} as an argument and call it",
        )
        pytest.fail(told, False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Result[None], None]:
    """Note that the test's body passed: one that failed or skipped itself need not have measured."""
    outcome = yield
    check = getattr(item, "funcargs", {}).get(_MARKER)
    if isinstance(check, _Check):
        check.passed = outcome.excinfo is None


@pytest.fixture
def latency_clock() -> Clock:
    """The clock that calls are timed on; override it to test without real time."""
    return MonotonicClock()


@pytest.fixture
def latency_budget(
    request: pytest.FixtureRequest, latency_clock: Clock
) -> Iterator[Callable[[Callable[[], object]], LatencyVerdict]]:
    """Times what it is given, fails the test if the budget of the marker is exceeded, returns the verdict.

    A test that passes and never called it fails at its teardown, and so does one that passes over its budget.
    """
    marker = request.node.get_closest_marker(_MARKER)
    if marker is None:
        pytest.fail(f"the fixture {_MARKER} needs the marker: @pytest.mark.{_MARKER}(p99_ms=..., rate_hz=...)", False)
    try:
        check = _Check(latency_clock, *_options(*marker.args, **marker.kwargs))
    except (BacError, TypeError) as refusal:
        pytest.fail(f"@pytest.mark.{_MARKER}: {refusal}", False)
    yield check
    if check.passed and check.exceeded is not None:
        pytest.fail(check.exceeded, False)  # raised where it did not end the test: in another thread, or caught
    if check.passed and not check.measured:
        mend = f"call {_MARKER} with what is to be timed"
        pytest.fail(sentence(f"fixture {_MARKER}", expected="a call to time", got="none", mend=mend), False)


def _options(
    p99_ms: float, rate_hz: float | None = None, calls: int = 200, warmup: int = 10
) -> tuple[LatencyBudget, int, int]:
    """Read the marker's arguments as Python reads those of a call, so that none is dropped."""
    return LatencyBudget(p99_ms, rate_hz), calls, warmup


class _Check:
    """The fixture's value; ``passed`` is of the test's body."""

    def __init__(self, clock: Clock, budget: LatencyBudget, calls: int, warmup: int) -> None:
        self._clock, self._budget, self._calls, self._warmup = clock, budget, calls, warmup
        self.passed, self.measured = False, 0
        self.exceeded: str | None = None

    def __call__(self, call: Callable[[], object]) -> LatencyVerdict:
        verdict = self._budget.measure(call, calls=self._calls, warmup=self._warmup, clock=self._clock)
        self.measured += 1
        if not verdict.kept:
            self.exceeded = f"{verdict}\n{verdict.histogram()}"
            pytest.fail(self.exceeded, False)
        return verdict
