"""The policy node on real Fast DDS, with a real policy server in a process of its own.

The arms are a stand-in that reads commands as the arms node does; pictures come from the test, except where
the camera node is the point.
"""

import itertools
import os
import signal
import sys
import time

import numpy as np
import pytest
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus
from rcl_interfaces.msg import Parameter as ParameterMessage
from rcl_interfaces.msg import ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from trajectory_msgs.msg import JointTrajectory

from config.embodiment import Embodiment
from config.loading import ConfigError, load
from policy_server.client import PolicyClient
from policy_server.keys import generate
from tests.vipra_ros.graph import write_robot
from tests.vipra_ros.scene import Scene
from tests.vipra_ros.test_camera_sources import FOOTAGE, encode, grey
from vipra_ros.nodes import policy as policy_module
from vipra_ros.nodes.policy import PolicyNode, dimensions_by_arm
from vipra_ros.process import Child, wait_for

pytestmark = pytest.mark.live


@pytest.fixture
def scene(tmp_path):
    scene = Scene(tmp_path)
    yield scene
    scene.close()


# --- Running


def test_chunks_reach_both_arms_whole_in_order_and_timed_by_the_observation(scene):
    scene.serve()
    scene.film()
    viewers = scene.graph.collect(JointTrajectory, "/policy/chunk", 10)
    scene.start_node()
    scene.running(chunks=6)
    accepted = scene.arms.chunks
    requests = {line["seq"]: line for line in scene.log() if line["outcome"] == "sent"}
    assert requests[accepted[0][1].seq]["rate_hz"] == 22.0 or scene.value("rate_hz") != "22", (
        "lowered is announced"
    )
    ends = -np.inf
    for at, chunk in accepted:
        assert chunk.joints.shape == (14, 14) and chunk.grippers.shape == (14, 2)
        assert chunk.rate_hz == pytest.approx(requests[chunk.seq]["rate_hz"], rel=1e-6)
        rested = ends < requests[chunk.seq]["t_obs"]
        due = requests[chunk.seq]["t0" if rested else "t_obs"]
        assert chunk.t0 == pytest.approx(due, abs=1e-6), "action 0 is due at t_obs, after a rest on arrival"
        assert (-0.05 if rested else 0.0) < at - chunk.t0 < 14 / 22
        ends = chunk.t0 + 13 / chunk.rate_hz
        assert chunk.grippers.max() == 1.0, "an opening a little over 1 is fully open"
        assert np.diff(chunk.joints, axis=0) == pytest.approx(0.002, abs=1e-6)
    assert np.diff([chunk.seq for _, chunk in accepted]).min() > 0
    assert np.diff([chunk.t0 for _, chunk in accepted]).min() > 0
    wait_for(lambda: viewers, 20, "the viewers' chunk")
    assert len(viewers[-1].joint_names) == 16 and len(viewers[-1].points) == 14
    assert {"timing", "latency_ms", "seed", "sent", "received"} <= set(scene.log()[0])
    assert {line["seed"] for line in scene.log()} == {0}, "the same noise every time"


def test_the_earlier_picture_is_the_one_history_seconds_before_the_newest(scene):
    scene.serve()
    scene.film()
    scene.start_node()
    scene.running(chunks=8)
    levels = np.array([chunk.grippers[:2, 0] * 255 for _, chunk in scene.arms.chunks])
    steps = np.round((levels[:, 1] - levels[:, 0]) / 5) % 50
    assert set(steps) == {2.0}, "0.0667 s are two pictures at 30 Hz"


def test_keys_jpeg_and_pictures_sent_ahead_work_together(scene):
    keys = scene.folder / "keys"
    for name in ("server", "robot"):
        generate(keys, name)
    pair = {
        "server_public_key": str(keys / "server.key"),
        "client_secret_key": str(keys / "robot.key_secret"),
    }
    scene.serve(0.05, "franka_bimanual", str(keys))
    scene.film()
    scene.start_node(**pair, jpeg_quality=80)
    scene.running(chunks=10)
    with PolicyClient(scene.address, **pair) as watcher:
        counts = watcher.stats(20.0).counts
        assert counts["chunk"] >= 10
        wait_for(lambda: watcher.stats(20.0).counts["prefetch_hit"], 60, "a picture that was sent ahead")
    assert int(scene.value("prefetches")) > 0


