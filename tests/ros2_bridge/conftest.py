"""Every test that opens DDS has a domain of its own, on loopback; no process outlives its test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.ros2_bridge import fake_rclpy
from tests.ros2_bridge.fake_rclpy import CONTEXT, Parameter, SignalHandlerOptions
from tests.ros2_bridge.toys import PARAMETERS, Bench, loading

ROOT = Path(__file__).parents[2]
LOOPBACK = """
<CycloneDDS><Domain>
  <General>
    <Interfaces><NetworkInterface address="127.0.0.1"/></Interfaces><AllowMulticast>false</AllowMulticast>
  </General>
  <Discovery><ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>60</MaxAutoParticipantIndex>
    <Peers><Peer Address="127.0.0.1"/></Peers></Discovery>
</Domain></CycloneDDS>"""
_DOMAINS = 232
_ROS_DOMAINS = 101
_used = count()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    """Makes benches, shut down at the end."""
    made: list[Bench] = []

    def make(*arguments: Any, **options: Any) -> Bench:
        made.append(Bench(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.core.shutdown()


@pytest.fixture
def rclpy_node(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the managed node, over the stand-in of rclpy."""
    fake_rclpy.install(monkeypatch)
    import ros2_bridge.rclpy_node

    return ros2_bridge.rclpy_node


@pytest.fixture
def make_node(rclpy_node: ModuleType) -> Iterator[Callable[..., Any]]:
    """Makes managed nodes over the toys' policy, shut down at the end."""
    made = []
    CONTEXT.init(signal_handler_options=SignalHandlerOptions.NO)

    def make(load: Any = None, cli_args: Any = None, namespace: str = "/", given: Any = None, **changed: Any) -> Any:
        overrides = [Parameter(name, value=value) for name, value in ((given or PARAMETERS) | changed).items()]
        options = {"parameter_overrides": overrides, "cli_args": cli_args, "namespace": namespace}
        made.append(rclpy_node.PolicyNode(load=load or loading(), **options))
        return made[-1]

    yield make
    for each in made:
        each.core.shutdown()
        each.destroy_node()
    CONTEXT.try_shutdown()


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> int:
    """A DDS domain that no other test of this run uses at the same time, random per run; loopback only."""
    pytest.importorskip("cyclonedds")
    number = _own_domain(_DOMAINS)
    monkeypatch.setenv("CYCLONEDDS_URI", LOOPBACK)
    monkeypatch.setenv("ROS_DOMAIN_ID", str(number))
    return number


@pytest.fixture
def ros_domain(monkeypatch: pytest.MonkeyPatch) -> int:
    """The same for a ROS distribution, whatever its middleware; of the domains that have no ephemeral ports."""
    number = _own_domain(_ROS_DOMAINS)
    monkeypatch.delenv("CYCLONEDDS_URI", raising=False)
    monkeypatch.setenv("ROS_DOMAIN_ID", str(number))
    # Up to Humble the first, then the second.
    monkeypatch.setenv("ROS_LOCALHOST_ONLY", "1")
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    return number


def _own_domain(domains: int) -> int:
    run = zlib.crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())).encode())
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return 1 + (run + worker + workers * next(_used)) % domains


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python processes, each in a group of its own; ends the groups, and fails if one of them does not end."""
    running: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
    left = [process.pid for process in running if _group_lives(process.pid)]
    assert not left, f"process groups {left} still live"


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
