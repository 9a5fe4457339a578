"""Law 1: imports point one way, read from the syntax trees and not from what happens to run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"bac", "policies", "envs", "configs", "scripts", "ros2_bridge"}
MAY_IMPORT = {
    "bac": set(),
    "envs": set(),
    "policies": {"bac"},
    "configs": {"bac", "policies", "envs"},
    "scripts": {"bac", "policies", "envs", "configs"},
    "ros2_bridge": {"bac", "policies"},
}
ALSO = {
    # A robot to talk to: the environments behind topics.
    "ros2_bridge/sim.py": {"envs"},
}
FORBIDDEN = {
    "bac": {"gymnasium", "hydra", "omegaconf", "rclpy", "diffusers", "gym_pusht"},
    "policies": {"gymnasium", "hydra", "omegaconf", "rclpy", "diffusers", "dill"},
    "envs": {"torch", "hydra", "omegaconf", "rclpy"},
}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_point_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        imported = _imports(path)
        also = ALSO.get(path.relative_to(ROOT).as_posix(), set())
        stray = (imported & OURS) - MAY_IMPORT[package] - {package} - also
        assert not stray, f"{path.relative_to(ROOT)} imports {stray}"
        assert not imported & FORBIDDEN.get(package, set()), f"{path.relative_to(ROOT)}"


def test_walk_sees_the_known_edges() -> None:
    # The walk must be able to fail: these edges exist today.
    assert "bac" in _imports(ROOT / "policies" / "diffusion_policy.py")
    assert {"bac", "policies", "envs"} <= _imports(ROOT / "scripts" / "eval.py")


def test_only_two_files_import_rclpy_and_only_dds_imports_cyclone() -> None:
    users: dict[str, set[str]] = {"rclpy": set(), "cyclonedds": set(), "torch": set()}
    for path in (ROOT / "ros2_bridge").rglob("*.py"):
        for name in users.keys() & _imports(path):
            users[name].add(path.name)
    assert users == {
        "rclpy": {"rclpy_node.py", "rclpy_transport.py"},
        "cyclonedds": {"dds.py", "dds_types.py"},
        "torch": {"policy.py", "measure.py"},
    }


def test_nothing_unpickles_without_restriction() -> None:
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                    "pickle.load",
                    "pickle.loads",
                    "torch.load",
                }:
                    safe = any(k.arg == "weights_only" and ast.literal_eval(k.value) is True for k in node.keywords)
                    assert safe, f"{path.relative_to(ROOT)}:{node.lineno}"
