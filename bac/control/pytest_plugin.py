"""A pytest plug-in: latency budgets as tests, to run on the robot's own computer.

It comes with the package. In a test suite::

    @pytest.mark.latency_budget(p99_ms=80, rate_hz=10)
    def test_a_chunk_is_there_in_time(latency_budget):
        policy = bac.accelerate(load_policy("push_t"), schedule="bac_weighted-s10")
        latency_budget(lambda: policy.predict(observation))

The test fails with the verdict and a histogram when the 99th percentile exceeds the budget.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bac.control.clock import Clock, MonotonicClock
from bac.control.latency_budget import LatencyBudget, LatencyVerdict
from bac.errors import BacError

_MARKER = "latency_budget"


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        f"{_MARKER}(p99_ms, rate_hz=None, calls=200, warmup=10): what the call that the test gives to the fixture "
        f"{_MARKER} may take, and how often it begins",
    )


@pytest.fixture
def latency_clock() -> Clock:
    """The clock that calls are timed on; override it to test without real time."""
    return MonotonicClock()


@pytest.fixture
def latency_budget(
    request: pytest.FixtureRequest, latency_clock: Clock
) -> Callable[[Callable[[], object]], LatencyVerdict]:
    """Times what it is given, fails the test if the budget of the marker is exceeded, returns the verdict."""
    marker = request.node.get_closest_marker(_MARKER)
    if marker is None:
        pytest.fail(f"the fixture {_MARKER} needs the marker: @pytest.mark.{_MARKER}(p99_ms=..., rate_hz=...)", False)
    options = dict(zip(("p99_ms", "rate_hz"), marker.args, strict=False)) | marker.kwargs
    calls, warmup = options.pop("calls", 200), options.pop("warmup", 10)
    try:
        budget = LatencyBudget(**options)
    except (BacError, TypeError) as refusal:
        pytest.fail(f"@pytest.mark.{_MARKER}: {refusal}", False)

    def check(call: Callable[[], object]) -> LatencyVerdict:
        verdict = budget.measure(call, calls=calls, warmup=warmup, clock=latency_clock)
        if not verdict.kept:
            pytest.fail(f"{verdict}\n{verdict.histogram()}", False)
        return verdict

    return check
