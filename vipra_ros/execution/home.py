"""The way home, as a chunk like any other: the same reference, limits, dead-man and stop."""

import numpy as np

from vipra_ros.execution.chunk import Chunk

_RATE_HZ = 10.0
_VELOCITY = 0.4  # rad/s, peak
_MAX_S = 25.0


def home_chunk(start: np.ndarray, home: np.ndarray, now: float) -> Chunk:
    """Minimum-jerk path (Flash, Hogan 1985) from `start` to `home` [J] rad, begun at `now`, executor time."""
    distance = float(np.abs(home - start).max())
    duration = min(max(1.875 * distance / _VELOCITY, 1.0), _MAX_S)
    s = np.linspace(0.0, 1.0, max(int(duration * _RATE_HZ), 2) + 1)[:, None]
    s = s**3 * (10 - 15 * s + 6 * s**2)
    path = start + s * (home - start)
    return Chunk(0, now + 1.0 / _RATE_HZ, _RATE_HZ, path, np.zeros((len(path), 0)))
