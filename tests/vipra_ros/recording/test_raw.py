"""The raw log can be read without ROS's help."""

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
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
