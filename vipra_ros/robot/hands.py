"""The hands of a robot: openings of actions become wishes for each, through hysteresis."""

import threading
from collections.abc import Mapping, Sequence

from config.safety import GripperLimits
from vipra_ros.robot.arm import Hand, Wish


class Hysteresis:
    """Opening of successive actions -> "open" or "close" when that changes, else None."""

    def __init__(self, limits: GripperLimits):
        self._limits = limits
        self._side: Wish | None = None
        self._count = 0
        self._current: Wish | None = None

    def update(self, opening: float) -> Wish | None:
        """Call once per action. Fires after `consecutive_actions` on the same side of the band."""
        side = (
            "close"
            if opening < self._limits.close_below
            else "open"
            if opening > self._limits.open_above
            else None
        )
        self._count = self._count + 1 if side is not None and side == self._side else int(side is not None)
        self._side = side
        if side is None or side == self._current or self._count < self._limits.consecutive_actions:
            return None
        self._current = side
        return side

    def reset(self) -> None:
        """Forget what was commanded: the next clear wish is sent again."""
        self._side = self._current = None
        self._count = 0


class Hands:
    """Every hand of the robot, by its arm's name. Nothing here blocks or raises."""

    def __init__(self, hands: Mapping[str, Hand], limits: GripperLimits):
        self._hands = dict(hands)
        self._hysteresis = {name: Hysteresis(limits) for name in hands}
        self._told: dict[str, float] = {}  # last opening due

    def start(self) -> None:
        for hand in self._hands.values():
            hand.start()

    def move(self, openings: Sequence[float]) -> None:
        """The openings of one action, a hand each in order; call once per action."""
        for name, opening in zip(self._hands, openings, strict=False):
            hand, hysteresis = self._hands[name], self._hysteresis[name]
            if hand.lost():
                hysteresis.reset()
            self._told[name] = float(opening)
            wish = hysteresis.update(float(opening))
            if wish is not None:
                hand.wish(wish)

    def open(self) -> None:
        for name, hand in self._hands.items():
            self._told[name] = 1.0
            self._hysteresis[name].reset()
            hand.wish("open")

    def forget(self) -> None:
        """What a hand was told and has not begun, it shall not begin."""
        for hand in self._hands.values():
            hand.forget()

    def reset(self) -> None:
        """Begin anew: hands may have been moved by other means since."""
        self._told.clear()
        self.forget()
        for hysteresis in self._hysteresis.values():
            hysteresis.reset()

    def measured(self, name: str) -> float | None:
        """Opening, 0 (closed) to 1 (open); None for an arm without a hand."""
        return self._hands[name].opening if name in self._hands else None

    def told(self, name: str) -> float | None:
        """Opening of the last action, before hysteresis; the measured one until there was an action."""
        told = self._told.get(name)
        return self.measured(name) if told is None else told

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong, by arm; empty if nothing."""
        return {name: hand.fault for name, hand in self._hands.items() if hand.fault}

    def report(self) -> dict[str, dict]:
        """Opening, outcome of the last grasp, running command and fault of every hand, by arm."""
        return {
            name: {
                "opening": round(hand.opening, 3),
                "grasped": hand.grasped,
                "moving": hand.moving,
                "fault": hand.fault,
            }
            for name, hand in self._hands.items()
        }

    def enders(self, timeout_s: float) -> list[threading.Thread]:
        """Threads, not yet started, that end a hand each within `timeout_s`, or as soon as it can be."""
        return [
            threading.Thread(target=hand.stop, args=(timeout_s,), daemon=True)
            for hand in self._hands.values()
        ]
