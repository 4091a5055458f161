"""The executor clock: the one time that stamps, deadlines and delays are counted in.

CLOCK_MONOTONIC on hardware, the simulator's time in simulation. Neither follows wall or ROS time, so a jump
of those moves nothing.
"""

import time
from typing import Protocol

from config.robot import Robot
from simulation.state import SharedState

FROZEN_S = 1.0  # wall time without progress of simulated time after which a wait gives up
_POLL_S = 0.0005


class ClockStopped(RuntimeError):
    """Simulated time has stopped: the simulator is gone, suspended or far too slow."""


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since an arbitrary zero."""

    def sleep_until(self, t: float) -> None:
        """Return at or soon after `t`, at once when it has passed. Raises ClockStopped, never hangs."""

    def close(self) -> None: ...


class MonotonicClock:
    """CLOCK_MONOTONIC."""

    now = staticmethod(time.monotonic)

    def sleep_until(self, t: float) -> None:
        wait = t - time.monotonic()
        if wait > 0:
            time.sleep(wait)

    def close(self) -> None:
        pass


class SimulatedClock:
    """Time of the simulator called `name`; waits up to `timeout_s` for it to come up (StateError)."""

    def __init__(self, name: str, timeout_s: float = 30.0):
        self._state = SharedState.attach(name, timeout_s)
        self.now = self._state.time

    def sleep_until(self, t: float) -> None:
        last = self._state.time()
        moved = time.monotonic()
        while last < t:
            # Simulated time never runs faster than the wall: sleep most of the way at once.
            time.sleep(max(_POLL_S, min(0.9 * (t - last), FROZEN_S / 4)))
            now = self._state.time()
            if now != last:
                last, moved = now, time.monotonic()
            elif time.monotonic() - moved > FROZEN_S:
                raise ClockStopped(f"simulated time has stood at {now:.3f} s for {FROZEN_S:g} s of wall time")

    def close(self) -> None:
        self._state.close()


def make_clock(robot: Robot) -> Clock:
    """The clock that `robot.clock` names."""
    return MonotonicClock() if robot.clock == "monotonic" else SimulatedClock(robot.simulation.name)


def to_stamp(t: float) -> tuple[int, int]:
    """Executor time as (sec, nanosec) of a ROS stamp."""
    nanoseconds = round(t * 1e9)
    return nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000
