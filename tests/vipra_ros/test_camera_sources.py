"""Camera sources without ROS: a faithful fake of the ZED SDK, real encoded video, OpenCV's real capture."""

import sys
import time
import types
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from tests.vipra_ros import fake_pyzed
from vipra_ros.cameras.file import FileSource
from vipra_ros.cameras.source import CameraError, EndOfSource, Frame, FreezeDetector
from vipra_ros.cameras.uvc import UvcSource
from vipra_ros.cameras.zed import ZedSource
from vipra_ros.clock import MonotonicClock

FOOTAGE = Path(__file__).parents[3] / "shared/data/lerobot_v3_video/videos/observation.images.front"


class HandClock:
    """An executor clock that the test moves."""

    def __init__(self):
        self.t = 100.0

    def now(self) -> float:
        return self.t


def encode(path: Path, frames: list[np.ndarray], rate: int = 20) -> Path:
    """Write uint8 [h, w, 3] frames as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": "4", "preset": "ultrafast"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def grey(values: list[int], height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [np.full((height, width, 3), value, np.uint8) for value in values]


@pytest.fixture
def device(monkeypatch):
    device = fake_pyzed.Device()
    fake_pyzed.install(monkeypatch, device)
    return device


# --- ZED


def test_zed_picture_is_rgb_of_the_published_size_though_the_sdk_pads_rows(device):
    source = ZedSource(320, 180, 60, None, MonotonicClock())
    lens = source.open()
    frame = source.grab(0.2)
    assert frame.rgb.shape == (180, 320, 3) and frame.rgb.dtype == np.uint8
    assert (frame.rgb[-1, -1] == (30, 20, 10)).all() and (frame.rgb[90] == (30, 20, 10)).all()
    assert device.parameters.camera_resolution.name == "VGA" and device.parameters.camera_fps == 60
    assert device.parameters.depth_mode.name == "NONE" and device.parameters.async_grab_camera_recovery
    assert lens.cx == 160 and lens.cy == 90
    source.close()
    assert not device.is_open


def test_zed_frames_are_ours_when_the_sdk_reuses_its_memory(device):
    source = ZedSource(672, 376, 100, None, MonotonicClock())
    source.open()
    first = source.grab(0.2).rgb
    kept = first.copy()
    source.grab(0.2)
    assert np.array_equal(first, kept)


def test_zed_stamp_is_the_capture_time_on_the_executor_clock(device):
    device.age_s = 0.2
    source = ZedSource(320, 180, 100, None, HandClock())
    source.open()
    assert 99.5 <= source.grab(0.2).stamp_s <= 99.8 + 1e-6, "a busy machine takes a while to read it"


def test_zed_stamps_do_not_follow_a_wall_clock_jump(device):
    source = ZedSource(320, 180, 60, None, MonotonicClock())
    source.open()
    stamps = [source.grab(0.2).stamp_s for _ in range(3)]
    device.age_s, device.wall_offset_s = -5.0, 5.0  # set between capture and reading
    stamps.append(source.grab(0.2).stamp_s)
    device.age_s = 0.012
    stamps += [source.grab(0.2).stamp_s for _ in range(3)]
    assert np.diff(stamps).min() > 0 and np.diff(stamps).max() < 1.0
    assert abs(stamps[-1] - time.monotonic()) < 1.0


def test_zed_warnings_are_not_frames_and_errors_are_a_lost_camera(device):
    source = ZedSource(320, 180, 60, None, MonotonicClock())
    source.open()
    device.grabs.extend(["CAMERA_REBOOTING", "CORRUPTED_FRAME"])
    assert source.grab(0.2) is None and source.grab(0.2) is None
    assert source.grab(0.2) is not None
    device.grabs.append("CAMERA_NOT_DETECTED")
    with pytest.raises(CameraError, match=r"CAMERA NOT DETECTED.*cable"):
        source.grab(0.2)


def test_zed_counts_dropped_frames_once(device):
    device.dropped = 7
    source = ZedSource(320, 180, 60, None, MonotonicClock())
    source.open()
    assert source.grab(0.2).dropped == 0
    device.dropped = 10
    assert [source.grab(0.2).dropped for _ in range(2)] == [3, 0]


def test_zed_that_does_not_open_says_why(device):
    device.open_status = "CAMERA_NOT_DETECTED"
    with pytest.raises(CameraError, match=r"did not open: CAMERA NOT DETECTED.*USB 3"):
        ZedSource(320, 180, 60, None, MonotonicClock()).open()
    device.open_status = "SUCCESS"
    with pytest.raises(CameraError, match=r"12 did not open"):
        ZedSource(320, 180, 60, 12, MonotonicClock()).open()


def test_zed_mode_covers_size_and_rate_or_the_modes_are_listed(device):
    ZedSource(1280, 720, 30, device.serial, MonotonicClock()).open()
    assert device.parameters.camera_resolution.name == "HD720" and device.parameters.camera_fps == 30
    with pytest.raises(CameraError, match=r"HD720 1280x720 to 60 Hz"):
        ZedSource(1920, 1080, 60, None, MonotonicClock())


@pytest.mark.parametrize("module", [None, types.ModuleType("pyzed")])
def test_without_the_sdk_the_error_says_how_to_install_it_and_that_pypi_has_another_package(
    monkeypatch, module
):
    monkeypatch.setitem(sys.modules, "pyzed", module)
    monkeypatch.setitem(sys.modules, "pyzed.sl", None)
    with pytest.raises(CameraError, match=r"get_python_api.py.*PyPI's pyzed is another package"):
        ZedSource(320, 180, 60, None, MonotonicClock()).open()


# --- File


def test_file_plays_at_its_own_timestamps_and_loops(tmp_path):
    path = encode(tmp_path / "a.mp4", grey([20, 120, 220]), rate=20)
    source = FileSource(str(path), 32, 24, True, MonotonicClock())
    source.open()
    frames = [source.grab(1.0) for _ in range(7)]
    assert np.diff([f.stamp_s for f in frames]) == pytest.approx([0.05] * 6, abs=1e-3)
    levels = [int(f.rgb.mean()) for f in frames]
    assert np.abs(np.subtract(levels, [20, 120, 220, 20, 120, 220, 20])).max() < 6
    assert frames[0].rgb.shape == (24, 32, 3) and frames[0].rgb.flags.c_contiguous
    assert abs(frames[-1].stamp_s - time.monotonic()) < 5.0
    source.close()


def test_file_skips_what_is_late_and_counts_it(tmp_path):
    clock = HandClock()
    source = FileSource(str(encode(tmp_path / "a.mp4", grey(list(range(0, 200, 10))))), 32, 24, False, clock)
    source.open()
    assert source.grab(0.0).stamp_s == 100.0
    assert source.grab(0.0) is None
    clock.t = 100.26
    frame = source.grab(0.0)
    assert frame.dropped == 4 and frame.stamp_s == pytest.approx(100.25, abs=1e-3)
    clock.t = 150.0
    assert source.grab(0.0).stamp_s == pytest.approx(150.0), (
        "a long pause moves the film, it does not skip to the end"
    )


def test_file_without_loop_ends(tmp_path):
    clock = HandClock()
    source = FileSource(str(encode(tmp_path / "a.mp4", grey([0, 100]))), 32, 24, False, clock)
    source.open()
    for _ in range(2):
        assert source.grab(0.0) is not None
        clock.t += 0.05
    with pytest.raises(EndOfSource, match=r"camera.loop is false"):
        source.grab(0.0)


def test_a_file_that_is_no_video_is_named(tmp_path):
    text = tmp_path / "a.mp4"
    text.write_text("hello")
    with pytest.raises(CameraError, match=r"a.mp4: no video"):
        FileSource(str(text), 32, 24, True, MonotonicClock()).open()
    with pytest.raises(CameraError, match=r"no such file"):
        FileSource(str(tmp_path / "b.mp4"), 32, 24, True, MonotonicClock()).open()


@pytest.mark.skipif(not FOOTAGE.is_dir(), reason="no recorded robot footage on this machine")
def test_recorded_robot_footage_plays_and_is_not_taken_for_frozen():
    clock = HandClock()
    source = FileSource(str(next(FOOTAGE.rglob("*.mp4"))), 256, 256, True, clock)
    source.open()
    freeze = FreezeDetector(0.5)
    frames = []
    while len(frames) < 60:
        if (frame := source.grab(0.0)) is None:
            clock.t += 0.01
        else:
            frames.append(frame)
            assert not freeze.frozen(frame)
    assert np.diff([f.stamp_s for f in frames]).min() > 0


# --- UVC


def test_uvc_without_a_camera_says_what_to_check():
    with pytest.raises(CameraError, match=r"/dev/video97 did not open.*group `video`"):
        UvcSource(97, 64, 48, 30, MonotonicClock()).open()


def test_uvc_pictures_are_rgb_of_the_published_size_and_the_end_is_a_lost_camera(tmp_path, monkeypatch):
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 0] = 200
    path = str(encode(tmp_path / "a.mp4", [red, red]))
    real = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda device, backend: real(path))
    source = UvcSource(0, 32, 24, 30, MonotonicClock())
    source.open()
    frame = source.grab(0.2)
    assert frame.rgb.shape == (24, 32, 3)
    assert np.abs(frame.rgb.reshape(-1, 3).mean(0) - (200, 0, 0)).max() < 8
    assert abs(frame.stamp_s - time.monotonic()) < 5.0
    source.grab(0.2)
    with pytest.raises(CameraError, match=r"no pictures"):
        source.grab(0.2)


# --- Freezing


def test_the_same_picture_for_longer_than_the_limit_is_frozen_and_one_changed_pixel_is_not():
    freeze = FreezeDetector(0.5)
    picture = np.zeros((48, 64, 3), np.uint8)
    assert [freeze.frozen(Frame(picture.copy(), t, 0)) for t in (0.0, 0.3, 0.5, 0.6)] == [
        False,
        False,
        False,
        True,
    ]
    changed = picture.copy()
    changed[5, 5, 1] = 1
    assert not freeze.frozen(Frame(changed, 0.7, 0))
    assert freeze.frozen(Frame(changed.copy(), 1.3, 0))
    freeze.reset()
    assert not freeze.frozen(Frame(changed.copy(), 1.4, 0))
