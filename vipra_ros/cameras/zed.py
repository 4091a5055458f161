"""The left, rectified picture of a ZED stereo camera, by the ZED SDK's Python API (`pyzed.sl`, SDK 4 and 5).

API facts: stereolabs/zed-python-api, src/pyzed/sl.pyx. Depth is off: only the picture is used.
"""

import cv2

from vipra_ros.cameras.source import CameraError, Clock, Frame, Intrinsics

INSTALL = (
    "the ZED SDK's Python API is not installed: install the SDK from https://www.stereolabs.com/developers, "
    "then run `python /usr/local/zed/get_python_api.py` in this environment (not `pip install pyzed`: "
    "PyPI's pyzed is another package)"
)
# Name, width, height, rates of sl.RESOLUTION, smallest first.
MODES = (
    ("VGA", 672, 376, (15, 30, 60, 100)),
    ("HD720", 1280, 720, (15, 30, 60)),
    ("HD1080", 1920, 1080, (15, 30)),
    ("HD2K", 2208, 1242, (15,)),
)
MAX_AGE_S = 0.5  # a picture older than this at arrival means that the wall clock was set in between


class ZedSource:
    """A ZED camera at its smallest mode that covers the published size and rate."""

    noisy = True

    def __init__(self, width: int, height: int, rate_hz: float, serial: int | None, clock: Clock):
        fits = [m for m in MODES if m[1] >= width and m[2] >= height and max(m[3]) >= rate_hz]
        if not fits:
            known = ", ".join(f"{name} {w}x{h} to {max(rates)} Hz" for name, w, h, rates in MODES)
            raise CameraError(f"no ZED mode gives {width}x{height} at {rate_hz:g} Hz; it has {known}")
        self._mode = fits[0][0]
        self._fps = min(rate for rate in fits[0][3] if rate >= rate_hz)
        self._size = width, height
        self._period_s = 1.0 / rate_hz
        self._serial, self._clock = serial, clock
        self._zed = None

    def open(self) -> Intrinsics:
        try:
            import pyzed.sl as sl
        except ImportError as error:
            raise CameraError(f"{INSTALL} ({error})") from error
        if not hasattr(sl, "InitParameters"):
            raise CameraError(INSTALL)
        self.close()
        self._sl = sl
        if hasattr(sl, "set_timestamp_clock"):  # SDK 5.4 on: image stamps that the wall clock cannot move
            sl.set_timestamp_clock(sl.TIMESTAMP_CLOCK.MONOTONIC_CLOCK)
        # The constructor checks types: a timeout of 5 instead of 5.0 is refused.
        parameters = sl.InitParameters(
            camera_resolution=getattr(sl.RESOLUTION, self._mode),
            camera_fps=self._fps,
            depth_mode=sl.DEPTH_MODE.NONE,
            open_timeout_sec=5.0,
            async_grab_camera_recovery=True,
        )
        if self._serial is not None:
            parameters.set_from_serial_number(self._serial)
        zed = sl.Camera()
        status = zed.open(parameters)
        if status != sl.ERROR_CODE.SUCCESS:
            zed.close()
            raise CameraError(
                f"ZED {self._serial or ''} did not open: {status}; check its USB 3 cable and that no other "
                "program uses it (ZED_Explorer shows it, ZED_Diagnostic explains)"
            )
        self._zed, self._mat = zed, sl.Mat()
        self._runtime = sl.RuntimeParameters(enable_depth=False)
        self._dropped = zed.get_frame_dropped_count()
        self._age_s = self._period_s  # until a plausible one is measured
        configuration = zed.get_camera_information().camera_configuration
        lens = configuration.calibration_parameters.left_cam  # of the rectified picture: no distortion
        sx = self._size[0] / configuration.resolution.width
        sy = self._size[1] / configuration.resolution.height
        return Intrinsics(lens.fx * sx, lens.fy * sy, lens.cx * sx, lens.cy * sy)

    def grab(self, timeout_s: float) -> Frame | None:
        """`timeout_s` is the SDK's own here: it waits for about two frames."""
        sl, zed = self._sl, self._zed
        status = zed.grab(self._runtime)
        if status != sl.ERROR_CODE.SUCCESS:
            # Warnings (values below SUCCESS: rebooting, corrupted frame) pass; errors mean that it is gone.
            if status in _warnings(sl):
                return None
            raise CameraError(f"ZED lost: {status}; check its cable and power")
        if zed.retrieve_image(self._mat, sl.VIEW.LEFT) != sl.ERROR_CODE.SUCCESS:
            return None
        bgra = self._mat.get_data()  # the SDK's own memory, overwritten by the next picture
        stamp_s = self._to_executor_clock(
            zed.get_timestamp(sl.TIME_REFERENCE.IMAGE).get_nanoseconds(),
            zed.get_timestamp(sl.TIME_REFERENCE.CURRENT).get_nanoseconds(),
        )
        total = zed.get_frame_dropped_count()
        dropped, self._dropped = max(0, total - self._dropped), total
        rgb = cv2.cvtColor(bgra, cv2.COLOR_BGRA2RGB)
        if rgb.shape[1::-1] != self._size:
            rgb = cv2.resize(rgb, self._size, interpolation=cv2.INTER_AREA)
        return Frame(rgb, stamp_s, dropped)

    def close(self) -> None:
        if self._zed is not None:
            self._zed.close()
            self._zed = None

    def _to_executor_clock(self, image_ns: int, current_ns: int) -> float:
        """Capture time on the executor clock: now, less the picture's age on the SDK's clock.

        The SDK stamps a picture when it is complete in memory, two to three frame times after exposure. When
        the wall clock was set between the two readings the age is nonsense, and the last good one serves.
        """
        age_s = (current_ns - image_ns) * 1e-9
        if 0.0 <= age_s <= MAX_AGE_S:
            self._age_s = age_s
        return self._clock.now() - self._age_s


def _warnings(sl) -> list:
    """Codes after which the SDK goes on by itself. Older SDKs lack some."""
    names = ("CAMERA_REBOOTING", "CORRUPTED_FRAME", "POTENTIAL_CALIBRATION_ISSUE", "SENSORS_DATA_REQUIRED")
    return [getattr(sl.ERROR_CODE, name) for name in names if hasattr(sl.ERROR_CODE, name)]
