"""Scripted experts of robomimic's tasks: they recover, and they fail in time."""

import numpy as np
import pytest

pytest.importorskip("robosuite", reason="pip install -e '.[robomimic]'")

from envs.demos.experts import Expert
from envs.demos.recording import Recorder
from envs.robomimic import RobomimicEnv

pytestmark = pytest.mark.sim


@pytest.mark.parametrize(("task", "steps"), [("lift", 120), ("can", 180), ("square", 230)])
def test_expert_picks_up_again_what_it_lost(task: str, steps: int) -> None:
    env = RobomimicEnv(task, absolute=False)
    env.reset(seed=0)
    expert = Expert(task, env.simulation, np.random.default_rng(0))
    closed, held, fallen = 0, -np.inf, np.inf
    # Too few to play the script to its end with an empty hand and begin again.
    for _ in range(steps):
        action = expert.act()
        # Somebody opens the hand as it lifts.
        action[-1] = -1 if 30 <= closed < 40 else action[-1]
        closed += closed >= 30 or action[-1] > 0
        seen, *_ = env.step(action)
        height = seen["object"][2]
        if closed < 40:
            held = max(held, height)
        else:
            fallen = min(fallen, height)
        # As high as no throw bounces.
        if height > fallen + 0.05:
            assert held > fallen + 0.02
            return
    pytest.fail("the expert did not come back to what it lost")


def test_expert_out_of_time_is_a_failure() -> None:
    recorder = Recorder("lift", disturbed=0, max_steps=10)
    assert recorder.record(recorder.environment(), 0) is None
