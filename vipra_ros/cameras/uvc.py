"""Any USB camera that the kernel shows as /dev/videoN, by OpenCV."""

import time

import cv2

from vipra_ros.cameras.source import CameraError, Clock, Frame

MAX_AGE_S = 0.5


class UvcSource:
    """A Video4Linux camera, scaled to the published size."""

    noisy = True

    def __init__(self, device: int, width: int, height: int, rate_hz: float, clock: Clock):
        self._device, self._size, self._rate_hz, self._clock = device, (width, height), rate_hz, clock
        self._capture: cv2.VideoCapture | None = None

    def open(self) -> None:
        self.close()
        capture = cv2.VideoCapture(self._device, cv2.CAP_V4L2)
        if not capture.isOpened():
            raise CameraError(
                f"/dev/video{self._device} did not open: check that it exists (`ls /dev/video*`), that you "
                "are in group `video`, and that no other program uses it"
            )
        # Compressed on the wire: raw 640x480 at 30 Hz fills USB 2.
        capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter_fourcc(*"MJPG"))
        capture.set(cv2.CAP_PROP_FRAME_WIDTH, self._size[0])
        capture.set(cv2.CAP_PROP_FRAME_HEIGHT, self._size[1])
        capture.set(cv2.CAP_PROP_FPS, self._rate_hz)
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        self._capture = capture

    def grab(self, timeout_s: float) -> Frame | None:
        """`timeout_s` is the driver's own here (10 s in OpenCV): no picture by then is a lost camera."""
        ok, bgr = self._capture.read()
        if not ok:
            raise CameraError(f"/dev/video{self._device} delivers no pictures: check its cable")
        stamp_s = self._clock.now() - self._age_s()
        rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        if rgb.shape[1::-1] != self._size:
            rgb = cv2.resize(rgb, self._size, interpolation=cv2.INTER_AREA)
        return Frame(rgb, stamp_s, 0)

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def _age_s(self) -> float:
        """Time since capture: Video4Linux stamps buffers on CLOCK_MONOTONIC. 0 where the driver does not."""
        age_s = time.monotonic() - self._capture.get(cv2.CAP_PROP_POS_MSEC) * 1e-3
        return age_s if 0.0 <= age_s <= MAX_AGE_S else 0.0
