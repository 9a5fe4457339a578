"""The stand-in leaves nothing behind: what comes after it meets the real rclpy, or none."""

import os
import sys
from importlib import import_module

import pytest

pytest.importorskip("rosbags")

from tests.ros2_bridge import fake_rclpy
from tests.ros2_bridge.fake_rclpy import BOUND


def test_modules_that_are_bound_to_the_stand_in_go_with_it() -> None:
    before = {name: sys.modules.get(name) for name in ("rclpy", "std_msgs.msg", *BOUND)}
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patched:
            fake_rclpy.install(patched)
            node = import_module("ros2_bridge.rclpy_node")
            assert issubclass(node.PolicyNode, fake_rclpy.LifecycleNode)
            assert set(BOUND) <= sys.modules.keys()
        assert {name: sys.modules.get(name) for name in before} == before


def test_every_module_that_imports_rclpy_is_bound() -> None:
    with pytest.MonkeyPatch.context() as patched:
        fake_rclpy.install(patched)
        import_module("ros2_bridge.rclpy_node")
        fakes = {sys.modules[name] for name in sys.modules if name.split(".")[0] == "rclpy"}
        ours = [module for name, module in sys.modules.items() if name.startswith("ros2_bridge.")]
        held = {id(each) for fake in fakes for each in vars(fake).values() if isinstance(each, type)}
        users = {each.__name__ for each in ours if any(id(value) in held for value in vars(each).values())}
        assert users == set(BOUND)


def test_a_real_rclpy_stays_on_this_machine(ros_domain: int) -> None:
    assert 1 <= ros_domain <= 101
    assert os.environ["ROS_DOMAIN_ID"] == str(ros_domain)
    assert os.environ["ROS_LOCALHOST_ONLY"] == "1"
    assert os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
