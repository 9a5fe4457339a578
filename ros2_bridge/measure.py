"""What the bridge costs, and how well it drives: ``python -m ros2_bridge.measure {overhead,closed_loop}``.

``overhead`` times what lies between the wire and the policy, in one process: CDR to observation, chunk to CDR.
``closed_loop`` runs node and simulator as two processes over DDS on loopback; its JSON is a latency trace for
``scripts/eval.py control=realtime latency=FILE`` as well, so that both can be compared at the same latencies.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bac.control import ObservationHistory
from bac.control.clock import NS_PER_MS
from bac.errors import BacError, InvalidInput, Unavailable, sentence
from bac.statistics import mean_estimate, wilson
from ros2_bridge.__main__ import CONFIG
from ros2_bridge.conversion import action_message, trajectory_message
from ros2_bridge.intake import Intake
from ros2_bridge.mapping import KeySource, Shape, SourceKind
from ros2_bridge.messages import MessageTypes
from ros2_bridge.node_clock import SystemClock
from ros2_bridge.parameters import parameter_file
from ros2_bridge.robot_messages import robot_messages
from ros2_bridge.settings import NodeSettings

LOOPBACK = (
    '<CycloneDDS><Domain><General><Interfaces><NetworkInterface address="127.0.0.1"/></Interfaces>'
    "<AllowMulticast>false</AllowMulticast></General><Discovery><ParticipantIndex>auto</ParticipantIndex>"
    '<Peers><Peer Address="127.0.0.1"/></Peers></Discovery></Domain></CycloneDDS>'
)
_IMAGE: Shape = (480, 640, 3)
_CHUNK = (15, 2)
_WARMUP = 20
_POLL_S = 0.1


def overhead(calls: int) -> dict[str, Any]:
    """Time the way in and the way out, milliseconds.

    Args:
        calls: of each, at least 100: fewer have no 99th percentile.
    """
    if calls < 100:
        raise InvalidInput(sentence("calls", expected="at least 100", got=calls, mend="time more"))
    types = MessageTypes()
    state = NodeSettings.read(parameter_file(CONFIG / "push_t.yaml")).sources
    camera = (KeySource("image", "camera", SourceKind.IMAGE),)
    actions = np.random.default_rng(0).random(_CHUNK).astype(np.float32)

    def action() -> object:
        return types.serialize("std_msgs/msg/Float64MultiArray", action_message(types.make, actions[0]))

    def trajectory() -> object:
        message = trajectory_message(types.make, ["x", "y"], actions, 1e8, 1)
        return types.serialize("trajectory_msgs/msg/JointTrajectory", message)

    return {
        "in_state_ms": _timed(_way_in(types, state, {"keypoints": (18,), "agent_position": (2,)}), calls),
        "in_image_480x640_ms": _timed(_way_in(types, camera, {"image": _IMAGE}), calls),
        "out_action_ms": _timed(lambda: action, calls),
        "out_trajectory_ms": _timed(lambda: trajectory, calls),
    }


def _way_in(
    types: MessageTypes, sources: Sequence[KeySource], shapes: Mapping[str, Shape]
) -> Callable[[], Callable[[], object]]:
    """Return what prepares one call: fresh bytes of every topic, to be made an observation of two steps."""
    clock, history = SystemClock(), ObservationHistory(2)
    intake = Intake(sources, shapes, clock, silence_ms=1e6, ahead_ms=50)
    kinds = {source.topic: source.type_name for source in sources}
    values = {
        key: np.zeros(shape, np.uint8) if len(shape) == 3 else np.ones(shape, np.float32)
        for key, shape in shapes.items()
    }

    def prepare() -> Callable[[], object]:
        sent = {
            topic: types.serialize(kinds[topic], message)
            for topic, message in robot_messages(types.make, sources, values, clock.ros_ns()).items()
        }

        def call() -> object:
            for topic, cdr in sent.items():
                intake.receive(topic, types.deserialize(kinds[topic], cdr), "robot")
            frame = intake.frame()
            assert frame is not None  # the stamp is new
            history.append(frame.values)
            return history.stacked()

        return call

    return prepare


def _timed(prepare: Callable[[], Callable[[], object]], calls: int) -> dict[str, float]:
    taken = []
    for _ in range(_WARMUP + calls):
        call = prepare()
        began = time.monotonic_ns()
        call()
        taken.append((time.monotonic_ns() - began) / NS_PER_MS)
    told = dict(zip(("p50", "p99", "max"), np.percentile(taken[_WARMUP:], [50, 99, 100]), strict=True))
    return {name: round(float(value), 4) for name, value in told.items()} | {"calls": calls}


def closed_loop(options: argparse.Namespace) -> dict[str, Any]:
    """Play episodes in two processes; return their scores, what the node counted, and what each chunk took."""
    seed = options.seed
    environment = os.environ | {"CYCLONEDDS_URI": LOOPBACK, "ROS_DOMAIN_ID": str(random.randint(1, 232))}
    with tempfile.TemporaryDirectory() as name:
        told, played = Path(name) / "node.json", Path(name) / "sim.json"
        node = ["--task", options.task, "--cache", options.cache, "--transport", "dds", "--figures", str(told)]
        node += ["--set", f"noise_seed={seed}", *(word for each in options.set for word in ("--set", each))]
        sim = [
            "--task",
            options.task,
            "--episodes",
            str(options.episodes),
            "--seed",
            str(seed),
            "--output",
            str(played),
        ]
        sim += [] if options.max_steps is None else ["--max-steps", str(options.max_steps)]
        _run_both(["ros2_bridge", *node], ["ros2_bridge.sim", *sim], environment)
        episodes, counted = json.loads(played.read_text()), json.loads(told.read_text())
    trace = counted["latencies_ms"]
    return {
        "task": options.task,
        "score": asdict(mean_estimate([each["score"] for each in episodes])),
        "success": asdict(wilson(sum(each["success"] for each in episodes), len(episodes))),
        "ticks_lost": {name: sum(each[name] for each in episodes) for name in ("missed", "surplus", "overruns")},
        "episodes": episodes,
        "node": counted["figures"],
        # Under the names that scripts/eval.py reads a trace by.
        "control": {"cached": {"trace_ms": trace, "p99_ms": float(np.percentile(trace, 99))}},
    }


def _run_both(node: Sequence[str], simulator: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run two modules as processes until the simulator ends, then end the node.

    Raises:
        Unavailable: one of them failed; what it said stands above.
    """
    running = subprocess.Popen([sys.executable, "-m", *node], env=environment)
    playing = subprocess.Popen([sys.executable, "-m", *simulator], env=environment)
    try:
        while playing.poll() is None and running.poll() is None:
            time.sleep(_POLL_S)
        failed = [name for name, each in (("node", running), ("simulator", playing)) if each.returncode]
        if failed or running.returncode is not None:
            who = failed[0] if failed else "node"
            raise Unavailable(
                sentence("closed loop", expected="episodes to the end", got=f"a {who} that ended", mend="see above")
            )
    finally:
        for each in (playing, running):
            each.send_signal(signal.SIGTERM)
            each.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON with provenance."""
    options = _parser().parse_args(arguments)
    try:
        measured = overhead(options.calls) if options.what == "overhead" else closed_loop(options)
    except BacError as refusal:
        sys.exit(f"error: {refusal}")
    import torch

    from bac.results import run_provenance, write_results

    words = sys.argv[1:] if arguments is None else arguments
    about = run_provenance(torch.device("cpu"), vars(options))
    about["command"] = " ".join(["python -m ros2_bridge.measure", *words])
    about["load_average"] = os.getloadavg()
    write_results(Path(options.output), measured | {"provenance": about})
    shown = {name: value for name, value in measured.items() if name not in {"episodes", "control", "node"}}
    print(f"{json.dumps(shown, indent=2)}\nresults in {options.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ros2_bridge.measure", description=__doc__)
    parser.add_argument("what", choices=("overhead", "closed_loop"))
    parser.add_argument("--output", required=True, help="JSON file")
    parser.add_argument("--calls", type=int, default=2000, help="of overhead")
    parser.add_argument("--task", default="push_t")
    parser.add_argument("--cache", default="bac")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=100000)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the node")
    return parser


if __name__ == "__main__":
    main()
