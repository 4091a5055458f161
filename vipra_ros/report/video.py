"""Front camera pictures -> an H.264 file that browsers play, and stills."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_TIME_BASE = Fraction(1, 90_000)


class Video:
    """Writes pictures at the times they were taken. Not thread-safe. Close it: the file needs its index."""

    def __init__(self, path: Path, rate_hz: float = 30.0):
        self._file = av.open(str(path), "w", options={"movflags": "+faststart"})
        self._rate_hz = rate_hz
        self._stream = None
        self._first_s = self._newest_s = 0.0
        self._last: np.ndarray | None = None
        self.frames = 0
        self.stills: list[np.ndarray] = []  # [h, w, 3] RGB: the first picture, then one every `still_every_s`
        self.still_every_s = 5.0
        self._next_still_s = 0.0

    @property
    def duration_s(self) -> float:
        return self._newest_s - self._first_s

    def add(self, rgb: np.ndarray, stamp_s: float) -> None:
        """`rgb` uint8 [h, w, 3] taken at `stamp_s`; one that is not newer than the last is left out."""
        if self._stream is None:
            height, width = rgb.shape[0] & ~1, rgb.shape[1] & ~1  # 4:2:0 needs even sides
            self._stream = self._file.add_stream("libx264", rate=round(self._rate_hz))
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            self._stream.codec_context.time_base = _TIME_BASE
            self._stream.options = {"preset": "veryfast", "crf": "23", "threads": "1"}
            self._first_s = self._next_still_s = stamp_s
        elif stamp_s <= self._newest_s:
            return
        self._newest_s = stamp_s
        if stamp_s >= self._next_still_s:
            self.stills.append(rgb.copy())
            self._next_still_s = stamp_s + self.still_every_s
        frame = av.VideoFrame.from_ndarray(
            np.ascontiguousarray(rgb[: self._stream.height, : self._stream.width]), format="rgb24"
        )
        frame.pts, frame.time_base = round((stamp_s - self._first_s) / _TIME_BASE), _TIME_BASE
        for packet in self._stream.encode(frame):
            self._file.mux(packet)
        self.frames += 1

    def close(self) -> None:
        """Finish the file."""
        if self._stream is not None:
            for packet in self._stream.encode():
                self._file.mux(packet)
        self._file.close()


def jpeg(rgb: np.ndarray, quality: int = 88) -> bytes:
    """`rgb` uint8 [h, w, 3] as a JPEG file."""
    import cv2

    done, data = cv2.imencode(".jpg", rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"cannot encode a picture of shape {rgb.shape}")
    return data.tobytes()
