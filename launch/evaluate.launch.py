"""An operator's trials on a robot that is up; `vipra evaluate --operator` does the same from the keyboard.

Arguments: ros2 launch vipra_ros evaluate.launch.py --show-args
"""

ARGUMENTS = {
    "task": ("stack_cups", str, "file in config/tasks, or its path"),
    "policy": ("policy", str, "name of the policy in the report"),
    "seeds": ("0:24", str, "trials A:B, A to B - 1, or a file of them"),
    "split": ("seen", str, "seen, unseen or both"),
    "robot": ("", str, "file in config/robots; empty: franka_ and the task's workcell"),
    "time_limit_s": ("0.0", float, "of a trial; 0: the task's"),
    "out": ("runs/evaluation", str, "folder of the report; an evaluation there goes on"),
}


def generate_launch_description():
    from launch import LaunchDescription
    from launch.actions import DeclareLaunchArgument
    from launch.substitutions import LaunchConfiguration
    from launch_ros.actions import Node
    from launch_ros.parameter_descriptions import ParameterValue

    declared = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, _, description) in ARGUMENTS.items()
    ]
    values = {
        name: ParameterValue(LaunchConfiguration(name), value_type=kind)
        for name, (_, kind, _) in ARGUMENTS.items()
    }
    node = Node(package="vipra_ros", executable="vipra_evaluation", output="screen", parameters=[values])
    return LaunchDescription([*declared, node])