def test_append_chunks_begin_where_the_last_one_ends(scene):
    scene.serve(delay_s=0.1)
    scene.film()
    scene.start_node(anchor="append", replan_after=14)
    scene.running(chunks=4)
    chunks = [chunk for _, chunk in scene.arms.chunks]
    assert np.diff([chunk.t0 for chunk in chunks]) == pytest.approx(14 / 22, abs=0.02)
    for last, following in itertools.pairwise(chunks):  # in place too: the policy is relative to the state
        assert following.joints[0] == pytest.approx(last.joints[-1], abs=1e-5)


def test_synchronous_runs_a_part_of_a_chunk_rests_and_asks_again(scene):
    scene.serve()
    scene.film()
    scene.start_node(mode="synchronous", action_rate_hz=20.0, min_cycle_s=0.7)
    scene.running(chunks=4)
    assert {len(chunk) for _, chunk in scene.arms.chunks} == {7}
    at = [at for at, _ in scene.arms.chunks]
    assert np.diff(at).min() > 0.65


def test_injected_latency_counts_and_the_rate_is_lowered_to_the_highest_without_gaps(scene):
    scene.serve()
    scene.film()
    scene.start_node(inject_latency_ms=400.0)
    scene.running(chunks=3)
    scene.until("RUNNING", "the highest gap-free rate")
    latencies = [line["latency_ms"] for line in scene.log() if line["outcome"] == "sent"]
    assert min(latencies) >= 400.0
    assert float(scene.value("rate_hz")) <= 14 / (2 * 0.4) < 22.0
    assert scene.statuses[-1].level == DiagnosticStatus.WARN
    assert scene.arms.chunks[-1][1].rate_hz == pytest.approx(float(scene.value("rate_hz")), abs=3.0)


def test_a_jump_of_ros_time_changes_nothing(scene):
    scene.serve()
    scene.film()
    node = scene.graph.node
    clock = scene.graph.do(lambda: node.create_publisher(Clock, "/clock", qos_profile_sensor_data))
    scene.start_node(Parameter("use_sim_time", value=True))
    scene.running(chunks=2)
    for seconds in (1000, 10, 5000):
        for _ in range(3):
            clock.publish(Clock(clock=Time(sec=seconds)))
        scene.more()
    assert scene.value("state") == "RUNNING" and scene.arms.rejected == ""


def test_the_task_can_change_while_it_runs_and_a_wrong_one_is_refused(scene):
    scene.serve()
    scene.film()
    scene.start_node()
    scene.running()
    node = scene.graph.node
    client = scene.graph.do(lambda: node.create_client(SetParameters, "/policy/set_parameters"))
    assert client.wait_for_service(30.0)

    def change(task: str):
        value = ParameterValue(type=4, string_value=task)
        future = client.call_async(
            SetParameters.Request(parameters=[ParameterMessage(name="task", value=value)])
        )
        wait_for(future.done, 20, "set_parameters")
        return future.result().results[0]

    assert change("fold the cloth").successful
    wait_for(lambda: scene.log()[-1]["task"] == scene.value("task") == "fold the cloth", 20, "the new task")
    answer = change("x" * 513)
    assert not answer.successful and "512" in answer.reason
    assert scene.value("task") == "fold the cloth" and scene.value("state") == "RUNNING"


def test_stop_lets_both_arms_go_and_start_goes_on(scene):
    scene.serve()
    scene.film()
    scene.start_node()
    scene.running(chunks=2)
    assert scene.call("/policy/stop")[0]
    scene.wait_let_go()
    scene.until("IDLE")
    scene.running(chunks=2)


# --- Refusing to start


def test_start_says_what_is_missing(scene, monkeypatch):
    monkeypatch.setattr(policy_module, "START_PATIENCE_S", 1.0)
    node = scene.start_node(task="")
    success, message = scene.call("/policy/start")
    assert not success and "no task" in message and "ros2 param set" in message
    node.set_parameters([Parameter("task", value="stack")])
    assert scene.address in scene.refused("no policy server")
    scene.serve()
    scene.refused("no picture")
    scene.film(offset_s=-100.0)
    scene.refused("100.0 s away from this clock")
    scene.pictures.offset_s = 0.0
    scene.fail_arms("left: reflex")
    assert "/arms/recover" in scene.refused("left: reflex")
    assert not scene.arms.messages
    scene.recover_arms()
    monkeypatch.undo()
    scene.running()


def test_a_policy_for_another_robot_is_refused_with_the_differences(scene):
    scene.serve(robot="franka_single")
    scene.film()
    scene.start_node()
    success, message = scene.call("/policy/start")
    assert not success and "franka_single" in message and "action_dim is 8, the robot has 16" in message
    assert scene.value("state") == "STOPPED" and not scene.arms.messages


