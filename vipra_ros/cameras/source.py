"""What a camera source is, how one is chosen, and when a camera counts as frozen."""

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from config.loading import load
from config.robot import Robot
from config.workcell import Workcell


class CameraError(RuntimeError):
    """The camera cannot be opened or was lost; the message says what to do. Opening it again may help."""


class EndOfSource(Exception):
    """A recording has come to its end; opening it again would start it over."""


class Clock(Protocol):
    """The executor clock (`vipra_ros.clock`)."""

    def now(self) -> float: ...


@dataclass(frozen=True)
class Frame:
    """One picture."""

    rgb: np.ndarray  # uint8 [height, width, 3]; its reader may keep it
    stamp_s: float  # when it was captured, on the executor clock
    dropped: int  # pictures lost since the frame before


@dataclass(frozen=True)
class Intrinsics:
    """Pinhole model of the published picture, px."""

    fx: float
    fy: float
    cx: float
    cy: float


class Source(Protocol):
    """A camera. One thread uses it."""

    noisy: bool  # a live sensor: two captures are never identical to the bit, so identical ones mean it froze

    def open(self) -> Intrinsics | None:
        """Connect, and return the lens if it is known. Raises CameraError."""

    def grab(self, timeout_s: float) -> Frame | None:
        """The next picture; None if there is none within about `timeout_s` of wall time.

        Raises CameraError when the camera is lost, EndOfSource when there will never be another.
        """

    def close(self) -> None:
        """Let go of the camera. May be called at any time, also twice."""


def make_source(robot: Robot, clock: Clock) -> Source:
    """The source that `robot.camera` names, not yet open. Raises CameraError, ConfigError."""
    camera = robot.camera
    size = camera.width, camera.height
    match camera.source:
        case "zed":
            from vipra_ros.cameras.zed import ZedSource

            return ZedSource(*size, camera.rate_hz, camera.serial, clock)
        case "sim":
            from vipra_ros.cameras.sim import SimSource

            workcell, simulation = load(Workcell, robot.workcell), robot.simulation
            return SimSource(
                workcell, simulation.name, *size, camera.rate_hz, clock, simulation.wait_for_camera
            )
        case "file":
            from vipra_ros.cameras.file import FileSource

            if camera.path is None:
                raise CameraError("camera.source is 'file' but camera.path is empty: name a video file")
            return FileSource(camera.path, *size, camera.loop, clock)
        case "uvc":
            from vipra_ros.cameras.uvc import UvcSource

            return UvcSource(camera.device, *size, camera.rate_hz, clock)


def wait_until(clock: Clock, due_s: float, timeout_s: float) -> bool:
    """Sleep until `clock` shows `due_s`; False if that takes more than `timeout_s` of wall time.

    The clock may be simulated, hence slower than wall time or stopped.
    """
    give_up = time.monotonic() + timeout_s
    while (left := due_s - clock.now()) > 0:
        if time.monotonic() >= give_up:
            return False
        time.sleep(min(left, 0.005))
    return True


class FreezeDetector:
    """Notices that a camera keeps delivering one and the same picture."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._picture: np.ndarray | None = None
        self._since_s = 0.0

    def frozen(self, frame: Frame) -> bool:
        """Whether `frame` and all frames for more than `timeout_s` before it show the same picture."""
        if self._picture is None or not _identical(self._picture, frame.rgb):
            self._picture, self._since_s = frame.rgb, frame.stamp_s
        return frame.stamp_s - self._since_s > self._timeout_s

    def reset(self) -> None:
        """Forget what was seen, after the camera was opened again."""
        self._picture = None


def _identical(a: np.ndarray, b: np.ndarray) -> bool:
    # Live pictures nearly always differ in the sparse sample: the full comparison is for frozen ones.
    return np.array_equal(a[::16, ::16], b[::16, ::16]) and np.array_equal(a, b)
