"""One arm, front camera and policy node.

Arguments: ros2 launch vipra_ros single_arm.launch.py --show-args
"""

from vipra_ros.bringup import launch_description


def generate_launch_description():
    return launch_description("single")
