"""The ament_python package: what colcon would install, and that importing it costs nothing."""

import ast
import runpy
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ros2_bridge"


def test_importing_it_imports_no_middleware_and_no_torch(start: Callable[..., subprocess.Popen[str]]) -> None:
    program = """
import importlib, pkgutil, sys
import ros2_bridge
heavy = {"rclpy", "cyclonedds", "torch", "rosbags"}
assert not heavy & sys.modules.keys()
for name in ("core", "driver", "parameters", "settings", "standalone", "policy", "open_transport", "__main__"):
    importlib.import_module(f"ros2_bridge.{name}")
print(sorted(heavy & sys.modules.keys()))
"""
    output, _ = start("-c", program).communicate(timeout=60)
    assert output.strip() == "[]"


def test_the_manifest_names_every_ros_package_that_is_imported_or_published() -> None:
    manifest = ElementTree.parse(PACKAGE / "package.xml").getroot()
    assert manifest.findtext("name") == "ros2_bridge"
    assert manifest.findtext("export/build_type") == "ament_python"
    declared = {each.text for each in manifest.findall("exec_depend")}
    used = {"lifecycle_msgs", "rosgraph_msgs", "trajectory_msgs", "diagnostic_msgs", "geometry_msgs", "sensor_msgs"}
    for path in [*PACKAGE.glob("rclpy_*.py"), *PACKAGE.glob("launch/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add(str(node.module).split(".")[0])
    ours = {"bac", "ros2_bridge"} | set(sys.stdlib_module_names) | {"numpy"}
    assert used - ours <= declared, used - ours - declared
    assert {"std_msgs", "std_srvs", "builtin_interfaces"} <= declared


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``setup.py install`` puts into a prefix, as colcon calls it; built from a copy, so that nothing is left."""
    import shutil

    folder = tmp_path_factory.mktemp("colcon")
    copy = folder / "src" / "ros2_bridge"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "setup.py", "-q", "install", "--prefix", str(folder / "install")]
    command += ["--single-version-externally-managed", "--record", str(folder / "record.txt")]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "install"


def test_colcon_installs_modules_marker_launch_and_parameters(installed: Path) -> None:
    share = installed / "share"
    assert (share / "ament_index/resource_index/packages/ros2_bridge").is_file()
    assert (share / "ros2_bridge/package.xml").is_file()
    assert (share / "ros2_bridge/launch/policy_node.launch.py").is_file()
    assert {path.name for path in (share / "ros2_bridge/config").iterdir()} == {
        path.name for path in PACKAGE.glob("config/*.yaml")
    }
    assert (installed / "lib/ros2_bridge/policy_node").is_file()  # where ros2 run looks
    (module,) = installed.glob("lib/python*/site-packages/ros2_bridge")
    expected = {path.name for path in PACKAGE.glob("*.py")} - {"setup.py"}
    assert expected <= {path.name for path in module.iterdir()}
    assert (module / "config/push_t.yaml").is_file()


def test_every_task_has_a_parameter_file() -> None:
    tasks = {path.stem for path in (ROOT / "configs" / "task").glob("*.yaml")}
    assert len(tasks) >= 10
    assert {path.stem for path in (PACKAGE / "config").iterdir()} == tasks


class _Made:
    """Anything of launch: what it was made with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


_LAUNCH = {
    "launch": ["LaunchDescription"],
    "launch.actions": ["DeclareLaunchArgument", "EmitEvent", "RegisterEventHandler"],
    "launch.conditions": ["IfCondition"],
    "launch.events": ["matches_action"],
    "launch.substitutions": ["LaunchConfiguration"],
    "launch_ros.actions": ["LifecycleNode"],
    "launch_ros.event_handlers": ["OnStateTransition"],
    "launch_ros.events.lifecycle": ["ChangeState"],
    "launch_ros.substitutions": ["FindPackageShare"],
}
_CONFIGURE, _ACTIVATE = 1, 3
"""Ids of ``lifecycle_msgs/msg/Transition``."""


@pytest.fixture
def launch_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the launch file defines, over stand-ins of launch that keep what they are given."""
    for module, members in _LAUNCH.items():
        made = types.ModuleType(module)
        made.__dict__.update({name: type(name, (_Made,), {}) for name in members})
        monkeypatch.setitem(sys.modules, module, made)
    messages = types.ModuleType("lifecycle_msgs.msg")
    ids = {"TRANSITION_CONFIGURE": _CONFIGURE, "TRANSITION_ACTIVATE": _ACTIVATE}
    messages.__dict__["Transition"] = type("Transition", (), ids)
    monkeypatch.setitem(sys.modules, "lifecycle_msgs.msg", messages)
    return runpy.run_path(str(PACKAGE / "launch" / "policy_node.launch.py"))


def _laid_open(thing: Any) -> Any:
    """Return ``(name, args, kwargs)`` in place of all that was made, within lists and dicts as well."""
    match thing:
        case _Made():
            return type(thing).__name__, _laid_open(list(thing.args)), _laid_open(thing.kwargs)
        case list():
            return [_laid_open(each) for each in thing]
        case dict():
            return {key: _laid_open(each) for key, each in thing.items()}
        case _:
            return thing


def _argument(name: str) -> Any:
    return "LaunchConfiguration", [name], {}


def _used(thing: Any) -> set[str]:
    """Return the launch arguments that are referred to within."""
    match thing:
        case ("LaunchConfiguration", [name], {}):
            return {name}
        case list() | tuple():
            return set().union(*(_used(each) for each in thing))
        case dict():
            return _used(list(thing.values()))
        case _:
            return set()


def test_the_launch_file_starts_the_node_and_brings_it_up(launch_file: dict[str, Any]) -> None:
    description = launch_file["generate_launch_description"]()
    kind, [[*declared, node, handler, configure]], options = _laid_open(description)
    assert (kind, options) == ("LaunchDescription", {})
    assert node == (
        "LifecycleNode",
        [],
        {
            "package": "ros2_bridge",
            "executable": "policy_node",
            "name": "policy_node",
            "namespace": _argument("namespace"),
            "output": "screen",
            # The later one wins.
            "parameters": [_argument("params_file"), {"use_sim_time": _argument("use_sim_time")}],
        },
    )

    def asking(transition: int) -> Any:
        options = {"lifecycle_node_matcher": ("matches_action", [node], {}), "transition_id": transition}
        return "ChangeState", [], options

    wanted = ("IfCondition", [_argument("autostart")], {})
    transition = {
        "target_lifecycle_node": node,
        "start_state": "configuring",
        "goal_state": "inactive",
        "entities": [("EmitEvent", [], {"event": asking(_ACTIVATE)})],
    }
    # Registered before the node is asked to configure: of a transition that is over, nobody is told.
    assert handler == ("RegisterEventHandler", [("OnStateTransition", [], transition)], {"condition": wanted})
    assert configure == ("EmitEvent", [], {"event": asking(_CONFIGURE), "condition": wanted})
    assert {kind for kind, _, _ in declared} == {"DeclareLaunchArgument"}
    assert {name for _, [name], _ in declared} == _used([node, handler, configure]) | _used(declared)


def test_the_launch_file_s_arguments_have_defaults_and_descriptions(launch_file: dict[str, Any]) -> None:
    _, [[*declared, _, _, _]], _ = _laid_open(launch_file["generate_launch_description"]())
    defaults = {name: options["default_value"] for _, [name], options in declared}
    share = ("FindPackageShare", ["ros2_bridge"], {})
    assert defaults == {
        "task": "push_t",
        "params_file": [share, "/config/", _argument("task"), ".yaml"],
        "namespace": "",
        "autostart": "true",
        "use_sim_time": "false",
    }
    assert (PACKAGE / "config" / f"{defaults['task']}.yaml").is_file()
    assert all(options.keys() == {"default_value", "description"} for _, _, options in declared)
    assert all(options["description"].endswith(".") for _, _, options in declared)
