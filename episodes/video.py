"""Frames in and out of video files, by time. RGB, uint8, [h, w, 3]."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

KEYFRAME_INTERVAL = 2  # lerobot's: random access costs two decodes at most
CRF = 30  # quality, lerobot's; lower is better
_SEEK_AHEAD_S = 0.5  # a wanted frame further ahead than this is sought, a nearer one decoded up to


class VideoError(ValueError):
    """A video cannot be read or written; the message names the file."""


class Encoder:
    """Writes one H.264 file frame by frame. No B-frames: a frame's place in the file is its time."""

    def __init__(self, path: Path, fps: int, height: int, width: int, crf: int = CRF):
        if height % 2 or width % 2:
            raise VideoError(f"{width}x{height} px cannot be H.264 yuv420p: make both even, or record images")
        self.closed, self._problem = False, ""
        self._file = av.open(str(path), "w", format="mp4")
        options = {"g": str(KEYFRAME_INTERVAL), "crf": str(crf), "bf": "0"}
        self._stream = self._file.add_stream("libx264", rate=fps, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"

    def add(self, rgb: np.ndarray) -> None:
        self._file.mux(self._stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))

    def close(self) -> None:
        """Complete the file. A second call does nothing, but raises VideoError as the first one did."""
        if not self.closed:
            self.closed = True
            try:
                self._file.mux(self._stream.encode(None))
                self._file.close()
            except (av.FFmpegError, OSError) as error:
                self._problem = str(error)
        if self._problem:
            raise VideoError(f"the episode's video could not be completed: {self._problem}")


def concatenate(parts: Sequence[Path], target: Path, fps: int) -> None:
    """Join files of equal `Encoder` settings into `target` without decoding; frame k lies at k / fps."""
    with av.open(str(target), "w", format="mp4") as out:
        stream, frames = None, 0
        for part in parts:
            with av.open(str(part)) as source:
                video = source.streams.video[0]
                stream = stream or out.add_stream_from_template(video)
                start = round(frames / fps / video.time_base)
                for packet in source.demux(video):
                    if packet.dts is None:  # the flushing packet
                        continue
                    packet.pts += start
                    packet.dts += start
                    packet.stream = stream
                    out.mux(packet)
                    frames += 1


def cut(source: Path, target: Path, start_s: float, frames: int, fps: int) -> None:
    """Copy `frames` frames from `start_s` on to a file of their own, without decoding.

    Raises VideoError where they are not there or do not begin with a key frame.
    """
    try:
        with av.open(str(source)) as file, av.open(str(target), "w", format="mp4") as out:
            video = file.streams.video[0]
            stream = out.add_stream_from_template(video)
            base, half = float(video.time_base), 0.5 / fps
            file.seek(int((start_s + half) / base), stream=video)
            copied, first = 0, round(start_s / base)
            for packet in file.demux(video):
                if packet.pts is None or packet.dts is None:
                    continue
                time = packet.pts * base
                if not start_s - half < time < start_s + (frames - 0.5) / fps:
                    continue
                if not copied and not packet.is_keyframe:
                    raise VideoError(f"{source}: no key frame at {start_s:.3f} s: it cannot be cut there")
                packet.pts -= first
                packet.dts -= first
                packet.stream = stream
                out.mux(packet)
                copied += 1
                if copied == frames:
                    break
    except (av.FFmpegError, OSError, IndexError) as error:
        raise VideoError(f"{source}: not a readable video: {error}") from error
    if copied != frames:
        raise VideoError(f"{source}: has {copied} of {frames} frames from {start_s:.3f} s on")


def joinable(one: Path, other: Path) -> bool:
    """Whether two files were encoded alike, so that `concatenate` may join them; not if `one` is broken.

    Raises VideoError where `other` is.
    """
    head = _head(other)
    try:
        return _head(one) == head
    except VideoError:
        return False


def _head(path: Path) -> tuple[str, bytes]:
    try:
        with av.open(str(path)) as file:
            context = file.streams.video[0].codec_context
            return context.name, bytes(context.extradata or b"")
    except (av.FFmpegError, OSError, IndexError) as error:
        raise VideoError(f"{path}: not a readable video: {error}") from error


def frame_times(path: Path) -> np.ndarray:
    """Presentation time in s of every frame, ascending, read from the packets without decoding.

    Raises VideoError.
    """
    try:
        with av.open(str(path)) as file:
            video = file.streams.video[0]
            stamps = [p.pts for p in file.demux(video) if p.pts is not None and p.size]
            return np.sort(np.array(stamps, float)) * float(video.time_base)
    except (av.FFmpegError, OSError, IndexError) as error:
        raise VideoError(f"{path}: not a readable video: {error}") from error


def read_frames(path: Path, times: Sequence[float], tolerance_s: float) -> np.ndarray:
    """The frames [n, h, w, 3] at `times` (s, any order, repeats allowed).

    Raises VideoError where no frame lies within `tolerance_s` of a wanted time.
    """
    wanted = np.asarray(times, float)
    found: dict[float, np.ndarray] = {}
    try:
        with av.open(str(path)) as file:
            video = file.streams.video[0]
            base = float(video.time_base)
            frames, last = file.decode(video), None
            for time in np.unique(wanted):
                if last is None or time > last.time + _SEEK_AHEAD_S:
                    file.seek(max(int((time - tolerance_s) / base), 0), stream=video)
                    frames, last = file.decode(video), None
                while last is None or last.time < time - tolerance_s:
                    last = next(frames, None)
                    if last is None:
                        raise VideoError(f"{path}: ends before {time:.3f} s")
                if abs(last.time - time) > tolerance_s:
                    raise VideoError(f"{path}: no frame at {time:.3f} s, the nearest is at {last.time:.3f} s")
                found[time] = last.to_ndarray(format="rgb24")
    except (av.FFmpegError, OSError, IndexError) as error:
        raise VideoError(f"{path}: not a readable video: {error}") from error
    return np.stack([found[time] for time in wanted])
