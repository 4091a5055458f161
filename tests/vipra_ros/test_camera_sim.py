"""The simulated camera against the real simulator: pictures on simulated time, `/clock`, and its end."""

import sys
import time

import numpy as np
import pytest
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, Image

from config.loading import load
from config.workcell import Workcell
from simulation.state import SharedState
from tests.vipra_ros.graph import Graph
from vipra_ros.cameras.sim import SimSource
from vipra_ros.cameras.source import CameraError
from vipra_ros.clock import MonotonicClock, SimulatedClock
from vipra_ros.nodes.camera import CameraNode
from vipra_ros.process import Child, wait_for

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def simulator(tmp_path_factory):
    with Graph() as graph:
        slot = graph.slot
        argv = [sys.executable, "-m", "simulation.server", "--workcell", "bimanual", "--name", slot.name]
        argv += ["--hostnames", f"left={slot.host(1)},right={slot.host(2)}"]
        child = Child("simulator", argv, tmp_path_factory.mktemp("sim") / "simulator.log")
        try:
            wait_for(lambda: child.find(r"^ready\b"), 60, "simulator", [child], child)
            yield graph, child
        finally:
            child.stop()


def test_pictures_are_stamped_in_simulated_time_at_the_asked_rate(simulator):
    graph, _ = simulator
    clock = SimulatedClock(graph.slot.name)
    source = SimSource(load(Workcell, "bimanual"), graph.slot.name, 160, 90, 10.0, clock)
    lens = source.open()
    frames = []
    while len(frames) < 5:
        if (frame := source.grab(2.0)) is not None:
            frames.append(frame)
    source.close()
    clock.close()
    steps = np.diff([frame.stamp_s for frame in frames])
    skipped = np.array([frame.dropped for frame in frames[:-1]])
    assert (steps >= 0.1 * (1 + skipped) - 0.1).all() and frames[-1].stamp_s - frames[0].stamp_s >= 0.35
    assert frames[0].rgb.shape == (90, 160, 3) and frames[0].rgb.std() > 10, "something is in view"
    assert lens.cx == 80 and lens.cy == 45


def test_simulated_time_waits_for_a_slow_camera_and_goes_on_without_a_dead_one(simulator):
    graph, child = simulator
    clock = SimulatedClock(graph.slot.name)
    source = SimSource(load(Workcell, "bimanual"), graph.slot.name, 160, 90, 50.0, clock, waited_for=True)
    source.open()
    frames = []
    while len(frames) < 6:
        if (frame := source.grab(2.0)) is not None:
            frames.append(frame)
            time.sleep(0.1)  # a renderer five times too slow
            assert clock.now() <= frame.stamp_s + 0.021
    assert [frame.dropped for frame in frames[1:]] == [0] * 5
    np.testing.assert_allclose(np.diff([frame.stamp_s for frame in frames]), 0.02, atol=0.0011)
    stuck = clock.now()
    wait_for(
        lambda: clock.now() > stuck + 0.1, 20, "time that goes on: the camera takes no pictures", [child]
    )
    source.close()
    clock.close()


def test_a_still_scene_is_not_a_frozen_camera_and_ros_time_is_published(simulator, tmp_path):
    graph, child = simulator
    images = graph.collect(Image, "/front_camera/image_raw", qos_profile_sensor_data)
    infos = graph.collect(CameraInfo, "/front_camera/camera_info", qos_profile_sensor_data)
    clocks = graph.collect(Clock, "/clock", qos_profile_sensor_data)
    given = {
        "robot": "sim_bimanual",
        "simulation.name": graph.slot.name,
        "camera.width": 160,
        "camera.height": 90,
        "camera.freeze_timeout_s": 0.1,
    }
    overrides = [Parameter(name, value=value) for name, value in given.items()]
    node = graph.spin(CameraNode(context=graph.context, parameter_overrides=overrides))

    def seconds(stamp) -> float:
        return stamp.sec + 1e-9 * stamp.nanosec

    wait_for(lambda: len(images) > 20, 60, "pictures", [child], child)
    assert seconds(images[-1].header.stamp) - seconds(images[0].header.stamp) > 0.5
    assert infos[-1].k[0] > 0 and infos[-1].width == 160
    wait_for(lambda: len(clocks) > 20, 20, "/clock")
    assert seconds(clocks[-1].clock) > seconds(clocks[0].clock)
    graph.drop(node)


def test_a_simulator_that_is_not_there_is_named(monkeypatch):
    attach = SharedState.attach
    monkeypatch.setattr(SharedState, "attach", lambda name: attach(name, 0.1))
    source = SimSource(load(Workcell, "bimanual"), "no_such_simulator", 160, 90, 10.0, MonotonicClock())
    with pytest.raises(CameraError, match="no_such_simulator"):
        source.open()
