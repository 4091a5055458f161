"""Two arms, front camera and policy node.

Arguments: ros2 launch vipra_ros bimanual.launch.py --show-args
"""

from vipra_ros.bringup import launch_description


def generate_launch_description():
    return launch_description("bimanual")
