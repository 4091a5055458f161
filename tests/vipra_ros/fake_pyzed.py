"""A stand-in for the ZED SDK's Python API (`pyzed.sl`), for machines without one.

It behaves as the SDK does (stereolabs/zed-python-api, src/pyzed/sl.pyx): constructors that check types,
statuses that are an ordered enum with warnings below SUCCESS, `grab` that waits for the next picture,
`Mat` memory that is the SDK's own and overwritten by the next `retrieve_image`, BGRA rows that may be
padded, image stamps in Unix nanoseconds, a dropped-frame counter that only grows. Tests plug a `Device`
in: what the camera will do.
"""

import enum
import sys
import time
import types
from collections import deque

import numpy as np

SIZES = {"VGA": (672, 376), "HD720": (1280, 720), "HD1080": (1920, 1080), "HD2K": (2208, 1242)}
PITCH_PAD = 64  # bytes beyond the pixels of each row


class Device:
    """The camera behind the SDK: what `open` and each `grab` answer, and what is seen."""

    def __init__(self, serial: int = 31234567):
        self.serial = serial
        self.open_status = "SUCCESS"
        self.grabs: deque[str] = deque()  # statuses of the next grabs; then SUCCESS for ever
        self.dropped = 0
        self.age_s = 0.012  # between capture and arrival
        self.wall_offset_s = 0.0  # how far the wall clock was set
        self.frozen = False
        self.is_open = False
        self.parameters = None
        self.opened = 0
        self._count = 0

    def picture(self, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 4] BGRA: blue 10, green 20, red 30 and noise in one corner."""
        if not self.frozen:
            self._count += 1
        bgra = np.empty((height, width, 4), np.uint8)
        bgra[:] = (10, 20, 30, 255)
        bgra[: height // 8, : width // 8, :3] = self._count % 200
        return bgra


def install(monkeypatch, device: Device) -> types.ModuleType:
    """Make `import pyzed.sl` find a fake SDK with `device` plugged in."""
    package, sl = types.ModuleType("pyzed"), types.ModuleType("pyzed.sl")
    package.sl = sl

    class ERROR_CODE(enum.Enum):
        CORRUPTED_FRAME = -2
        CAMERA_REBOOTING = -1
        SUCCESS = 0
        FAILURE = 1
        CAMERA_NOT_DETECTED = 4
        INVALID_RESOLUTION = 7
        CAMERA_NOT_INITIALIZED = 19

        def __str__(self):
            return self.name.replace("_", " ")

    RESOLUTION = enum.Enum("RESOLUTION", list(SIZES))
    DEPTH_MODE = enum.Enum("DEPTH_MODE", ["NONE", "NEURAL"])
    VIEW = enum.Enum("VIEW", ["LEFT", "RIGHT"])
    TIME_REFERENCE = enum.Enum("TIME_REFERENCE", ["IMAGE", "CURRENT"])

    class InitParameters:
        def __init__(
            self,
            camera_resolution=RESOLUTION.HD720,
            camera_fps=0,
            depth_mode=DEPTH_MODE.NEURAL,
            open_timeout_sec=5.0,
            async_grab_camera_recovery=False,
        ):
            right = (
                isinstance(camera_resolution, RESOLUTION)
                and isinstance(camera_fps, int)
                and isinstance(depth_mode, DEPTH_MODE)
                and isinstance(open_timeout_sec, float)
                and isinstance(async_grab_camera_recovery, bool)
            )
            if not right:
                raise TypeError("Argument is not of right type.")
            self.camera_resolution, self.camera_fps = camera_resolution, camera_fps
            self.depth_mode, self.async_grab_camera_recovery = depth_mode, async_grab_camera_recovery
            self.serial = None

        def set_from_serial_number(self, serial_number):
            self.serial = serial_number

    class RuntimeParameters:
        def __init__(self, enable_depth=True):
            self.enable_depth = enable_depth

    class Timestamp:
        def __init__(self, nanoseconds):
            self._nanoseconds = nanoseconds

        def get_nanoseconds(self):
            return self._nanoseconds

    class Mat:
        memory = None

        def get_data(self):
            return self.memory

    class Camera:
        def open(self, parameters):
            device.parameters, device.opened = parameters, device.opened + 1
            if parameters.serial not in (None, device.serial):
                return ERROR_CODE.CAMERA_NOT_DETECTED
            status = ERROR_CODE[device.open_status]
            device.is_open = status == ERROR_CODE.SUCCESS
            self._size = SIZES[parameters.camera_resolution.name]
            self._period_s = 1.0 / parameters.camera_fps
            self._next = time.monotonic() + self._period_s
            return status

        def close(self):
            device.is_open = False

        def grab(self, runtime):
            if not device.is_open:
                return ERROR_CODE.CAMERA_NOT_INITIALIZED
            assert not runtime.enable_depth, "depth costs GPU time nobody uses"
            time.sleep(max(0.0, self._next - time.monotonic()))
            self._next = max(self._next, time.monotonic() - self._period_s) + self._period_s
            status = ERROR_CODE[device.grabs.popleft()] if device.grabs else ERROR_CODE.SUCCESS
            if status == ERROR_CODE.SUCCESS:
                self._image_ns = time.time_ns() + int((device.wall_offset_s - device.age_s) * 1e9)
                self._bgra = device.picture(*self._size)
            return status

        def retrieve_image(self, mat, view):
            assert view == VIEW.LEFT
            width, height = self._size
            if mat.memory is None:
                row = np.zeros((height, 4 * width + PITCH_PAD), np.uint8)
                mat.memory = row[:, : 4 * width].reshape(height, width, 4, copy=False)
            mat.memory[:] = self._bgra
            return ERROR_CODE.SUCCESS

        def get_timestamp(self, reference):
            if reference == TIME_REFERENCE.CURRENT:
                return Timestamp(time.time_ns() + int(device.wall_offset_s * 1e9))
            return Timestamp(self._image_ns)

        def get_frame_dropped_count(self):
            return device.dropped

        def get_camera_information(self):
            width, height = self._size
            lens = types.SimpleNamespace(fx=0.55 * width, fy=0.55 * width, cx=width / 2, cy=height / 2)
            configuration = types.SimpleNamespace(
                resolution=types.SimpleNamespace(width=width, height=height),
                calibration_parameters=types.SimpleNamespace(left_cam=lens),
            )
            return types.SimpleNamespace(serial_number=device.serial, camera_configuration=configuration)

    for item in (ERROR_CODE, RESOLUTION, DEPTH_MODE, VIEW, TIME_REFERENCE):
        setattr(sl, item.__name__, item)
    for item in (InitParameters, RuntimeParameters, Timestamp, Mat, Camera):
        setattr(sl, item.__name__, item)
    monkeypatch.setitem(sys.modules, "pyzed", package)
    monkeypatch.setitem(sys.modules, "pyzed.sl", sl)
    return sl
