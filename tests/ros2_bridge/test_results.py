"""The figures that are committed in ``docs/results/ros2``, held to what the bridge was asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "ros2"


def _read(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def test_every_result_that_is_committed_is_held_to_something() -> None:
    assert {path.stem for path in RESULTS.iterdir()} == {"closed_loop", "evaluation", "overhead"}


def test_node_and_evaluation_score_alike_at_the_same_latencies() -> None:
    driven, evaluated = _read("closed_loop"), _read("evaluation")
    assert driven["task"] == evaluated["task"] == "push_t"
    assert [each["seed"] for each in driven["episodes"]] == [evaluated["seed"] + number for number in range(10)]
    assert evaluated["episodes"] == len(evaluated["scores"]) == 10
    assert driven["node"]["cache"].startswith("bac-")
    assert driven["node"]["transport"] == "dds"
    control = evaluated["control"]["cached"]
    assert (control["mode"], control["rate_hz"]) == ("realtime", 10.0)
    # The evaluation's trace is rounded to microseconds.
    np.testing.assert_allclose(control["trace_ms"], driven["control"]["cached"]["trace_ms"], rtol=0, atol=0.001)
    mean = np.mean([each["score"] for each in driven["episodes"]])
    assert driven["score"]["mean"] == pytest.approx(mean)
    assert evaluated["score"]["mean"] == pytest.approx(np.mean(evaluated["scores"]), abs=1e-6)
    assert abs(mean - evaluated["score"]["mean"]) <= 0.05


def test_no_tick_of_the_closed_loop_is_lost() -> None:
    driven = _read("closed_loop")
    assert driven["ticks_lost"] == {"missed": 0, "surplus": 0, "overruns": 0}


def test_the_node_of_the_closed_loop_acts_at_every_tick() -> None:
    driven = _read("closed_loop")
    node, episodes = driven["node"], driven["episodes"]
    assert driven["ticks_lost"] == {
        name: sum(each[name] for each in episodes) for name in ("missed", "surplus", "overruns")
    }
    assert node["ticks_skipped"] == node["stops"] == 0
    assert node["sent"] == node["ticks_executed"] + node["ticks_held"] == node["ticks"] - node["ticks_waited"]
    assert not [name for name in node if name.startswith("refused") and node[name]]
    # A step without an action repeats the last one; what the node sent after an episode's end was for no step.
    assert sum(each["steps"] - each["missed"] + each["surplus"] for each in episodes) <= node["sent"]


@pytest.mark.parametrize(
    ("way", "limit_ms"),
    [("in_state", 2.0), ("in_image_480x640", 8.0), ("out_action", 2.0), ("out_trajectory", 2.0)],
)
def test_the_overhead_is_within_its_limit(way: str, limit_ms: float) -> None:
    told = _read("overhead")[f"{way}_ms"]
    assert told["calls"] >= 1000
    assert 0 < told["p50"] <= told["p99"] < limit_ms


def test_no_way_of_the_overhead_is_without_a_limit() -> None:
    ways = {name for name in _read("overhead") if name.endswith("_ms")}
    assert ways == {"in_state_ms", "in_image_480x640_ms", "out_action_ms", "out_trajectory_ms"}
