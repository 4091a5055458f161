"""Synthetic camera and arm: what they show and do is a known function of time."""

import numpy as np

from vipra_ros.recording.synchronizer import Synchronizer

SIZE = (48, 64)  # height, width
HANDS = {"right": True}
NAMES = (*(f"right_fr3_joint{i}" for i in range(1, 8)), "right_fr3_gripper")
CAMERA_HZ, JOINT_HZ = 30.0, 100.0


def measured(t: float) -> np.ndarray:
    return np.array([*(0.4 * np.sin(2 * t + j) for j in range(7)), 0.5 + 0.5 * np.cos(t)])


def commanded(t: float) -> np.ndarray:
    """0.05 s ahead of the measured joints; the hand jumps every second."""
    return np.array([*(0.4 * np.sin(2 * (t + 0.05) + j) for j in range(7)), float(int(t) % 2)])


def picture(t: float) -> np.ndarray:
    """Shows the measured first joint as a white bar's place, and its capture time in millis as 20 squares."""
    height, width = SIZE
    rgb = np.full((height, width, 3), 40, np.uint8)
    column = int((measured(t)[0] + 0.5) * (width - 4))
    rgb[16:, column : column + 4] = 220
    for bit in range(20):
        if round(1000 * t) >> bit & 1:
            row, place = divmod(bit, 10)
            rgb[8 * row : 8 * row + 6, 6 * place : 6 * place + 6] = 255
    return rgb


def capture_of(rgb: np.ndarray) -> float:
    """The time that `picture` drew, to a millisecond."""
    bits = 0
    for bit in range(20):
        row, place = divmod(bit, 10)
        bits |= int(rgb[8 * row + 1 : 8 * row + 5, 6 * place + 1 : 6 * place + 5].mean() > 128) << bit
    return bits / 1000


class Streams:
    """Feeds a synchroniser event by event, in the order of arrival."""

    def __init__(
        self, synchronizer: Synchronizer, seed: int = 0, jitter_s: float = 0.0, begin: float = 100.0
    ):
        self._out, self._rng = synchronizer, np.random.default_rng(seed)
        self._jitter_s, self.now = jitter_s, begin
        self._number = {"camera": 0, "state": 0, "action": 0}
        self._begin = begin
        self.lose = lambda t: False  # pictures captured at t that never come
        self.freeze = lambda t: t  # capture time whose picture is shown at t
        self.mute = lambda t: False  # joint samples that never come

    def run(self, seconds: float, poll=lambda now: None) -> None:
        """Go on for `seconds`; `poll(now)` after every event. Latency: camera 40 ms, joints 2 to 8 ms."""
        end, events = self.now + seconds, []
        for kind, rate, latency in (
            ("camera", CAMERA_HZ, 0.04),
            ("state", JOINT_HZ, 0.005),
            ("action", JOINT_HZ, 0.002),
        ):
            while (due := self._begin + self._number[kind] / rate) < end:
                self._number[kind] += 1
                stamp = round(due + self._jitter_s * self._rng.uniform(-1, 1), 6)
                events.append((stamp + latency + abs(self._rng.normal(0, 0.1 * latency)), kind, stamp))
        for arrival, kind, stamp in sorted(events):
            self.now = arrival
            if kind == "camera" and not self.lose(stamp):
                self._out.add_picture(picture(self.freeze(stamp)), stamp)
            elif kind == "state" and not self.mute(stamp):
                self._out.add_state("right", stamp, measured(stamp))
            elif kind == "action" and not self.mute(stamp):
                self._out.add_action("right", stamp, commanded(stamp))
            poll(arrival)
        self.now = max(end, self.now)
