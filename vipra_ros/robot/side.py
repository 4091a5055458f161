"""One arm as the loop sees it: its rows of the reference, and whether its state is alive."""

import time
from dataclasses import dataclass

import numpy as np

from vipra_ros.robot.arm import Arm, ArmFault, ArmState


@dataclass
class Side:
    """One arm of the robot and what the loop remembers of it."""

    name: str
    arm: Arm
    rows: slice  # of the J joints
    state: ArmState | None = None
    changed_at: float = 0.0  # executor and wall time of the last change of its state
    changed_wall: float = 0.0

    def alive(self, now: float) -> None:
        """Its state counts as new at executor time `now`."""
        self.changed_at, self.changed_wall = now, time.monotonic()

    def measure(self, now: float, stalled: bool, frozen_s: float, rest_rad_s: float) -> ArmFault | None:
        """Read the arm into `state`. The fault, if it is under control and ought to go no further: a reflex,
        a lost connection, or a state that has not changed for `frozen_s`; `stalled`: nobody looked.
        """
        before, self.state = self.state, self.arm.read()
        if before is None or stalled or _is_fresh(before, self.state, rest_rad_s):
            self.alive(now)
        if not self.arm.streaming:
            return None
        if self.state.fault:
            return ArmFault(self.state.fault[0], f"{self.name}: {self.state.fault[1]}")
        silent = now - self.changed_at
        # Both clocks: a simulator catching up makes many milliseconds in few.
        if silent > frozen_s and time.monotonic() - self.changed_wall > frozen_s:
            return ArmFault("frozen", f"{self.name}: no new state for {1000 * silent:.0f} ms")
        return None


def _is_fresh(before: ArmState, state: ArmState, rest_rad_s: float) -> bool:
    """A later time, and positions that change if the arm says it moves: a repeated state has only the
    first.
    """
    still = float(np.abs(state.dq).max()) < rest_rad_s
    return state.time_s != before.time_s and (still or not np.array_equal(state.q, before.q))
