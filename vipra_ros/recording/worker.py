"""The thread that owns the dataset: encodes frames, judges episodes, saves or drops them.

Encoding and disks may be slow; nothing that receives messages ever waits for them.
"""

import threading
from collections import deque
from pathlib import Path

import numpy as np

from config.recording import Quality
from episodes import demonstration, layout, quality
from episodes.quality import Finding, Trace
from episodes.video import VideoError
from episodes.writer import Writer, saved_episodes
from vipra_ros.recording.synchronizer import Frame


def open_writer(
    root: Path, names: tuple[str, ...], robot: str, fps: int, size: tuple[int, int], crf: int
) -> Writer:
    """Continue the dataset at `root`, or start it where there is no episode yet.

    size: (height, width) px; robot: the embodiment's name.

    Raises EpisodesError where it is another robot's, of another rate or picture size, or in use.
    """
    wanted = demonstration.features(names, *size)
    if saved_episodes(root):
        demonstration.check_same(root, layout.read_info(root), fps, robot, wanted)
        return Writer(root, crf)
    return Writer.create(root, fps, wanted, robot, crf=crf)


class Worker:
    """Takes frames and orders in their sequence. `close` at the end; an episode not saved is dropped."""

    def __init__(self, writer: Writer, limits: Quality, capacity: int):
        self._writer, self._limits, self._capacity = writer, limits, capacity
        self._names = tuple(writer.info["features"][demonstration.ACTION]["names"])
        self._orders: deque[tuple] = deque()
        self._ready = threading.Condition()
        self._working = False
        self._rows: list[tuple[float, float, np.ndarray, np.ndarray, float]] = []
        self._picture: np.ndarray | None = None
        self.error = ""  # of the last order that failed
        self.broken = False  # frames could not be written: the episode cannot be saved
        self._dropping = False  # what fails from now on belongs to an episode that is discarded
        self.episodes = writer.episodes
        self._carry_out = {
            "frame": self._write,
            "finish": writer.finish,
            "save": self._save,
            "discard": self._drop,
            "close": writer.close,
        }
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Orders not yet carried out."""
        return len(self._orders) + self._working

    def put(self, frame: Frame, task: str) -> bool:
        """Hand over a frame; False if the queue is full and the frame is lost."""
        if len(self._orders) >= self._capacity:
            return False
        self._order("frame", frame, task)
        return True

    def finish(self) -> None:
        """No more frames: complete the videos while there is room on the disk."""
        self._order("finish")

    def save(self) -> None:
        """Make what was put an episode. Once nothing waits, `error` tells whether it worked."""
        self._order("save")

    def discard(self) -> None:
        with self._ready:
            self.error, self.broken, self._dropping = "", False, True
        self._order("discard")

    def trace(self) -> Trace:
        """Of the frames written so far."""
        rows = list(self._rows)
        dims = len(self._names)
        capture, sync, state, action, change = zip(*rows, strict=True) if rows else ((),) * 5
        return Trace(
            self._writer.info["fps"],
            self._names,
            np.array(capture, float),
            np.array(sync, float),
            np.array(state, float).reshape(-1, dims),
            np.array(action, float).reshape(-1, dims),
            np.array(change, float),
        )

    def findings(self) -> list[Finding]:
        """What is wrong with the frames written so far."""
        return quality.inspect(self.trace(), self._limits)

    def close(self, timeout_s: float = 20.0) -> None:
        """Carry out what waits, drop an unsaved episode, let another recorder in."""
        self._order("close")
        self._thread.join(timeout_s)

    def _order(self, *order) -> None:
        with self._ready:
            self._orders.append(order)
            self._ready.notify()

    def _run(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._orders)
                self._working = True
                order, *given = self._orders.popleft()
            try:
                self._carry_out[order](*given)
            except Exception as error:  # whatever it is: the operator must read it, and the thread live on
                text = " ".join(str(error).split()) or type(error).__name__
                with self._ready:
                    if not self._dropping:
                        self.error = f"{self._writer.root}: {text}" if isinstance(error, OSError) else text
                        self.broken |= order == "frame" or isinstance(error, VideoError)
            finally:
                self._working = False
            if order == "close":
                return

    def _write(self, frame: Frame, task: str) -> None:
        if self.broken:
            return
        row = {
            demonstration.CAMERA: frame.rgb,
            demonstration.STATE: frame.state,
            demonstration.ACTION: frame.action,
            demonstration.CAPTURE: [frame.capture_s],
            demonstration.SYNC: [frame.sync_error_s],
        }
        self._writer.add(row, task)
        change = 0.0 if self._picture is None else quality.change(self._picture, frame.rgb)
        self._picture = frame.rgb
        self._rows.append((frame.capture_s, frame.sync_error_s, frame.state, frame.action, change))

    def _save(self) -> None:
        if self.broken:
            raise OSError(f"frames of this episode could not be written ({self.error}); discard it")
        self._writer.save()
        self.error, self.episodes = "", self._writer.episodes
        self._forget()

    def _drop(self) -> None:
        self._dropping = False
        self._writer.discard()
        self._forget()

    def _forget(self) -> None:
        self._rows, self._picture = [], None
