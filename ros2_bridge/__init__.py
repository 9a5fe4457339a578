"""The accelerated policy as a ROS 2 node: over rclpy where a distribution is installed, over plain DDS where none is.

``python -m ros2_bridge --task push_t --cache bac`` runs it. Importing this package imports neither rclpy, cyclonedds
nor torch: only ``rclpy_node`` and ``rclpy_transport`` import rclpy, only ``dds`` and ``dds_types`` cyclonedds, only
``policy`` and ``measure`` torch.
"""
