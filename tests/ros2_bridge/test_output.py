"""How motion ends: what an output sends so that nothing goes on by itself, wherever the loop stops driving."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bac.control import Request
from bac.errors import Mismatch
from tests.ros2_bridge.toys import Bench, chunk, driving, loading

MakeBench = Callable[..., Bench]


class Broken:
    """A predictor that fails when it is told to, or after so many chunks."""

    def __init__(self, after: float = float("inf")) -> None:
        self.now = False
        self._left = after

    def __call__(self, request: Request, schedule: int, seed: int | None) -> np.ndarray:
        self._left -= 1
        if self.now or self._left < 0:
            raise RuntimeError("CUDA error: out of memory")
        return chunk(request, schedule, seed)


def _stop(node: Bench, broken: Broken) -> None:
    broken.now = True
    node.until(lambda: node.status()["motion"] == "stopped")
    # The state is told before the loop has ended.
    node.core.deactivate()


def _deactivate(node: Bench, broken: Broken) -> None:
    node.core.deactivate()


def _shutdown(node: Bench, broken: Broken) -> None:
    node.core.shutdown()


def _reset(node: Bench, broken: Broken) -> None:
    node.core.reset()
    node.await_status(motion="waiting", episode=1)


def _raise(node: Bench, broken: Broken) -> None:
    """Let the loop's thread die of what its clock raises."""

    def fail() -> int:
        raise RuntimeError("no clock")

    driver = node.core.driver
    assert driver is not None
    loop = driver._loop
    assert loop is not None
    loop.sense = lambda observation: fail()  # type: ignore[method-assign]
    node.tick()
    assert node.await_status(motion="stopped")["reason"] == "RuntimeError: no clock"


ENDS = {"stop": _stop, "deactivate": _deactivate, "shutdown": _shutdown, "reset": _reset, "exception": _raise}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda told: None)


@pytest.mark.parametrize("end", list(ENDS))
@pytest.mark.parametrize(("hold", "rests"), [("zero", [[0.0, 0.0]]), ("repeat", []), ("silent", [])])
def test_velocities_end_with_zeros_and_positions_as_they_are(
    bench: MakeBench, hold: str, rests: list[list[float]], end: str
) -> None:
    broken = Broken()
    node = driving(bench(loading(broken), threaded=end == "stop"), hold=hold, replan_ticks=2, deadline_ticks=100)
    node.until(lambda: node.status()["motion"] == "executing")
    ENDS[end](node, broken)
    sent = node.actions()
    moved = [action for action in sent if action != [0.0, 0.0]]
    assert sent[len(sent) - len(rests) :] == rests
    assert [0.0, 0.0] not in moved
    assert node.core.figures().get("sent", len(sent)) == len(sent)
    # Once: from rest there is nothing to end.
    node.core.shutdown()
    assert node.actions() == sent


def test_what_rests_is_not_told_to_rest_again(bench: MakeBench) -> None:
    node = driving(bench(), hold="zero", replan_ticks=100)
    node.until(lambda: node.status()["motion"] == "holding", None)
    sent = node.actions()
    assert sent[-1] == [0.0, 0.0]
    node.core.deactivate()
    assert node.actions() == sent


@pytest.mark.parametrize("hold", ["repeat", "silent"])
@pytest.mark.parametrize("end", list(ENDS))
def test_a_trajectory_that_goes_on_ends_at_the_last_executed_action(bench: MakeBench, hold: str, end: str) -> None:
    # On a busy machine the first chunk is so late that the next is asked for at once: it must fail already.
    broken = Broken(after=1) if end == "stop" else Broken()
    changed: dict[str, Any] = {"hold": hold, "output": "trajectory", "action_names": ["x", "y"]}
    node = bench(loading(broken), threaded=end == "stop")
    driving(node, replan_ticks=5 if end == "stop" else 100, deadline_ticks=100, **changed)
    if end != "stop":
        node.tick()
        node.tick()
    ENDS[end](node, broken)
    chunks = [[list(point.positions) for point in message.points] for message in node.transport.sent["action"]]
    assert len(chunks[0]) == 8
    if end == "stop":
        # Inference died and the tail was executed to its end: there is nothing to end.
        assert (len(chunks), node.core.figures()["state"]) == (1, "inactive")
    else:
        assert chunks[1:] == [[chunks[0][2]]]
        assert node.transport.sent["action"][1].points[0].time_from_start.nanosec == 100_000_000


