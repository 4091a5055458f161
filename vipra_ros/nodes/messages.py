"""ROS messages of our own objects."""

import numpy as np
from builtin_interfaces.msg import Duration, Time
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vipra_ros.clock import to_stamp
from vipra_ros.execution.chunk import Chunk


def stamp(t: float) -> Time:
    """Executor time `t` s."""
    sec, nanosec = to_stamp(t)
    return Time(sec=sec, nanosec=nanosec)


def seconds(time: Time) -> float:
    return time.sec + 1e-9 * time.nanosec


def trajectory(frame_id: str, chunk: Chunk, names, rows: np.ndarray) -> JointTrajectory:
    """`rows` [H, n] of the dimensions `names`, at the chunk's times."""
    message = JointTrajectory(joint_names=list(names))
    message.header.frame_id = frame_id
    message.header.stamp = stamp(chunk.t0)
    for i, row in enumerate(rows):
        sec, nanosec = to_stamp(i / chunk.rate_hz)
        point = JointTrajectoryPoint(
            positions=row.tolist(), time_from_start=Duration(sec=sec, nanosec=nanosec)
        )
        message.points.append(point)
    return message
