"""The pictures of the last moments, and which two of them a policy is shown."""

from collections import deque

import numpy as np

TOLERANCE = 0.4  # of history_seconds, by which the distance of o_{t-1} and o_t may be off


class FrameHistory:
    """Pictures of the last moments: finds o_t, and o_{t-1} that lies `history_s` before it by stamp."""

    def __init__(self, history_s: float):
        self._history_s = history_s
        self._frames: deque[tuple[float, np.ndarray]] = deque()

    @property
    def newest_s(self) -> float | None:
        """Capture stamp of o_t; None before the first picture."""
        return self._frames[-1][0] if self._frames else None

    def add(self, rgb: np.ndarray, stamp_s: float) -> None:
        """Remember uint8 [h, w, 3]; one not newer than the newest is dropped."""
        if self._frames and stamp_s <= self._frames[-1][0]:
            return
        self._frames.append((stamp_s, rgb))
        while len(self._frames) > 2 and self._frames[1][0] <= stamp_s - 1.5 * self._history_s:
            self._frames.popleft()

    def pair(self) -> tuple[np.ndarray, np.ndarray, float] | None:
        """o_{t-1}, o_t and the stamp of o_t.

        None while no picture lies within TOLERANCE of `history_s` before the newest: training saw that
        distance, and another one shows another speed.
        """
        if not self._frames:
            return None
        newest_s, newest = self._frames[-1]
        stamp_s, rgb = min(self._frames, key=lambda frame: abs(newest_s - self._history_s - frame[0]))
        if abs(newest_s - self._history_s - stamp_s) > TOLERANCE * self._history_s:
            return None
        return rgb, newest, newest_s
