"""One Franka Hand in a thread of its own, so that its blocking calls never touch the control loop.

A hand is told to open or to close. Only the newest wish waits; one command runs at a time, as a second one
during the first deadlocks.
"""

import threading
import time

import franky

from config.safety import GripperLimits
from vipra_ros.robot.arm import Wish

_PERIOD_S = 0.02
_RECONNECT_S = 1.0
# Connections with a command that has not ended: franky's own thread still uses them, so they must outlive it.
_ABANDONED: list[tuple[franky.Gripper, franky.BoolFuture]] = []


class GripperWorker:
    """Connects, reads the width at up to 50 Hz and carries out the newest wish. `wish` and the properties
    never block.
    """

    def __init__(self, name: str, hostname: str, limits: GripperLimits):
        self.name = name
        self._hostname, self._limits = hostname, limits
        self._wish: tuple[Wish, float] | None = None  # mailbox and when, s: one slot, latest wins
        self._width = limits.max_width_m
        self._fault = "not connected yet"
        self._grasped: bool | None = None
        self._moving: Wish | None = None
        self._lost = False
        self._closing = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{name}-gripper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wish(self, wish: Wish) -> None:
        """Replace whatever waits by `wish`; it is carried out when the running command has ended, unless that
        takes longer than a command may.
        """
        self._wish = wish, time.monotonic()
        self._changed.set()

    def forget(self) -> None:
        """What waits is not carried out."""
        self._wish = None

    @property
    def opening(self) -> float:
        """Last measured opening, 0..1."""
        return min(max(self._width / self._limits.max_width_m, 0.0), 1.0)

    @property
    def fault(self) -> str:
        """Why the hand does not do what it was told, "" if all is well."""
        return self._fault

    @property
    def grasped(self) -> bool | None:
        """Outcome of the last close: an object wider than `grasped_width_m` is held. None: not closed."""
        return self._grasped

    @property
    def moving(self) -> Wish | None:
        """The command that runs now."""
        return self._moving

    def lost(self) -> bool:
        """Once after a command that the connection ended or kept waiting: repeated only when it is wished for
        anew.
        """
        lost, self._lost = self._lost, False
        return lost

    def stop(self, timeout_s: float = 1.0) -> bool:
        """End the thread once its command has ended. False if that takes longer: the thread goes on alone."""
        self._closing.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        gripper = None
        while not self._closing.is_set():
            try:
                if gripper is None:
                    gripper = franky.Gripper(self._hostname)
                    self._fault = ""
                self._width = gripper.state.width
                waiting, self._wish = self._wish, None
                if waiting is not None:
                    wish, since = waiting
                    if time.monotonic() - since <= self._limits.timeout_s:
                        self._execute(gripper, wish)
                    else:
                        self._lost = True
            except Exception as error:  # the hand's faults never stop the arms: shown, then tried again
                gripper = None
                self._lost |= self._moving is not None
                self._moving = None
                self._fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
                self._closing.wait(_RECONNECT_S)
                continue
            if self._wish is None:
                self._changed.wait(_PERIOD_S)
                self._changed.clear()

    def _execute(self, gripper: franky.Gripper, wish: Wish) -> None:
        limits = self._limits
        self._moving, self._grasped = wish, None
        if wish == "open":
            future = gripper.move_async(limits.max_width_m, limits.speed_m_s)
        else:
            epsilon = limits.grasp_epsilon_outer_m
            future = gripper.grasp_async(0.0, limits.speed_m_s, limits.force_n, 0.005, epsilon)
        deadline = time.monotonic() + limits.timeout_s
        try:
            while not future.wait(
                _PERIOD_S
            ):  # also while closing: the hand takes no second client before its end
                self._width = gripper.state.width
                # Its future must be waited for all the same: a second command would deadlock behind it.
                if time.monotonic() > deadline:
                    self._fault = f"{wish} has not ended within {limits.timeout_s:g} s"
                    if self._closing.is_set():
                        return
        finally:
            if not future.wait(0.0):
                _ABANDONED.append((gripper, future))
        succeeded = future.get()
        self._width = gripper.state.width
        self._fault = "" if succeeded or wish == "close" else f"{wish} was not carried out"
        if wish == "close":
            self._grasped = bool(succeeded) and self._width > limits.grasped_width_m
        self._moving = None  # last: whoever sees it end sees what came of it
