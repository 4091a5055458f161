"""Recorded camera footage, played at its own timestamps: any video that FFmpeg reads."""

from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np

from vipra_ros.cameras.source import CameraError, Clock, EndOfSource, Frame, wait_until

REANCHOR_S = 1.0  # later than this (a stopped process, a slow disk) the rest of the film shifts


class FileSource:
    """A video file squashed to the published size; the policy squashes pictures anyway.

    Frames whose time has passed are skipped and counted as dropped. Footage in which nothing at all changes
    counts as a frozen camera, as it would live.
    """

    noisy = True

    def __init__(self, path: str, width: int, height: int, loop: bool, clock: Clock):
        self._path, self._size, self._loop, self._clock = path, (width, height), loop, clock
        self._frames: Iterator[tuple[av.VideoFrame, float]] | None = None
        self._waiting: tuple[np.ndarray, float] | None = None  # decoded, not yet due

    def open(self) -> None:
        self.close()
        if not Path(self._path).is_file():
            raise CameraError(f"camera.path {self._path}: no such file")
        self._frames = self._play()
        try:
            first = next(self._frames)
        except (av.FFmpegError, IndexError, StopIteration) as error:
            self.close()
            raise CameraError(
                f"camera.path {self._path}: no video that FFmpeg can decode ({error})"
            ) from error
        self._start_s = self._clock.now() - first[1]
        self._waiting = (self._picture(first[0]), self._start_s + first[1])

    def grab(self, timeout_s: float) -> Frame | None:
        dropped = 0
        while True:
            if self._waiting is None:
                self._waiting = self._decode()
            rgb, due_s = self._waiting
            if not wait_until(self._clock, due_s, timeout_s):
                return None
            self._waiting = None
            late_s = self._clock.now() - due_s
            if late_s > REANCHOR_S:
                self._start_s += late_s
                return Frame(rgb, due_s + late_s, dropped)
            if late_s < self._period_s:
                return Frame(rgb, due_s, dropped)
            dropped += 1

    def close(self) -> None:
        if self._frames is not None:
            self._frames.close()
        self._frames = self._waiting = None

    def _decode(self) -> tuple[np.ndarray, float]:
        try:
            frame, seconds = next(self._frames)
        except StopIteration:
            raise EndOfSource(f"{self._path} has ended and camera.loop is false") from None
        except av.FFmpegError as error:
            raise CameraError(f"{self._path}: damaged video ({error})") from error
        return self._picture(frame), self._start_s + seconds

    def _picture(self, frame: av.VideoFrame) -> np.ndarray:
        rgb = frame.to_ndarray(format="rgb24")
        if frame.rotation % 360:  # phones store the turn beside the pixels
            rgb = np.rot90(rgb, k=frame.rotation // 90)
        return cv2.resize(rgb, self._size, interpolation=cv2.INTER_AREA)

    def _play(self) -> Iterator[tuple[av.VideoFrame, float]]:
        """Decoded frames with their time since the film's first start, s, ever increasing."""
        offset_s = 0.0
        while True:
            with av.open(self._path) as container:
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # small pictures; the arms need the other cores
                self._period_s = 1.0 / float(stream.average_rate or stream.base_rate or 30)
                first = last = None
                for frame in container.decode(stream):
                    if frame.pts is None:
                        continue
                    first = frame.time if first is None else first
                    last = offset_s + frame.time - first
                    yield frame, last
            if last is None or not self._loop:
                return
            offset_s = last + self._period_s