@pytest.mark.parametrize("hold", ["repeat", "silent"])
def test_a_trajectory_ends_where_the_sensors_fall_silent(bench: MakeBench, hold: str) -> None:
    node = driving(bench(), hold=hold, output="trajectory", action_names=["x", "y"], replan_ticks=100)
    node.until(lambda: node.status()["motion"] == "holding", None)
    first, last = node.transport.sent["action"]
    executed = node.core.figures()["ticks_executed"]
    assert isinstance(executed, int)
    assert len(first.points) == 8 > executed
    assert [list(point.positions) for point in last.points] == [list(first.points[executed - 1].positions)]
    for _ in range(3):
        node.tick(None)
    assert len(node.transport.sent["action"]) == 2


def test_the_first_trajectory_of_an_episode_is_sent_though_the_last_episode_s_had_its_number(bench: MakeBench) -> None:
    changed: dict[str, Any] = {"output": "trajectory", "action_names": ["x", "y"], "replan_ticks": 100}
    node = driving(bench(latency=lambda request: 0.0), **changed)
    node.core.reset()
    node.await_status(motion="waiting", episode=1)
    node.begin(50.0)
    assert [len(message.points) for message in node.transport.sent["action"]] == [8, 1, 8]


@pytest.mark.parametrize(("replan_ticks", "deadline_s"), [(0, 0.7), (10, 1.3)])
def test_a_trajectory_s_deadline_is_that_of_a_chunk(bench: MakeBench, replan_ticks: int, deadline_s: float) -> None:
    node = bench()
    node.drive(output="trajectory", action_names=["x", "y"], replan_ticks=replan_ticks, deadline_ticks=3)
    assert node.transport.profiles["action"].deadline_s == pytest.approx(deadline_s, rel=1e-12)  # a rounding


def test_a_reset_is_refused_where_nothing_drives_any_more(bench: MakeBench) -> None:
    node = driving(bench())
    _raise(node, Broken())
    with pytest.raises(Mismatch) as refused:
        node.core.reset()
    told = "reset: expected a loop that runs, got RuntimeError: no clock; deactivate and activate."
    assert str(refused.value) == told
    assert node.status()["episode"] == 0
    node.core.deactivate()
    node.core.activate()
    node.await_status(motion="waiting")
    node.begin()
    count = len(node.actions())
    node.until(lambda: len(node.actions()) > count)


def test_chunks_go_out_as_trajectories(bench: MakeBench) -> None:
    node = bench()
    node.drive(output="trajectory", action_names=["x", "y"], replan_ticks=100, observation_age_ms=1e6)
    node.begin()
    # Nothing new is seen, so that nothing new is asked for.
    node.until(lambda: bool(node.transport.sent["action"]), None)
    (first,) = node.transport.sent["action"]
    assert [point.positions[0] for point in first.points] == [7 + 100 * i for i in range(8)]
    assert [point.time_from_start.nanosec for point in first.points[:2]] == [100_000_000, 200_000_000]
    node.until(lambda: len(node.transport.sent["action"]) == 2, None)
    # Where no action is due any more, a trajectory of one point ends the motion.
    assert [list(point.positions) for point in node.transport.sent["action"][1].points] == [[707, 0]]
    for _ in range(3):
        node.tick(None)
    assert len(node.transport.sent["action"]) == 2
