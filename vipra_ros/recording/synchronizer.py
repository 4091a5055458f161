"""Pictures, joint states and references as they come in, to frames that each belong to one moment.

The moment of a frame is the capture of its picture. Measured joints and the executed reference are
interpolated to it between their two neighbours; a hand's command is held, since it jumps.
All times are executor time.
"""

import bisect
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

KEPT_S = 2.0  # of each stream
PATIENCE_S = 0.3  # that a picture or a sample may take from its stamp to us
JUMP_BACK_S = 1.0  # stamps this much older than the newest ones mean a clock that began anew


@dataclass(frozen=True)
class Frame:
    """One row of an episode."""

    time_s: float  # the moment it belongs to
    capture_s: float  # of its picture; older than `time_s` where no new one came
    rgb: np.ndarray  # uint8 [h, w, 3]
    state: np.ndarray  # [D] measured, rad and opening
    action: np.ndarray  # [D] commanded, rad and opening
    sync_error_s: float  # largest distance of picture, state and action samples from the moment
    repeated: bool  # no new picture since the frame before: one was lost


class Track:
    """Stamped vectors of one stream, newest last."""

    def __init__(self, held: np.ndarray | None = None):
        """held: bool [n], entries that keep their value until the next sample, not interpolated."""
        self._held = held
        self._stamps: deque[float] = deque()
        self._values: deque[np.ndarray] = deque()

    @property
    def newest_s(self) -> float:
        return self._stamps[-1] if self._stamps else -np.inf

    def add(self, stamp_s: float, values: np.ndarray) -> None:
        """A sample that is not newer than the last one is dropped."""
        if stamp_s <= self.newest_s:
            return
        self._stamps.append(stamp_s)
        self._values.append(np.asarray(values, float))
        while self._stamps[0] < stamp_s - KEPT_S:
            self._stamps.popleft()
            self._values.popleft()

    def at(self, t: float) -> tuple[np.ndarray, float]:
        """Value at `t` and the distance to the nearest sample, s. Outside the samples: the first or last one.

        Raises IndexError before the first sample.
        """
        i = bisect.bisect_right(self._stamps, t)  # the first sample after t
        if i == 0:
            return self._values[0], self._stamps[0] - t
        before, value = self._stamps[i - 1], self._values[i - 1]
        if i == len(self._stamps):
            return value, t - before
        after = self._stamps[i]
        between = value + (t - before) / (after - before) * (self._values[i] - value)
        if self._held is not None:
            between = np.where(self._held, value, between)
        return between, min(t - before, after - t)

    def clear(self) -> None:
        self._stamps.clear()
        self._values.clear()


class Synchronizer:
    """Feed it from the topics; `begin` an episode, then `take` its frames as they are complete.

    Tick k is due half a camera period and k / rate_hz after the first picture, so that small jitter never
    changes which picture is the newest one before it.
    """

    def __init__(self, rate_hz: float, camera_rate_hz: float, hands: Mapping[str, bool]):
        """hands: arm -> whether it has one (an 8th entry), in the order of the action vector."""
        self.period_s = 1.0 / rate_hz
        self._phase_s = 0.5 / camera_rate_hz
        self._arms = tuple(hands)
        self._states = {arm: Track() for arm in hands}
        self._actions = {arm: Track(np.arange(7 + hand) == 7) for arm, hand in hands.items()}
        self._pictures: deque[tuple[float, np.ndarray]] = deque()
        self._waiting = False  # for the first picture
        self._start_s: float | None = None  # of tick 0
        self._tick = 0
        self._last_capture_s = -np.inf
        self.jumped = False  # a clock began anew: what was recorded so far does not fit what comes

    # --- streams in

    def add_picture(self, rgb: np.ndarray, stamp_s: float) -> None:
        """uint8 [h, w, 3], kept as it is; dropped unless it is newer than the last one."""
        if self._pictures and stamp_s <= self._pictures[-1][0]:
            self._check_jump(stamp_s, self._pictures[-1][0])
            return
        self._pictures.append((stamp_s, rgb))
        if self._waiting:
            self._waiting = False
            self._start_s, self._tick = stamp_s + self._phase_s, 0
        self._trim()

    def add_state(self, arm: str, stamp_s: float, values: np.ndarray) -> None:
        """Measured [7] rad, then the hand's opening if there is one."""
        self._check_jump(stamp_s, self._states[arm].newest_s)
        self._states[arm].add(stamp_s, values)

    def add_action(self, arm: str, stamp_s: float, values: np.ndarray) -> None:
        """The executed reference, as `add_state`."""
        self._check_jump(stamp_s, self._actions[arm].newest_s)
        self._actions[arm].add(stamp_s, values)

    def newest_s(self) -> dict[str, float]:
        """Stream -> stamp of its newest sample; -inf before the first."""
        newest = {"front camera": self._pictures[-1][0] if self._pictures else -np.inf}
        for arm in self._arms:
            newest[f"/{arm}/joint_states"] = self._states[arm].newest_s
            newest[f"/{arm}/joint_reference"] = self._actions[arm].newest_s
        return newest

    # --- frames out

    def begin(self) -> None:
        """From the next picture on; at the start of an episode and after a pause."""
        self._waiting, self._start_s, self.jumped = True, None, False
        self._last_capture_s = -np.inf

    def end(self) -> None:
        """No more frames."""
        self._waiting, self._start_s = False, None

    def take(self, now_s: float) -> list[Frame]:
        """The frames that are complete by now, in order; each is given once."""
        frames = []
        while self._start_s is not None:
            due = self._start_s + self._tick * self.period_s
            if not self._pictures or (self._pictures[-1][0] <= due and now_s < due + PATIENCE_S):
                break
            capture_s, rgb = self._picture(due)
            repeated = capture_s <= self._last_capture_s
            moment = due - self._phase_s if repeated else capture_s
            tracks = [*self._states.values(), *self._actions.values()]
            if min(t.newest_s for t in tracks) < moment and now_s < moment + PATIENCE_S:
                break
            if min(t.newest_s for t in tracks) == -np.inf:
                break  # nothing to say yet; `newest_s` tells who is silent
            state, state_error = _join(self._states.values(), moment)
            action, action_error = _join(self._actions.values(), moment)
            error = max(moment - capture_s, state_error, action_error)
            frames.append(Frame(moment, capture_s, rgb, state, action, error, repeated))
            self._last_capture_s = capture_s
            self._tick += 1
            self._trim()
        return frames

    def _picture(self, due: float) -> tuple[float, np.ndarray]:
        """The newest picture at or before `due`; the oldest one if all are newer."""
        older = [p for p in self._pictures if p[0] <= due]
        return older[-1] if older else self._pictures[0]

    def _trim(self) -> None:
        """Drop pictures that no tick to come can use."""
        due = np.inf if self._start_s is None else self._start_s + self._tick * self.period_s
        due = max(due, self._pictures[-1][0] - KEPT_S) if self._pictures else due
        while len(self._pictures) > 1 and self._pictures[1][0] <= due:
            self._pictures.popleft()

    def _check_jump(self, stamp_s: float, newest_s: float) -> None:
        if stamp_s < newest_s - JUMP_BACK_S:
            self.jumped = True
            self.end()
            self._pictures.clear()
            for track in (*self._states.values(), *self._actions.values()):
                track.clear()


def _join(tracks, t: float) -> tuple[np.ndarray, float]:
    parts = [track.at(t) for track in tracks]
    return np.concatenate([values for values, _ in parts]), max(distance for _, distance in parts)
