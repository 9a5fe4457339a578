"""Start the policy's node and bring it up: ``ros2 launch ros2_bridge policy_node.launch.py task:=push_t``."""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, RegisterEventHandler
from launch.conditions import IfCondition
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.substitutions import FindPackageShare
from lifecycle_msgs.msg import Transition

ARGUMENTS = {
    "task": ("push_t", "Which parameter file of this package."),
    "params_file": (
        # Joined by hand: PathJoinSubstitution takes a list within its list only from launch 1.0.9 and 3.4.5 on.
        [FindPackageShare("ros2_bridge"), "/config/", LaunchConfiguration("task"), ".yaml"],
        "A parameter file of your own in place of it.",
    ),
    "namespace": ("", "Namespace of the node."),
    "autostart": ("true", "Configure and activate; false leaves that to you or a lifecycle manager."),
    "use_sim_time": ("false", "Take time from /clock."),
}


def generate_launch_description() -> LaunchDescription:
    """Describe the node and its transitions."""
    given = {name: LaunchConfiguration(name) for name in ARGUMENTS}
    declared = [
        DeclareLaunchArgument(name, default_value=value, description=told) for name, (value, told) in ARGUMENTS.items()
    ]
    node = LifecycleNode(
        package="ros2_bridge",
        executable="policy_node",
        name="policy_node",
        namespace=given["namespace"],
        output="screen",
        parameters=[given["params_file"], {"use_sim_time": given["use_sim_time"]}],
    )

    def ask(transition: int) -> ChangeState:
        return ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition)

    wanted = IfCondition(given["autostart"])
    # From configuring only: a node that somebody deactivated must stay inactive.
    on_configured = OnStateTransition(
        target_lifecycle_node=node,
        start_state="configuring",
        goal_state="inactive",
        entities=[EmitEvent(event=ask(Transition.TRANSITION_ACTIVATE))],
    )
    configure = EmitEvent(event=ask(Transition.TRANSITION_CONFIGURE), condition=wanted)
    return LaunchDescription([*declared, node, RegisterEventHandler(on_configured, condition=wanted), configure])
