"""For colcon: this folder is the package ``ros2_bridge`` itself. pip installs it with the rest from the root."""

from pathlib import Path

from setuptools import setup

NAME = "ros2_bridge"

setup(
    name=NAME,
    version="0.1.0",
    description="Block-wise cached diffusion policies as a managed ROS 2 node",
    license="MIT",
    package_dir={NAME: "."},
    packages=[NAME],
    package_data={NAME: ["config/*.yaml"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", [str(path) for path in sorted(Path("launch").glob("*.launch.py"))]),
        (f"share/{NAME}/config", [str(path) for path in sorted(Path("config").glob("*.yaml"))]),
    ],
    zip_safe=True,
    entry_points={"console_scripts": ["policy_node = ros2_bridge.rclpy_node:spin"]},
)
