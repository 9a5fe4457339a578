"""``control.hygiene`` reaches the process, the loop's thread and the inference thread, and is given back after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.controls import ControlMode
from tests.composing import composed

ROOT = Path(__file__).parent.parent.parent

PLAYED = """
import gc, json, os, sys, threading
from dataclasses import replace
import torch
from studies import realtime_play
from policies.realtime import ChunkSource
from tests.composing import composed
from tests.policies.networks import small_policy
from tests.scripts.test_realtime_episodes import Small

def state():
    return [torch.get_num_threads(), sorted(os.sched_getaffinity(0)), gc.isenabled(), sys.getswitchinterval()]

seen = {}
chunks, reset = ChunkSource.chunks, Small.reset

def noted_chunks(self, *given):
    seen.setdefault("chunk of " + threading.current_thread().name.split("_")[0], state())
    return chunks(self, *given)

def noted_reset(self, **options):
    seen["reset"] = state()
    return reset(self, **options)

ChunkSource.chunks, Small.reset = noted_chunks, noted_reset
realtime_play.environment = lambda task: lambda: Small(max_steps=4)
before = state()
config = composed("eval", "control=wallclock", "task.max_steps=4", *sys.argv[1:])
policy = small_policy()
trace = realtime_play.control_latencies(config, {"cached": policy})["cached"]
_, told = realtime_play.play_controlled(config, policy, trace, [100000], 0, "play")
print(json.dumps({"told": told["hygiene"], "seen": seen, "before": before, "after": state()}))
"""


def played(*overrides: str) -> dict:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "scripts"))),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", PLAYED, *(f"control.hygiene.{each}" for each in overrides)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_asked_for_holds_while_it_plays_in_both_threads_and_no_longer() -> None:
    cores = sorted(os.sched_getaffinity(0))
    first, last = cores[0], cores[-1]
    process = ["torch_threads=3", "freeze_gc=true", "switch_interval_ms=0.5"]
    run = played(f"cores=[{first}]", f"inference_cores=[{last}]", *process)
    assert run["told"] == {
        "loop": dict.fromkeys(("cores", "torch_threads", "freeze_gc", "switch_interval_ms"), "done"),
        "inference": {"cores": "done", "torch_threads": "done"},
    }
    assert run["seen"]["reset"] == [3, [first], False, 0.0005]
    # Its latencies are measured as it infers.
    inference = [run["seen"][name] for name in ("chunk of ThreadPoolExecutor-0", "chunk of bac-inference")]
    assert inference == [[3, [last], False, 0.0005]] * 2
    assert run["before"] == run["after"] == [1, cores, True, 0.005]


def test_inference_stays_on_the_cores_of_the_loop_unless_it_is_given_others() -> None:
    last = max(os.sched_getaffinity(0))
    run = played(f"cores=[{last}]")
    assert run["told"] == {"loop": {"cores": "done"}, "inference": {}}
    assert [state[1] for state in run["seen"].values()] == [[last]] * 3


@pytest.mark.parametrize("mode", ControlMode)
def test_nothing_is_asked_for_by_default(mode: ControlMode) -> None:
    hygiene = composed("eval", f"control={mode}").control.hygiene
    assert hygiene.of_loop().apply() == hygiene.of_inference().apply() == {}
