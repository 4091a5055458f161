"""One leader's samples -> filtered knots on an even grid of executor time. Pure.

Knot k belongs to time k / rate for every leader, so two arms share one grid whatever their phases, and a knot
never changes once it is there: chunks made of knots agree wherever they overlap.
"""

import math
from collections import deque

import numpy as np

from config.teleop import Filter, Teleop

CLOCK_S = 0.5  # a stamp this close to its arrival is on the executor clock
_AVERAGED = 10  # arrivals


class Stamps:
    """Stamps of a publisher on another clock -> executor time, by the mean delay of its last arrivals.

    That removes most of the transport's jitter and follows a clock of another rate (simulated time). A jump
    of either clock begins anew and so never moves a stamp by more than one message.
    """

    def __init__(self):
        self._delays: deque[float] = deque(maxlen=_AVERAGED)

    def map(self, stamp_s: float, arrival_s: float) -> float:
        """Executor time of a message stamped `stamp_s` (0: unstamped) that arrived at `arrival_s`."""
        delay = arrival_s - stamp_s
        if stamp_s == 0.0:
            return arrival_s
        if abs(delay) < CLOCK_S:
            self._delays.clear()
            return min(stamp_s, arrival_s)
        if self._delays and abs(delay - self._delays[-1]) > CLOCK_S:
            self._delays.clear()
        self._delays.append(delay)
        return stamp_s + sum(self._delays) / len(self._delays)


class OneEuro:
    """One Euro filter (Casiez, Roussel, Vogel 2012) of a vector sampled at uneven times.

    A first-order low-pass whose cut-off f rises with the speed: it lags 1 / (2 pi f) behind steady motion.
    """

    def __init__(self, config: Filter):
        self._config = config
        self.value: np.ndarray | None = None
        self._raw = self._speed = np.zeros(0)
        self._t = 0.0

    def reset(self) -> None:
        self.value = None

    def __call__(self, t: float, raw: np.ndarray) -> np.ndarray:
        """`raw` [n] sampled at `t` s, later than the last one -> filtered [n]."""
        config = self._config
        if self.value is None:
            self.value, self._speed = raw.copy(), np.zeros_like(raw)
        else:
            dt = t - self._t
            self._speed += _gain(config.speed_cutoff_hz, dt) * ((raw - self._raw) / dt - self._speed)
            cutoff = config.min_cutoff_hz + config.beta * np.abs(self._speed)
            self.value = self.value + _gain(cutoff, dt) * (raw - self.value)
        self._t, self._raw = t, raw
        return self.value


def _gain(cutoff_hz, dt: float):
    """Share of the step that a low-pass takes over in `dt` s."""
    return 1.0 / (1.0 + 1.0 / (2 * math.pi * cutoff_hz * dt))


class Samples:
    """One leader. `knots`: (k, [8]: seven joints in rad, opening or NaN without a trigger), newest last."""

    def __init__(self, config: Teleop):
        self._config = config
        self._filter = OneEuro(config.filter)
        self._raw: np.ndarray | None = None  # [7]
        self._row: np.ndarray | None = None  # [8] filtered
        self._changed_s = -math.inf  # first sample equal to the newest one
        self.newest_s = -math.inf
        self.knots: deque[tuple[int, np.ndarray]] = deque(maxlen=64)

    @property
    def joints(self) -> np.ndarray | None:
        """[7] rad, filtered, of the newest sample; None before the first."""
        return None if self._row is None else self._row[:7]

    @property
    def opening(self) -> float | None:
        """Of the newest sample; None without a trigger."""
        return None if self._row is None or math.isnan(self._row[7]) else float(self._row[7])

    @property
    def unchanged_s(self) -> float:
        """How long the joints have been the same to the bit. Publishers repeat what they read last from a
        leader without power or cable.
        """
        return self.newest_s - self._changed_s if self._raw is not None else 0.0

    def add(self, t: float, joints, opening: float | None) -> str:
        """A sample taken at `t` s: `joints` [7] rad, `opening` (0 closed, 1 open; clipped) or None.

        Returns what is wrong with it, or "". Samples that are not newer than the last are ignored.
        """
        raw = np.array(joints, float)
        if raw.shape != (7,):
            return f"{raw.size} joint positions, need 7"
        if not (math.isfinite(t) and np.isfinite(raw).all() and math.isfinite(opening or 0.0)):
            return "the leader's positions are not finite"
        if t <= self.newest_s:
            return ""
        before, since, problem = self._row, self.newest_s, ""
        if self._raw is not None and t - since <= self._config.lost_after_s:
            step = np.abs(raw - self._raw)
            j, limit, after = int(step.argmax()), self._config.jump_rad, ""
            if self.unchanged_s > self._config.frozen_after_s:
                limit = min(limit, self._config.frozen_jump_rad)
                after = f" after {self.unchanged_s:.1f} s without a change: has it power?"
            if step[j] > limit:
                problem = f"joint {j + 1} jumped by {step[j]:.2f} rad, limit {limit:g}{after}"
        else:
            before = None
        if problem:
            before = None
        if before is None:
            self._filter.reset()
            self.knots.clear()
        trigger = math.nan if opening is None else min(max(opening, 0.0), 1.0)
        if self._raw is None or not np.array_equal(raw, self._raw):
            self._changed_s = t
        self._raw, self.newest_s = raw, t
        self._row = np.append(self._filter(t, raw), trigger)
        if before is not None:
            self._resample(since, before, t, self._row)
        return problem

    def _resample(self, t0: float, a: np.ndarray, t1: float, b: np.ndarray) -> None:
        """Knots in (t0, t1]: linear, so that they depend on these two samples alone."""
        rate = self._config.rate_hz
        for k in range(math.floor(t0 * rate) + 1, math.floor(t1 * rate) + 1):
            share = (k / rate - t0) / (t1 - t0)
            self.knots.append((k, a + share * (b - a)))

    def at(self, k: int) -> np.ndarray | None:
        """Knot `k` [8], None when there is none."""
        return next((row for number, row in reversed(self.knots) if number == k), None)
