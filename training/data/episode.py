"""The one interface over every dataset: a reader is a sequence of episodes, an episode gives its frames."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import cv2
import numpy as np


class DataError(ValueError):
    """An episode or dataset cannot be used; the message names the file, what is wrong, and the fix."""


@dataclass(frozen=True)
class Episode:
    """One recording: T moments, each seen by every view at once. Frames are decoded when asked for."""

    key: str  # unique in its dataset and stable
    timestamps: np.ndarray  # float64 [T], s, ascending
    views: tuple[str, ...]
    instruction: str  # as recorded, in any language; empty if there is none
    decode: Callable[[str, np.ndarray], np.ndarray] = field(repr=False)
    actions: np.ndarray | None = None  # float32 [T, D], the command recorded together with each frame
    state: np.ndarray | None = None  # float32 [T, D]

    @property
    def length(self) -> int:
        return len(self.timestamps)

    @property
    def rate_hz(self) -> float:
        """Frames per second, from the timestamps; 0 for a single frame."""
        steps = np.diff(self.timestamps)
        return float(1 / np.median(steps)) if len(steps) and np.median(steps) > 0 else 0.0

    def frames(self, view: str, indices: Sequence[int]) -> np.ndarray:
        """Frames of `view` at `indices`, uint8 RGB [n, h, w, 3]. Raises DataError."""
        if view not in self.views:
            raise DataError(f"{self.key}: no view {view!r}; it has {', '.join(self.views) or 'none'}")
        at = np.asarray(indices, int)
        if len(at) and (at.min() < 0 or at.max() >= self.length):
            raise DataError(f"{self.key}: frames {at.min()} to {at.max()} asked for, it has {self.length}")
        return self.decode(view, at)


class Reader(Protocol):
    """A dataset on disk. Cheap to pickle: a loader's worker processes each hold one."""

    views: tuple[str, ...]  # of the dataset; an episode may lack some
    action_names: tuple[str, ...] | None
    broken: list[tuple[str, str]]  # (file, what is wrong) found while opening

    def __len__(self) -> int:
        """Episodes."""

    def key(self, index: int) -> str:
        """Episode.key without reading the episode."""

    def episode(self, index: int) -> Episode:
        """Raises DataError."""

    def length(self, index: int) -> int:
        """Frames, without decoding them. Raises DataError."""

    def fingerprint(self) -> str:
        """Changes when the files do."""


def decode_picture(data: bytes, name: str) -> np.ndarray:
    """[h, w, 3] uint8 RGB of a JPEG or PNG. Raises DataError that names `name`."""
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if bgr is None:
        raise DataError(f"{name}: not a readable picture ({len(data)} bytes)")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def finite(values: np.ndarray | None, key: str, what: str) -> np.ndarray | None:
    """`values` as float32 [T, D]. Raises DataError for another shape, NaN and infinity."""
    if values is None:
        return None
    if values.ndim != 2 or values.dtype.kind not in "fiub":
        raise DataError(
            f"{key}: {what} is {values.dtype} {list(values.shape)}, needs numbers [frames, dimensions]"
        )
    values = np.ascontiguousarray(values, np.float32)
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        raise DataError(f"{key}: {what} of frame {int(bad.argmax())} is not finite ({int(bad.sum())} frames)")
    return values


def uniform_times(count: int, rate_hz: float) -> np.ndarray:
    return np.arange(count) / rate_hz
