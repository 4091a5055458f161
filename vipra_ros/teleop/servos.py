"""Servo counts <-> joint angles of a GELLO. Pure.

A servo counts 4096 a turn. Its count may start anywhere in a turn, wrap from 4095 to 0 or run on beyond, all
depending on its mode and on where it was when the power came; none of that reaches a joint angle.
"""

import math

import numpy as np

from config.teleop import QUARTER, Dynamixel

TURN = 4096
# Where a joint's angle is looked for at first, within half a turn: middle of the FR3's joint ranges (Franka's
# FCI documentation). The ranges are up to 5.5 rad wide, so the nearest turn is the right one.
MIDDLE_RAD = np.array([0.0, 0.0, 0.0, -1.597, 0.0, 2.531, 0.0])
POSE_RAD = np.array([0.0, 0.0, 0.0, -QUARTER, 0.0, QUARTER, 0.0])  # the pose to calibrate in
POSE_TOLERANCE_RAD = 0.35  # by hand, 20 degrees


class CalibrationError(ValueError):
    """What was read is no GELLO in the pose asked for; the message says what is off."""


def angles(counts: np.ndarray) -> np.ndarray:
    """Servo angles (rad) of `counts`."""
    return np.asarray(counts) * (2 * math.pi / TURN)


def near(angle, middle):
    """`angle` (rad) plus the whole turns that bring it within half a turn of `middle`."""
    return middle + (np.asarray(angle) - middle + math.pi) % (2 * math.pi) - math.pi


class Unwrapped:
    """Counts as they come -> joints and opening that go on smoothly over the end of a turn."""

    def __init__(self, config: Dynamixel):
        self._config = config
        self._signs, self._offsets = np.array(config.signs), np.array(config.offsets_rad)
        self._last: np.ndarray | None = None

    def __call__(self, counts: np.ndarray, anew: bool = False) -> tuple[np.ndarray, float | None]:
        """`counts` [7, or 8 with the trigger's last] -> joints [7] rad, opening 0..1 or None.

        anew: in the turn of the arm's joint ranges, whatever came before.
        """
        middle = MIDDLE_RAD if anew or self._last is None else self._last
        self._last = near(self._signs * (angles(counts[:7]) - self._offsets), middle)
        return self._last, self._opening(counts[7]) if len(counts) > 7 else None

    def _opening(self, count: int) -> float:
        closed, opened = self._config.gripper_closed_rad, self._config.gripper_open_rad
        angle = near(angles(count), (closed + opened) / 2)
        return float(np.clip((angle - closed) / (opened - closed), 0.0, 1.0))


def offsets_in_pose(counts: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Offsets [7] (multiples of pi/2 in 0..3/2 pi) of a GELLO that is held in `POSE_RAD`.

    Raises CalibrationError for a joint that is not within `POSE_TOLERANCE_RAD` of the pose.
    """
    exact = angles(counts[:7]) - np.asarray(signs) * POSE_RAD
    rounded = np.round(exact / QUARTER) * QUARTER
    off = np.abs(exact - rounded)
    if off.max() > POSE_TOLERANCE_RAD:
        j = int(off.argmax())
        raise CalibrationError(
            f"joint {j + 1} is {off[j]:.2f} rad from the pose, limit {POSE_TOLERANCE_RAD:g}: hold it again"
        )
    return rounded % (2 * math.pi)


def sign_of_turn(before: int, after: int, joint: int) -> int:
    """Sign of a servo whose joint (1..7) was turned in its positive direction, from its counts.

    Raises CalibrationError for a turn too small, or too large to tell its direction.
    """
    turned = float(near(angles(after - before), 0.0))
    if not 0.15 <= abs(turned) <= 2.0:
        raise CalibrationError(f"joint {joint} turned by {abs(turned):.2f} rad: 0.15 to 2 are needed")
    return 1 if turned > 0 else -1


def trigger_range(opened: int, closed: int) -> tuple[float, float]:
    """Servo angles (open, closed) rad of the trigger, within half a turn. Raises CalibrationError."""
    start = float(angles(opened))
    end = float(near(angles(closed), start))
    if abs(end - start) < 0.2:
        raise CalibrationError(
            f"the trigger moved by {abs(end - start):.2f} rad, at least 0.2: squeeze it fully"
        )
    return start, end
