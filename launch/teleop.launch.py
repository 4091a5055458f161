"""Arms that follow their GELLO leaders, with the front camera.

Arguments: ros2 launch vipra_ros teleop.launch.py --show-args
"""

from vipra_ros.bringup import launch_description


def generate_launch_description():
    return launch_description("teleop")
