"""ROS messages of our own objects."""

from collections.abc import Mapping, Sequence

import numpy as np
from builtin_interfaces.msg import Duration, Time
from std_msgs.msg import Header
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


def parts(
    frame_id: str, chunk: Chunk | None, names: Mapping[str, Sequence[str]]
) -> dict[str, JointTrajectory]:
    """Every arm's part of `chunk`, or of letting go. `names` by arm: seven joints, then its hand's if any."""
    if chunk is None:
        return {arm: JointTrajectory(header=Header(frame_id=frame_id)) for arm in names}
    joints = np.split(chunk.joints, len(names), axis=1)
    hands = np.cumsum([len(ours) - 7 for ours in names.values()])
    openings = np.split(chunk.grippers, hands[:-1], axis=1)
    return {
        arm: trajectory(frame_id, chunk, ours, np.hstack(row))
        for (arm, ours), *row in zip(names.items(), joints, openings, strict=True)
    }
