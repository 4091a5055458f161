"""What the executor needs of an arm and of a hand: the interface an arm of another make is connected through.

`robot.franka.FrankaArm` and `robot.gripper.GripperWorker` are the ones for Franka arms. Everything above
(`ArmsExecutor`, the reference, the safety gate, `Commander`) takes any number of joints: the safety file says
how many.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Wish = Literal["open", "close"]  # what a hand is told


class ArmFault(RuntimeError):
    """An arm cannot go on. `code` is one word for programs, the message is for people."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class ArmState:
    """What an arm last reported. `time_s` has a zero of its own: it only tells fresh from frozen."""

    time_s: float
    q: np.ndarray  # [n] rad
    dq: np.ndarray  # [n] rad/s
    tau: np.ndarray  # [n] measured torque, Nm
    mode: str  # Idle, Move, Guiding, Reflex, UserStopped, AutomaticErrorRecovery, Other
    errors: str  # names of the current errors, "" if none

    @property
    def fault(self) -> tuple[str, str] | None:
        """(code, reason) when the arm itself refuses to move."""
        if self.mode == "UserStopped":
            return "user_stop", "user stop is pressed"
        if self.mode == "Reflex" or self.errors:
            return "reflex", self.errors or "reflex"
        return None


class Arm(Protocol):
    """One arm of n joints, connected. Everything that goes wrong is raised as ArmFault.

    Targets come at `reference_rate_hz`, already within every limit. The arm must stop by itself when they no
    longer come (`deadman_timeout_s`), whatever the Python process does.
    """

    @property
    def streaming(self) -> bool:
        """Whether `set_target` may be called: started, and neither released nor found faulty since."""

    @property
    def link_error(self) -> str:
        """Why the connection is down, "" while it is up."""

    def start(self) -> np.ndarray:
        """Take control and hold where the arm is. Returns that position [n] rad."""

    def read(self) -> ArmState:
        """The newest state, without blocking."""

    def set_target(self, q: np.ndarray, dq: np.ndarray, now: float, fresh: bool = False) -> None:
        """Follow `q` [n] rad, `dq` [n] rad/s from executor time `now` on, without blocking; `fresh`: re-arm
        the dead-man at once.
        """

    def abort(self) -> None:
        """Stop streaming at once and have the robot itself brake and hold. Does not block."""

    def recover(self) -> None:
        """Clear the arm's errors, reconnect if the link broke. May block for seconds."""

    def shutdown(self) -> None:
        """Stop and drop the connection; raises nothing, callable at any time."""


class Hand(Protocol):
    """One gripper, with a thread of its own. Nothing here blocks but `stop`, and nothing raises."""

    opening: float  # last measured, 0 (closed) to 1 (open)
    fault: str  # why it does not do what it was told, "" if all is well
    grasped: bool | None  # outcome of the last close; None: not closed
    moving: Wish | None  # the command that runs now

    def start(self) -> None: ...

    def lost(self) -> bool: ...

    def forget(self) -> None:
        """Drop what was wished for and has not begun."""

    def wish(self, wish: Wish) -> None:
        """The latest one counts."""

    def stop(self, timeout_s: float = 1.0) -> bool:
        """End; False if that takes longer."""
