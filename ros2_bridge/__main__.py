"""``python -m ros2_bridge --task push_t --cache bac``: run the node until it is interrupted."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bac.errors import BacError, InvalidInput, MissingArtefact, sentence
from bac.files import write_whole
from ros2_bridge.parameters import parameter_file

CONFIG = Path(__file__).parent / "config"
_WITHOUT_ROS = {
    "record": "run `ros2 bag record` beside the node",
    "figures": "record or echo /diagnostics",
    "ros_distro": "source the distribution that the node is to run in",
}
"""Options of transport dds alone, and what takes their place over rclpy."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run, exit with status 1 and one sentence if something is refused."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        given = parameters(options)
        if _transport(options) == "rclpy":
            _run_rclpy(options, given)
        else:
            _run(options, given)
    except BacError as refusal:
        sys.exit(f"error: {refusal}")


def parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Return the task's parameter file, or the one given, with what the command line says on top."""
    path = Path(options.params) if options.params else CONFIG / f"{options.task or 'push_t'}.yaml"
    given = parameter_file(path)
    for assignment in options.set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise InvalidInput(sentence("--set", expected="name=value", got=assignment, mend="write it so"))
        given[name] = yaml.safe_load(value)
    named = {"task": options.task, "cache": options.cache}
    return given | {name: value for name, value in named.items() if value is not None}


def _run_rclpy(options: argparse.Namespace, given: dict[str, Any]) -> None:
    if importlib.util.find_spec("rclpy") is None:
        mend = "source a ROS 2 distribution, or use --transport dds"
        raise MissingArtefact(sentence("transport rclpy", expected="rclpy", got="none", mend=mend))
    for name, mend in _WITHOUT_ROS.items():
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise InvalidInput(sentence(option, expected="transport dds", got="rclpy", mend=mend))
    from ros2_bridge.rclpy_node import main as run

    run(given, options.node, options.namespace, activate=options.activate, domain=options.domain)


def _run(options: argparse.Namespace, given: dict[str, Any]) -> None:
    from ros2_bridge.open_transport import open_node

    over = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: over.set())
    opened = open_node(options, given, over.set)
    core = opened.node.core
    try:
        core.configure(given)
        if options.activate:
            core.activate()
        print("ready", flush=True)
        opened.begin()
        over.wait()
        if core.driver is not None:
            # Else what is sent after the figures were told would be missing in them.
            core.driver.stop()
        figures = core.figures()
        print(json.dumps(figures), flush=True)
        if options.figures and core.driver is not None:
            told = {"figures": figures, "latencies_ms": [round(each, 3) for each in core.driver.latencies_ms]}
            write_whole(Path(options.figures), lambda path: path.write_text(json.dumps(told)))
    finally:
        opened.node.close()
        opened.transport.close()


def _transport(options: argparse.Namespace) -> str:
    """Return who carries the messages.

    Raises:
        InvalidInput: a bag is replayed, and something is said of a live transport.
    """
    if options.replay:
        for option, said in (("--transport", options.transport != "auto"), ("--domain", options.domain is not None)):
            if said:
                got, mend = f"--replay {options.replay}", "leave one of the two out"
                raise InvalidInput(sentence(option, expected="live messages", got=got, mend=mend))
        return "replay"
    if options.transport == "auto":
        return "dds" if importlib.util.find_spec("rclpy") is None else "rclpy"
    return str(options.transport)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ros2_bridge", description=__doc__)
    parser.add_argument("--task", help="task whose parameter file and policy are used")
    parser.add_argument("--cache", help="schedule: none, bac-s10, or a method, as the parameter cache")
    parser.add_argument("--params", help="a ROS 2 parameter file in place of the task's")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter")
    parser.add_argument("--transport", choices=("auto", "rclpy", "dds"), default="auto")
    parser.add_argument("--ros-distro", help="the robot's, for transport dds: humble, jazzy (by default), kilted")
    parser.add_argument("--domain", type=int, help="DDS domain; by default ROS_DOMAIN_ID")
    parser.add_argument("--node", default="policy_node", help="the node's name")
    parser.add_argument("--namespace", default="/", help="the node's namespace")
    parser.add_argument("--record", help="with dds: folder of a new MCAP bag, everything in and out")
    parser.add_argument("--figures", help="with dds: JSON file of the counters, and of what each chunk took")
    parser.add_argument("--replay", help="a bag whose messages are the input, at the pace of their recording")
    parser.add_argument(
        "--no-activate",
        dest="activate",
        action="store_false",
        help="only configure: stay inactive until ~/enable, or over rclpy until `ros2 lifecycle set` activates",
    )
    return parser


if __name__ == "__main__":
    main()