def test_a_second_commander_is_refused_while_the_first_holds_the_lease(scene, monkeypatch):
    monkeypatch.setattr(policy_module, "START_PATIENCE_S", 1.0)
    scene.serve()
    scene.film()
    scene.start_node()
    scene.graph.do(lambda: scene.arms.lease.acquire(time.monotonic() + 60))
    scene.refused("another commander holds the lease")
    assert not scene.arms.messages


def test_an_abandoned_lease_is_waited_for(scene):
    scene.serve()
    scene.film()
    scene.start_node()
    scene.graph.do(lambda: scene.arms.lease.acquire(time.monotonic() - scene.arms.lease.timeout_s + 1.0))
    scene.running()


# --- Losing things


def test_a_dropped_camera_ends_the_requests_and_its_return_goes_on_by_itself(scene):
    scene.serve()
    scene.film()
    scene.start_node()
    scene.running(chunks=2)
    scene.pictures.on = False
    scene.until("WAITING", "camera lost")
    count = len(scene.arms.chunks)
    time.sleep(0.5)
    assert len(scene.arms.chunks) == count and scene.arms.let_go == 0, "the last chunk runs to its end"
    scene.pictures.on = True
    scene.until("RUNNING")
    scene.more()


def test_a_camera_lost_for_longer_than_the_lease_lives_goes_on_with_a_new_lease(scene):
    scene.serve()
    scene.film()
    scene.start_node()
    scene.arms.lease.timeout_s = 0.3
    scene.running(chunks=2)
    scene.pictures.on = False
    scene.until("WAITING", "camera lost")
    first = scene.arms.lease.holder
    scene.graph.do(scene.arms.lease.release)
    scene.pictures.on = True
    scene.until("RUNNING")
    scene.more()
    assert scene.arms.lease.holder not in ("", first)


@pytest.mark.parametrize("footage", ["made", "recorded"])
def test_frozen_footage_from_the_camera_node_is_a_lost_camera(scene, footage, tmp_path):
    if footage == "recorded" and not FOOTAGE.is_dir():
        pytest.skip("no recorded robot footage on this machine")
    scene.serve()
    if footage == "made":
        moving = grey([*range(0, 250, 5)])
    else:
        import av

        with av.open(str(next(FOOTAGE.rglob("*.mp4")))) as container:
            frames = itertools.islice(container.decode(video=0), 50)
            moving = [frame.to_ndarray(format="rgb24")[::4, ::4] for frame in frames]
    path = encode(tmp_path / "film.mp4", [*moving, *[moving[-1]] * 45], rate=20)
    size = moving[0].shape
    camera = {"source": "file", "path": str(path), "width": size[1], "height": size[0], "rate_hz": 20.0}
    robot = write_robot(tmp_path, camera=camera, policy={"task": "stack", "server": scene.address})
    argv = [sys.executable, "-m", "vipra_ros.nodes.camera", "--ros-args", "-p", f"robot:={robot}"]
    scene.graph.spin(
        PolicyNode(context=scene.graph.context, parameter_overrides=[Parameter("robot", value=robot)])
    )
    node = Child("camera", argv, tmp_path / "camera.log", scene.graph.env())
    try:
        wait_for(lambda: node.find("streaming"), 60, "pictures", [node], node)
        scene.running()
        scene.until("WAITING", "camera lost")
        assert wait_for(
            lambda: node.find("frozen: the same picture"), 20, "the camera's reason", [node], node
        )
        scene.until("RUNNING")
    finally:
        node.stop()


def test_a_killed_server_ends_the_requests_and_its_return_goes_on_by_itself(scene):
    server = scene.serve(delay_s=0.1)
    scene.film()
    scene.start_node()
    scene.running(chunks=2)
    server.signal(signal.SIGKILL)
    scene.until("WAITING", "no policy server")
    assert scene.arms.let_go == 0
    server.stop()
    scene.serve()
    scene.until("RUNNING")
    scene.more()


def test_a_server_that_comes_back_with_another_robot_stops_the_policy(scene):
    server = scene.serve()
    scene.film()
    scene.start_node()
    scene.running()
    server.stop()
    scene.serve(robot="franka_single")
    scene.until("STOPPED", "does not fit this robot")
    scene.wait_let_go()


