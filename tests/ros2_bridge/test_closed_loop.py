"""The node drives Push-T exactly as ``scripts/eval.py control=realtime`` does: same actions, to the last bit."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gym_pusht")
pytest.importorskip("rosbags")

from studies.realtime_episodes import World, play_virtual

import bac
from bac.control import Clock, Inference, LoopSettings, Predict, SimulatedInference, repeat
from envs.push_t import PushTEnv
from policies import load_policy
from policies.realtime import ChunkSource
from ros2_bridge.__main__ import CONFIG
from ros2_bridge.core import PolicyCore
from ros2_bridge.parameters import parameter_file
from ros2_bridge.policy import load
from ros2_bridge.robot_messages import robot_messages
from ros2_bridge.settings import NodeSettings
from tests.ros2_bridge.toys import LocalTransport, SteppedClock

SEED, TICKS, LATENCY_MS = 100000, 45, 150.0


def _evaluated() -> list[float]:
    """Return the distances of consecutive executed actions, sorted: what the evaluation tells of them."""
    source = ChunkSource([bac.accelerate(load_policy("push_t"), "bac-s5")])
    world = World(PushTEnv, source, LoopSettings(10.0, replan_ticks=8, deadline_ticks=2), TICKS, repeat)
    (played,) = play_virtual(world, [SEED], lambda seed, number: LATENCY_MS)
    assert played.episode.steps == TICKS - 2  # the first chunk takes two ticks
    assert played.report.counters.held == 0
    return sorted([*played.seam_jumps, *played.steps_within])


def _driven() -> list[float]:
    """Play over messages, the node's tick 20 ms after the observation, inference on the stepped clock."""
    transport = LocalTransport()
    clock = SteppedClock(transport.changed)

    def simulated(predict: Predict, clock: Clock) -> Inference:
        return SimulatedInference(predict, lambda request: LATENCY_MS, clock)

    given: dict[str, Any] = parameter_file(CONFIG / "push_t.yaml")
    given |= {"cache": "bac-s5", "noise_seed": SEED, "warmup_calls": 1, "deadline_ticks": 2}
    core = PolicyCore(transport, clock, load, simulated)
    core.configure(given)
    core.activate()
    transport.await_sent("~/status", lambda sent: "waiting" in sent[-1].data)
    sources, env, actions = NodeSettings.read(given).sources, PushTEnv(), []
    observation, _ = env.reset(seed=SEED)
    for _ in range(TICKS):
        for topic, message in robot_messages(transport.make, sources, observation, clock.ros_ns()).items():
            kind = next(each.type_name for each in sources if each.topic == topic)
            read = transport.types.deserialize(kind, transport.serialize(kind, message))
            transport.deliver(topic, read)
        clock.await_sleep()
        before = len(transport.sent["action"])
        clock.advance_ms(20)
        clock.await_sleep()
        sent = transport.sent["action"][before:]
        assert len(sent) <= 1
        for message in sent:
            observation, *_ = env.step(message.data)
            actions.append(np.array(message.data, np.float32))
        clock.advance_ms(80)
    core.shutdown()
    env.close()
    return sorted(float(np.linalg.norm(after - before)) for before, after in pairwise(actions))


@pytest.mark.sim
def test_actions_over_messages_are_those_of_the_evaluation() -> None:
    evaluated = _evaluated()
    assert len(set(evaluated)) > TICKS // 2
    assert _driven() == evaluated
