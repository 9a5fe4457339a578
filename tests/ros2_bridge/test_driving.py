"""The node at work on a clock that the test moves: which action at which tick, and everything that must stop it."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bac.control import Request
from bac.errors import Mismatch
from ros2_bridge.diagnostics import read_diagnostics
from tests.ros2_bridge.toys import CACHES, Bench, chunk, driving, loading

MakeBench = Callable[..., Bench]


def test_actions_come_one_per_tick_in_the_chunk_s_order(bench: MakeBench) -> None:
    node = driving(bench(), replan_ticks=100)
    for _ in range(3):
        node.tick()
    # The robot rested until the first chunk came: it begins with its first action.
    assert node.actions()[:4] == [[7, 0], [107, 0], [207, 0], [307, 0]]


def test_the_history_is_of_ticks(bench: MakeBench) -> None:
    asked: list[np.ndarray] = []

    def compute(request: Request, schedule: int, seed: int | None) -> np.ndarray:
        asked.append(request.observation.values["place"][:, 0])
        return chunk(request, schedule, seed)

    node = bench(loading(compute))
    node.drive(replan_ticks=1)
    node.begin(1.0)
    values = iter(range(2, 1000))
    while len(asked) < 4:
        node.tick(float(next(values)))
    assert asked[0].tolist() == [1, 1]
    assert all(newest - older == 1 for older, newest in asked[1:])


def test_stale_input_stops_motion_says_so_and_motion_goes_on(bench: MakeBench) -> None:
    node = driving(bench(), replan_ticks=8)
    driver = node.core.driver
    assert driver is not None
    before, last = driver.counters(), node.actions()[-1]
    while node.status()["motion"] == "executing":
        last = node.actions()[-1]
        node.tick(None)
    assert node.status()["motion"] == "holding"
    assert node.status()["reason"] == "the newest observation is stale"
    after = driver.counters()
    # observation_age_ms is 250: at the two ticks after the last observation's it is 150 and 250 ms old, then 350.
    assert (after["executed"] - before["executed"], after["held"] - before["held"]) == (2, 1)
    assert node.actions()[-1] == last
    node.core.publish_diagnostics()
    told = read_diagnostics(node.transport.sent["/diagnostics"][-1])
    assert (told["level"], told["message"]) == ("STALE", "the newest observation is stale")
    assert (told["ticks_stale"], told["ticks_held"]) == ("1", "1")
    node.until(lambda: node.status()["motion"] == "executing")


def test_observations_that_are_old_when_they_come_stop_motion_like_none(bench: MakeBench) -> None:
    node = driving(bench(), replan_ticks=8, hold="silent")
    driver = node.core.driver
    assert driver is not None
    before, sent = driver.counters(), len(node.actions())
    # All sensed at the same time, the last of them 300 ms ago; from then on every message is that late.
    for age_ms in (100, 200, 300):
        node.tick(age_ms=age_ms)
    assert (node.status()["motion"], node.status()["reason"]) == ("holding", "the newest observation is stale")
    assert len(node.actions()) == sent + 2
    for x in range(20):
        node.tick(float(x), age_ms=300)
    after = driver.counters()
    assert node.status()["motion"] == "holding"
    assert len(node.actions()) == sent + 2
    assert (after["executed"] - before["executed"], after["held"] - before["held"]) == (2, 21)
    assert after["requests"] == before["requests"]
    assert after["refused_observations"] == 0
    node.core.publish_diagnostics()
    told = read_diagnostics(node.transport.sent["/diagnostics"][-1])
    assert (told["level"], told["message"]) == ("STALE", "the newest observation is stale")
    assert told["ticks_stale"] == "21"
    # 50 ms from a message to its tick.
    assert told["observation_age_p99_ms"] == "350.000"
    assert not [name for name in told if name.startswith("refused_") and told[name] not in {"0", ""}]
    node.until(lambda: node.status()["motion"] == "executing")


def test_the_age_of_an_observation_is_that_of_its_stamp(bench: MakeBench) -> None:
    node = bench()
    node.drive()
    node.begin(age_ms=130.0)  # at the first tick, 20 ms later, as old as at every other
    for _ in range(10):
        node.tick(age_ms=100.0)
    assert node.status()["motion"] == "executing"
    node.core.publish_diagnostics()
    told = read_diagnostics(node.transport.sent["/diagnostics"][-1])
    assert (told["observation_age_p50_ms"], told["observation_age_p99_ms"]) == ("150.000", "150.000")
    assert told["ticks_stale"] == "0"


@pytest.mark.parametrize(("hold", "sent"), [("repeat", "last"), ("zero", [0.0, 0.0]), ("silent", None)])
def test_what_is_sent_at_a_tick_without_an_action(bench: MakeBench, hold: str, sent: Any) -> None:
    node = driving(bench(), hold=hold, replan_ticks=100)
    while node.status()["motion"] == "executing":
        count, last = len(node.actions()), node.actions()[-1]
        node.tick(None)
    after = node.actions()[count:]
    assert after == ([] if sent is None else [last if sent == "last" else sent])


def test_no_action_comes_from_refused_input(bench: MakeBench) -> None:
    node = bench()
    node.drive()
    node.transport.deliver("joint_states", node.joints())
    for bad in (node.place(np.nan), node.place(age_ms=-1000)):
        node.transport.deliver("place", bad)
    node.transport.listeners["place"][1]("no message")
    for _ in range(5):
        node.clock.advance_ms(100)
    assert node.actions() == []
    assert node.status()["motion"] == "waiting"
    node.core.publish_diagnostics()
    told = read_diagnostics(node.transport.sent["/diagnostics"][-1])
    assert [told[f"refused_{kind}"] for kind in ("not_finite", "future", "malformed")] == ["1", "1", "1"]
    assert (told["received"], told["sent"]) == ("4", "0")


def test_a_chunk_with_nan_or_beyond_the_limits_never_moves_the_robot(bench: MakeBench) -> None:
    bad = [np.full((8, 2), np.nan, np.float32), np.full((8, 2), 1e6, np.float32)]

    def compute(request: Request, schedule: int, seed: int | None) -> np.ndarray:
        return bad[request.number] if request.number < len(bad) else chunk(request, schedule, seed)

    node = bench(loading(compute))
    driving(node, action_low=[-1000.0, -1.0], action_high=[1000.0, 1.0])
    assert node.actions()[0] == [7, 0]
    driver = node.core.driver
    assert driver is not None
    assert driver.counters()["refused"] == 2
    assert driver.counters()["requests"] >= 3


def test_reset_begins_a_new_episode_with_another_seed(bench: MakeBench) -> None:
    seeds: list[int | None] = []

    def compute(request: Request, schedule: int, seed: int | None) -> np.ndarray:
        seeds.append(seed)
        return chunk(request, schedule, seed)

    node = driving(bench(loading(compute)), noise_seed=100)
    count = len(node.actions())
    node.core.reset()
    assert node.await_status(episode=1)["motion"] == "waiting"
    node.begin(50.0)
    node.until(lambda: len(node.actions()) > count, 50.0)
    assert node.actions()[count] == [50, 0]
    assert set(seeds) == {100, 101}
    assert seeds == sorted(seeds, key=str)


def test_counters_survive_a_reset(bench: MakeBench) -> None:
    node = driving(bench())
    driver = node.core.driver
    assert driver is not None
    before = driver.counters()["executed"]
    assert before == len(node.actions()) > 0
    node.core.reset()
    node.await_status(episode=1)
    assert driver.counters()["executed"] == before


def test_the_schedule_is_switched_without_a_restart(bench: MakeBench) -> None:
    node = driving(bench(), replan_ticks=1)
    assert {action[1] for action in node.actions()} == {0}
    assert node.core.set_cache("late") == "late-s10"
    node.until(lambda: node.actions()[-1][1] == 2)
    assert node.status()["cache"] == "late-s10"
    with pytest.raises(Mismatch, match="bac-s10"):
        node.core.set_cache("uniform")
    assert node.status()["cache"] == "late-s10"
    node.core.deactivate()
    node.core.set_cache(CACHES[1])
    node.core.activate()
    assert node.await_status(motion="waiting")["cache"] == "bac-s5"


def test_misses_lead_to_a_cheaper_schedule_and_back(bench: MakeBench) -> None:
    node = bench(latency=lambda request: 50.0 if request.level else 250.0)
    node.drive(replan_ticks=2, degrade_misses=2, degrade_window=10, degrade_recover=12)
    node.begin()
    driver = node.core.driver
    assert driver is not None
    node.until(lambda: node.status()["cache"] == "bac-s5")
    assert (driver.counters()["deadline_misses"], driver.counters()["degradations"]) == (2, 1)
    node.until(lambda: node.actions()[-1][1] == 1)
    node.core.publish_diagnostics()
    assert read_diagnostics(node.transport.sent["/diagnostics"][-1])["cache"] == "bac-s5"
    node.until(lambda: node.status()["cache"] == "bac-s10")
    assert driver.counters()["recoveries"] == 1
    # From the last schedule there is nowhere to degrade to.
    node.core.set_cache("late-s10")
    node.until(lambda: driver.counters()["degradations"] == 2)
    node.until(lambda: node.actions()[-1][1] == 2)
    assert node.status()["cache"] == "late-s10"


def test_time_that_jumps_back_begins_anew(bench: MakeBench) -> None:
    node = driving(bench())
    count = len(node.actions())
    node.clock.set_ns(node.clock.now_ns() - 500_000_000_000)
    node.await_status(motion="waiting")
    assert len(node.actions()) == count
    node.begin(9.0)
    node.until(lambda: len(node.actions()) > count, 9.0)
    assert node.actions()[count] == [9, 0]


def test_time_that_jumps_back_before_the_first_tick_begins_anew(bench: MakeBench) -> None:
    node = bench()
    node.drive()
    node.sense(7.0)
    node.clock.await_sleep()
    node.clock.set_ns(node.clock.now_ns() - 500_000_000_000)
    node.until_missing("joint_states", "place")
    # Beside what was sensed at a time to come, this would be refused.
    node.begin(9.0)
    node.until(lambda: bool(node.actions()), 9.0)
    assert node.actions()[0] == [9, 0]
    assert node.core.figures().get("refused_backwards", 0) == 0


def test_inference_that_dies_stops_the_robot_and_says_why(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda told: None)
    alive = [True]

    def compute(request: Request, schedule: int, seed: int | None) -> np.ndarray:
        if not alive[0]:
            raise RuntimeError("CUDA error: out of memory")
        return chunk(request, schedule, seed)

    node = driving(bench(loading(compute), threaded=True))
    alive[0] = False
    node.until(lambda: node.status()["motion"] == "stopped")
    assert "out of memory" in node.status()["reason"]
    count = len(node.actions())
    node.core.publish_diagnostics()
    assert read_diagnostics(node.transport.sent["/diagnostics"][-1])["level"] == "ERROR"
    alive[0] = True
    node.core.reset()
    node.await_status(motion="waiting", episode=1)
    node.begin()
    node.until(lambda: len(node.actions()) > count)


def test_late_chunks_are_counted_and_the_old_tail_goes_on(bench: MakeBench) -> None:
    node = driving(bench(loading(), lambda request: 450.0 if request.number == 1 else 50.0), replan_ticks=2)
    driver = node.core.driver
    assert driver is not None
    for _ in range(4):
        node.tick()
    counted = driver.counters()
    # Chunk 1 is asked for two ticks after chunk 0, and should be there a tick later.
    assert (counted["requests"], counted["deadline_misses"], counted["held"]) == (2, 1, 0)
    assert counted["tail"] >= 1
    node.core.publish_diagnostics()
    assert read_diagnostics(node.transport.sent["/diagnostics"][-1])["level"] == "WARN"
