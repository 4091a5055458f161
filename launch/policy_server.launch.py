"""The policy server on this machine.

Arguments: ros2 launch vipra_ros policy_server.launch.py --show-args
"""

from vipra_ros.bringup import launch_description


def generate_launch_description():
    return launch_description("policy_server")
