"""Arms that follow their GELLO leaders, the front camera, and a recorder; `vipra record` is its keyboard.

Arguments: ros2 launch vipra_ros teleop_record.launch.py --show-args
"""

from vipra_ros.bringup import launch_description


def generate_launch_description():
    return launch_description("teleop", dataset="recordings/demonstrations")
