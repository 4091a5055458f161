"""The raw log can be read without ROS's help."""

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from mcap.reader import make_reader
from rclpy.serialization import serialize_message
from sensor_msgs.msg import JointState
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vipra_ros.recording.raw import RawLog

reader = pytest.importorskip("mcap_ros2.reader")


def test_messages_come_back_with_their_times(tmp_path):
    topics = {
        "/right/joint_states": JointState,
        "/right/joint_command": JointTrajectory,
        "/arms/status": DiagnosticStatus,
    }
    log = RawLog(tmp_path / "raw" / "a.mcap", topics)
    state = JointState(name=["a", "b"], position=[0.25, -1.5])
    state.header.stamp.sec = 12
    command = JointTrajectory(points=[JointTrajectoryPoint(positions=[0.5])])
    status = DiagnosticStatus(message="running", values=[KeyValue(key="state", value="RUNNING")])
    for i, (topic, message) in enumerate(zip(topics, (state, command, status), strict=True)):
        log.add(topic, serialize_message(message), 12.5 + i)
    log.close()
    found = list(reader.read_ros2_messages(tmp_path / "raw" / "a.mcap"))
    assert [m.channel.topic for m in found] == list(topics)
    assert [m.log_time_ns for m in found] == [12_500_000_000, 13_500_000_000, 14_500_000_000]
    np.testing.assert_array_equal(found[0].ros_msg.position, [0.25, -1.5])
    assert found[0].ros_msg.header.stamp.sec == 12
    assert found[1].ros_msg.points[0].positions == [0.5]
    assert found[2].ros_msg.values[0].value == "RUNNING"


def test_a_full_disk_ends_the_log_and_nothing_else(tmp_path):
    (tmp_path / "a.mcap").symlink_to("/dev/full")
    log = RawLog(tmp_path / "a.mcap", {"/right/joint_states": JointState})
    for i in range(300):  # more than a chunk
        log.add("/right/joint_states", bytes(1000), float(i))
    assert "No space left on device" in log.ended
    log.close()


def test_the_log_leaves_the_reserve_to_episodes_and_can_be_read(tmp_path):
    free = iter((600e6, 400e6))
    path = tmp_path / "a.mcap"
    log = RawLog(path, {"/right/joint_states": JointState}, 500, lambda _: next(free))
    count = 0
    while not log.ended:
        log.add("/right/joint_states", bytes(1000), float(count))
        count += 1
    assert "400 MB left, 500 MB are kept for episodes" in log.ended
    size = path.stat().st_size
    log.add("/right/joint_states", bytes(1000), 0.0)
    log.close()
    assert path.stat().st_size == size < 2**22
    with path.open("rb") as file:
        assert sum(1 for _ in make_reader(file).iter_messages()) == count > 1000
