"""The camera node on real Fast DDS: pictures, stamps, diagnostics, frozen and lost cameras."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image

from tests.vipra_ros import fake_pyzed
from tests.vipra_ros.graph import Graph, write_robot
from tests.vipra_ros.test_camera_sources import encode, grey
from vipra_ros.nodes import camera as camera_module
from vipra_ros.nodes.camera import CameraNode
from vipra_ros.process import Child, wait_for

pytestmark = pytest.mark.live


@pytest.fixture
def graph():
    with Graph() as graph:
        yield graph


@pytest.fixture
def device(monkeypatch):
    device = fake_pyzed.Device()
    fake_pyzed.install(monkeypatch, device)
    return device


def start(graph: Graph, folder: Path, **camera) -> tuple[list[Image], list[DiagnosticStatus]]:
    """Run a camera node in the graph; what it publishes."""
    images = graph.collect(Image, "front_camera/image_raw", qos_profile_sensor_data)
    statuses: list[DiagnosticStatus] = []
    take = lambda message: statuses.extend(message.status)  # noqa: E731
    graph.do(lambda: graph.node.create_subscription(DiagnosticArray, "/diagnostics", take, 10))
    settings = {"width": 64, "height": 48, "rate_hz": 60.0, "freeze_timeout_s": 0.3, **camera}
    robot = write_robot(folder, camera=settings)
    graph.spin(CameraNode(context=graph.context, parameter_overrides=[Parameter("robot", value=robot)]))
    return images, statuses


def said(statuses: list[DiagnosticStatus], level: bytes, words: str) -> bool:
    return any(s.level == level and words in s.message for s in statuses)


def test_pictures_are_rgb8_stamped_on_the_executor_clock_with_a_camera_info_each(graph, tmp_path, device):
    infos = graph.collect(CameraInfo, "front_camera/camera_info", qos_profile_sensor_data)
    images, statuses = start(graph, tmp_path, source="zed")
    wait_for(lambda: len(images) > 5 and len(infos) > 5, 20, "pictures")
    image = images[-1]
    assert (image.encoding, image.width, image.height, image.step) == ("rgb8", 64, 48, 192)
    assert image.header.frame_id == "front_camera_optical_frame"
    rgb = np.frombuffer(image.data, np.uint8).reshape(48, 64, 3)
    assert (rgb[-1, -1] == (30, 20, 10)).all()
    stamp = image.header.stamp.sec + image.header.stamp.nanosec * 1e-9
    assert abs(stamp - time.monotonic()) < 5.0
    assert infos[-1].k[2] == pytest.approx(32) and infos[-1].p[6] == pytest.approx(24)

    def stamps(messages) -> set[tuple[int, int]]:
        return {(m.header.stamp.sec, m.header.stamp.nanosec) for m in list(messages)}

    wait_for(lambda: len(stamps(images) & stamps(infos)) > 5, 20, "an info for each picture")
    wait_for(lambda: said(statuses, DiagnosticStatus.OK, "streaming"), 20, "diagnostics")
    assert {"fps", "dropped", "withheld"} <= {v.key for v in statuses[-1].values}


def test_a_frozen_camera_stops_being_published_and_comes_back_by_itself(graph, tmp_path, device):
    images, statuses = start(graph, tmp_path, source="zed")
    wait_for(lambda: len(images) > 5, 20, "pictures")
    device.frozen = True
    wait_for(lambda: said(statuses, DiagnosticStatus.ERROR, "frozen"), 20, "diagnosis")
    published = len(images)
    withheld = device.opened, time.monotonic() + 0.3
    wait_for(lambda: time.monotonic() > withheld[1], 5, "a while")
    assert len(images) <= published + 1, "one may have been on its way"
    device.frozen = False
    wait_for(lambda: len(images) > published + 5, 20, "pictures again")
    assert device.opened == withheld[0], "a frozen camera is not opened again"


def test_a_lost_camera_is_opened_again_and_rebooting_is_waited_for(graph, tmp_path, device):
    images, statuses = start(graph, tmp_path, source="zed")
    wait_for(lambda: len(images) > 5, 20, "pictures")
    device.grabs.extend(["CAMERA_REBOOTING"] * 10)
    wait_for(lambda: not device.grabs, 20, "the reboot")
    assert device.opened == 1
    device.open_status = "CAMERA_NOT_DETECTED"
    device.grabs.append("CAMERA_NOT_DETECTED")
    wait_for(lambda: said(statuses, DiagnosticStatus.ERROR, "ZED lost"), 20, "diagnosis")
    wait_for(lambda: said(statuses, DiagnosticStatus.ERROR, "did not open"), 20, "another try")
    device.open_status = "SUCCESS"
    before = len(images)
    wait_for(lambda: len(images) > before + 5, 20, "pictures again")
    assert device.opened >= 3


def test_a_camera_that_falls_silent_is_opened_again(graph, tmp_path, device, monkeypatch):
    monkeypatch.setattr(camera_module, "LOST_AFTER_S", 0.2)
    images, statuses = start(graph, tmp_path, source="zed")
    wait_for(lambda: len(images) > 5, 20, "pictures")
    device.grabs.extend(["CAMERA_REBOOTING"] * 30)
    wait_for(lambda: said(statuses, DiagnosticStatus.ERROR, "no picture for 0.2 s"), 20, "diagnosis")
    wait_for(lambda: device.opened > 1, 20, "opening again")


def test_a_missing_sdk_is_said_on_diagnostics_and_the_node_lives(graph, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyzed", None)
    _, statuses = start(graph, tmp_path, source="zed")
    wait_for(
        lambda: said(statuses, DiagnosticStatus.ERROR, "PyPI's pyzed is another package"), 10, "diagnosis"
    )


def test_frozen_footage_counts_as_a_frozen_camera(graph, tmp_path):
    path = encode(tmp_path / "a.mp4", [*grey([10, 60, 110, 160]), *grey([200] * 40)], rate=30)
    images, statuses = start(graph, tmp_path, source="file", path=str(path), loop=False, rate_hz=30.0)
    wait_for(lambda: said(statuses, DiagnosticStatus.ERROR, "frozen"), 20, "diagnosis")
    wait_for(lambda: said(statuses, DiagnosticStatus.ERROR, "has ended"), 20, "the end")
    assert len(images) <= 4 + 0.3 * 30 + 2


def run_node(graph: Graph, folder: Path, *parameters: str, **camera) -> Child:
    robot = write_robot(folder, camera={"width": 64, "height": 48, "rate_hz": 30.0, **camera})
    words = [f"robot:={robot}", *parameters]
    argv = [sys.executable, "-m", "vipra_ros.nodes.camera", "--ros-args"]
    return Child(
        "camera", [*argv, *(x for w in words for x in ("-p", w))], folder / "camera.log", graph.env()
    )


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_the_process_ends_cleanly_on_signals(graph, tmp_path, sig):
    path = encode(tmp_path / "a.mp4", grey(list(range(0, 250, 5))))
    images = graph.collect(Image, "/front_camera/image_raw", qos_profile_sensor_data)
    node = run_node(graph, tmp_path, source="file", path=str(path))
    try:
        wait_for(lambda: images, 60, "pictures", [node], node)
        os.kill(node.pid, sig)
        assert wait_for(lambda: node.returncode() is not None, 20, "the end") and node.returncode() == 0
        assert "Traceback" not in node.tail(100)
    finally:
        node.stop()


def test_large_pictures_reach_other_processes(graph, tmp_path):
    path = encode(tmp_path / "a.mp4", grey(list(range(0, 250, 10)), 720, 1280))
    images = graph.collect(Image, "/front_camera/image_raw", qos_profile_sensor_data)
    node = run_node(graph, tmp_path, source="file", path=str(path), width=1280, height=720, rate_hz=20.0)
    try:
        wait_for(lambda: len(images) > 3, 60, "pictures", [node], node)
        wait_for(lambda: len(images) > 23, 60, "more pictures", [node], node)
        seconds = [image.header.stamp.sec + image.header.stamp.nanosec * 1e-9 for image in images[3:24]]
        assert seconds[-1] - seconds[0] < 4 * 20 / 20.0, "on a busy machine three of four may be lost"
    finally:
        node.stop()


def test_a_wrong_setting_ends_the_process_with_one_line(graph, tmp_path):
    node = run_node(graph, tmp_path, "camera.width:=7", source="uvc")
    try:
        wait_for(lambda: node.returncode() is not None, 60, "the end")
        assert node.returncode() == 2
        assert (
            node.tail()
            == "camera: parameter camera.width: Input should be greater than or equal to 32 (got '7')"
        )
    finally:
        node.stop()


def test_importing_the_node_loads_no_renderer_and_no_torch():
    heavy = {"mujoco", "torch", "triton", "pyzed"}
    code = f"import sys, vipra_ros.nodes.camera; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
