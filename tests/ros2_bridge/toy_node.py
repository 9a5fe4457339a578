"""The node with the toys' policy as a process: ``python -m tests.ros2_bridge.toy_node [options of ros2_bridge]``."""

import sys

import ros2_bridge.core as core
from bac.control import ThreadInference
from ros2_bridge.__main__ import main
from tests.ros2_bridge.toys import loading

if __name__ == "__main__":
    # What PolicyCore takes unless it is given another; the command line gives none.
    core.PolicyCore.__init__.__defaults__ = (loading(), ThreadInference)
    main(sys.argv[1:])
