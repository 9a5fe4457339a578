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


class _Substitution:
    def __init__(self, *given: Any, **options: Any) -> None:
        self.given = given


class _PathJoin:
    """As launch has it in Humble: every part is text or one substitution."""

    def __init__(self, parts: list[Any]) -> None:
        assert all(isinstance(each, str | _Substitution) for each in parts), parts


def test_the_launch_file_names_the_task_s_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "launch": ["LaunchDescription"],
        "launch.actions": ["DeclareLaunchArgument", "EmitEvent", "RegisterEventHandler"],
        "launch.conditions": ["IfCondition"],
        "launch.events": ["matches_action"],
        "launch.substitutions": ["LaunchConfiguration"],
        "launch_ros.actions": ["LifecycleNode"],
        "launch_ros.event_handlers": ["OnStateTransition"],
        "launch_ros.events.lifecycle": ["ChangeState"],
        "launch_ros.substitutions": ["FindPackageShare"],
        "lifecycle_msgs.msg": ["Transition"],
    }
    for module, members in names.items():
        made = types.ModuleType(module)
        made.__dict__.update(
            {name: type(name, (_Substitution,), {}) for name in members}, PathJoinSubstitution=_PathJoin
        )
        monkeypatch.setitem(sys.modules, module, made)
    given = runpy.run_path(str(PACKAGE / "launch" / "policy_node.launch.py"))
    share, folder, task, suffix = given["ARGUMENTS"]["params_file"][0]
    assert (type(share).__name__, share.given) == ("FindPackageShare", ("ros2_bridge",))
    assert (type(task).__name__, task.given) == ("LaunchConfiguration", ("task",))
    assert f"share{folder}push_t{suffix}" == "share/config/push_t.yaml"
    assert callable(given["generate_launch_description"])
