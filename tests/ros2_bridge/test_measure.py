"""The measurements measure what they say; how long it takes is for ``docs/results/ros2``."""

import json
from pathlib import Path

import pytest

pytest.importorskip("rosbags")

from bac.errors import InvalidInput
from ros2_bridge.measure import main, overhead


def test_overhead_is_told_for_every_way(tmp_path: Path) -> None:
    main(["overhead", "--calls", "100", "--output", str(tmp_path / "overhead.json")])
    told = json.loads((tmp_path / "overhead.json").read_text())
    ways = {"in_state_ms", "in_image_480x640_ms", "out_action_ms", "out_trajectory_ms"}
    assert told.keys() == ways | {"provenance"}
    for way in ways:
        assert 0 < told[way]["p50"] <= told[way]["p99"] <= told[way]["max"]
        assert told[way]["calls"] == 100
    assert told["provenance"]["command"].startswith("python -m ros2_bridge.measure overhead --calls 100")


def test_too_few_calls_have_no_99th_percentile() -> None:
    with pytest.raises(InvalidInput, match="at least 100"):
        overhead(99)


def test_a_node_that_refuses_ends_the_closed_loop_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cyclonedds")
    output = tmp_path / "loop.json"
    with pytest.raises(SystemExit, match=r"^error: closed loop: expected episodes to the end, got a node that ended"):
        main(["closed_loop", "--cache", "nonsense", "--output", str(output)])
    assert "error: cache: expected none or one of" in capfd.readouterr().err
    assert not output.exists()