def test_after_an_arm_fault_only_recover_and_start_go_on(scene):
    scene.serve()
    scene.film()
    scene.start_node()
    scene.running(chunks=2)
    scene.fail_arms("right: reflex, joint 4")
    scene.until("STOPPED", "right: reflex, joint 4")
    count = len(scene.arms.messages)
    success, message = scene.call("/policy/stop")
    assert success and "right: reflex, joint 4" in message and scene.value("state") == "STOPPED"
    success, message = scene.call("/policy/start")
    assert not success and "recover" in message
    scene.recover_arms()
    time.sleep(0.5)
    assert len(scene.arms.messages) == count, "not before ~/start"
    scene.running(chunks=2)
    assert scene.arms.messages[-1].header.frame_id.split(":")[1] == "1"


def test_silent_arms_stop_the_policy(scene):
    scene.serve()
    scene.film()
    scene.start_node()
    scene.running()
    scene.graph.drop(scene.arms)
    scene.until("STOPPED", "fallen silent")


# --- Chunks that must not run


@pytest.mark.parametrize(
    ("task", "words"), [("nan", "non_finite"), ("fast", "unsafe"), ("jump", "unsafe")], ids=lambda v: v
)
def test_a_chunk_with_nan_or_beyond_the_limits_never_reaches_the_topic(scene, task, words):
    scene.serve()
    scene.film()
    scene.start_node(task=task)
    assert scene.call("/policy/start")[0]
    scene.until("STOPPED", words)
    scene.wait_let_go()
    assert not scene.arms.chunks
    assert all(not message.points for message in scene.arms.messages)
    outcomes = [line["outcome"] for line in scene.log()]
    assert len(outcomes) >= 5 and set(outcomes) <= {"refused", "non_finite", "cancelled"}


def test_a_stray_chunk_is_dropped_and_the_motion_goes_on(scene):
    scene.serve()
    scene.film()
    scene.start_node(task="stray")
    assert scene.call("/policy/start")[0]
    wait_for(lambda: len(scene.arms.chunks) >= 8, 30, "8 chunks")
    assert scene.value("state") == "RUNNING" and scene.arms.let_go == 0
    refused = [line["message"] for line in scene.log() if line["outcome"] == "refused"]
    assert refused and all(message.startswith("jump: ") for message in refused)
    starts = np.array([chunk.joints[0] for _, chunk in scene.arms.chunks])
    assert np.ptp(starts, axis=0).max() < 0.1


@pytest.mark.parametrize(("code", "chunks"), [("expired", 5), ("holding", 5), ("start", 1)])
def test_refusals_by_the_arms_are_retried_only_where_that_can_help(scene, code, chunks):
    scene.serve()
    scene.film()
    scene.start_node()
    scene.arms.refuse = (code, "because")
    assert scene.call("/policy/start")[0]
    scene.until("STOPPED", f"{code}: because")
    assert int(scene.value("refused")) == chunks
    scene.wait_let_go()


# --- The process


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_the_process_lets_the_arms_go_when_it_is_interrupted(scene, sig):
    scene.serve()
    scene.film()
    argv = [sys.executable, "-m", "vipra_ros.nodes.policy", "--ros-args", "-p", f"robot:={scene.robot()}"]
    node = Child("policy", argv, scene.folder / "policy.log", scene.graph.env())
    try:
        scene.running(chunks=2)
        os.kill(node.pid, sig)
        wait_for(lambda: node.returncode() is not None, 20, "the end")
        assert node.returncode() == 0 and "Traceback" not in node.tail(100)
        scene.wait_let_go()
    finally:
        node.stop()


def test_a_wrong_setting_ends_the_process_with_one_line(scene):
    argv = [sys.executable, "-m", "vipra_ros.nodes.policy", "--ros-args", "-p", f"robot:={scene.robot()}"]
    wrong = [*argv, "-p", "policy.action_rate_hz:=30.0"]
    node = Child("policy", wrong, scene.folder / "policy.log", scene.graph.env())
    try:
        wait_for(lambda: node.returncode() is not None, 60, "the end")
        assert node.returncode() == 2
        text = (
            "policy: parameter policy.action_rate_hz: Input should be less than or equal to 22 (got '30.0')"
        )
        assert node.tail() == text
    finally:
        node.stop()


def test_the_embodiment_and_the_robot_must_have_the_same_arms():
    assert dimensions_by_arm(load(Embodiment, "franka_single"), ("right",)) == {"right": list(range(8))}
    rows = dimensions_by_arm(load(Embodiment, "franka_bimanual"), ("right", "left"))
    assert list(rows) == ["left", "right"] and rows["right"][0] == 8
    with pytest.raises(ConfigError, match="franka_single is for right; the robot has left, right"):
        dimensions_by_arm(load(Embodiment, "franka_single"), ("left", "right"))
