"""Chunks as they arrive: one part per arm, checked and put together before anything sees them.

Who may command is a lease: `lease:epoch:seq` travels in `frame_id`. The lease names the holder, the epoch
ends with every recovery, so commands from before a fault can never move an arm after it.
"""

import secrets
from dataclasses import dataclass

import numpy as np

from vipra_ros.execution.chunk import Chunk, Rejected

MAX_POINTS = 64
_TIME_TOLERANCE_S = 2e-6  # stamps are whole nanoseconds; i / rate is not


def joint_names(arm: str, gripper: bool = True) -> tuple[str, ...]:
    """ROS names of one arm's dimensions, in order."""
    joints = tuple(f"{arm}_fr3_joint{i}" for i in range(1, 8))
    return (*joints, f"{arm}_fr3_gripper") if gripper else joints


@dataclass(frozen=True)
class Tag:
    """Who sent a command and which one it is."""

    lease: str
    epoch: int
    seq: int

    @classmethod
    def parse(cls, text: str) -> "Tag":
        """From `lease:epoch:seq`. Raises Rejected."""
        parts = text.split(":")
        if (
            len(parts) == 3
            and parts[0]
            and all(p.isascii() and p.isdigit() and len(p) < 16 for p in parts[1:])
        ):
            return cls(parts[0], int(parts[1]), int(parts[2]))
        raise Rejected("tag", f"frame_id {text[:60]!r} is not lease:epoch:seq")

    def precedes(self, other: "Tag") -> bool:
        """An earlier command of the same lease."""
        return (self.lease, self.epoch) == (other.lease, other.epoch) and self.seq < other.seq

    def __str__(self) -> str:
        return f"{self.lease}:{self.epoch}:{self.seq}"


@dataclass(frozen=True)
class Part:
    """One arm's share of a chunk. No points: let go."""

    tag: Tag
    stamp: float  # executor time of point 0, s
    times: np.ndarray  # [n] s from the stamp
    joints: np.ndarray  # [n, 7] rad
    grippers: np.ndarray  # [n, 0 or 1] opening


def check_part(arm: str, gripper: bool, tag: Tag, names, stamp: float, times, rows) -> Part:
    """One arm's message as a Part. `rows` [n][7 or 8], `times` [n] s. Raises Rejected."""
    if not rows and not names:
        return Part(tag, stamp, np.zeros(0), np.zeros((0, 7)), np.zeros((0, int(gripper))))
    expected = joint_names(arm, gripper)
    if tuple(names) != expected:
        raise Rejected("names", f"{arm}: joint names must be {', '.join(expected)} in this order")
    if len(rows) > MAX_POINTS or len(times) != len(rows):
        raise Rejected("shape", f"{arm}: {len(rows)} points at {len(times)} times, at most {MAX_POINTS}")
    if any(len(row) != len(expected) for row in rows):
        raise Rejected("shape", f"{arm}: every point needs {len(expected)} positions")
    values = np.array(rows, dtype=float).reshape(len(rows), len(expected))
    if not np.isfinite(values).all():
        raise Rejected("non_finite", f"{arm}: positions hold NaN or infinity")
    times = np.asarray(times, dtype=float)
    if len(times) == 1:
        raise Rejected("shape", f"{arm}: a chunk needs at least 2 points")
    if len(times) > 1:
        even = np.arange(len(times)) * (times[-1] - times[0]) / (len(times) - 1)
        # Written so that NaN does not pass.
        if not (times[0] == 0.0 and times[-1] > 0.0 and np.abs(times - even).max() <= _TIME_TOLERANCE_S):
            raise Rejected("times", f"{arm}: points must be evenly spaced from time_from_start 0")
    return Part(tag, stamp, times, values[:, :7], values[:, 7:])


class Assembler:
    """Puts the arms' parts of one seq together."""

    def __init__(self, arms: tuple[str, ...]):
        self._arms = arms
        self._parts: dict[str, Part] = {}

    def feed(self, arm: str, part: Part) -> Chunk | Tag | None:
        """Add a part. The complete Chunk, the Tag of a complete let-go, or None while parts are missing.

        Raises Rejected for parts of one tag that do not match, and for a tag that a new one overtakes
        incomplete; the new part is kept.
        """
        if any(part.tag.precedes(p.tag) for p in self._parts.values()):
            return None  # one arm's topic runs ahead of the other's: this command is overtaken already
        overtaken = {p.tag for p in self._parts.values() if p.tag != part.tag}
        if overtaken:
            self._parts.clear()
        self._parts[arm] = part
        chunk = self._complete()
        if overtaken and chunk is None:
            raise Rejected("incomplete", f"{overtaken.pop()}: one arm's part never came")
        return chunk

    def reset(self) -> None:
        self._parts.clear()

    def _complete(self) -> Chunk | Tag | None:
        if len(self._parts) < len(self._arms):
            return None
        parts = [self._parts[arm] for arm in self._arms]
        self._parts = {}
        first = parts[0]
        for part in parts[1:]:
            if part.stamp != first.stamp or not np.array_equal(part.times, first.times):
                raise Rejected("mismatch", f"{first.tag}: the arms' parts differ in stamp, rate or length")
        if not len(first.times):
            return first.tag
        return Chunk(
            seq=first.tag.seq,
            t0=first.stamp,
            rate_hz=(len(first.times) - 1) / first.times[-1],
            joints=np.hstack([p.joints for p in parts]),
            grippers=np.hstack([p.grippers for p in parts]),
        )


@dataclass
class Lease:
    """Who may command: one holder, an epoch, and the last sequence number seen."""

    timeout_s: float
    holder: str = ""
    epoch: int = 0
    seq: int = -1
    fed_at: float = 0.0

    def acquire(self, now: float) -> str:
        """A new lease as `lease:epoch`. Raises Rejected while another holds it."""
        if self.held(now):
            raise Rejected("lease", "another commander holds the lease; it must let go or fall silent first")
        self.holder, self.seq, self.fed_at = secrets.token_hex(4), -1, now
        return f"{self.holder}:{self.epoch}"

    def held(self, now: float) -> bool:
        return bool(self.holder) and now - self.fed_at <= self.timeout_s

    def check(self, tag: Tag, now: float) -> None:
        """Raises Rejected unless `tag` is the holder's next command in this epoch."""
        if tag.epoch != self.epoch:
            raise Rejected("epoch", f"epoch {tag.epoch}, now {self.epoch}: acquire a new lease")
        if not self.holder or tag.lease != self.holder:
            raise Rejected("lease", f"lease {tag.lease[:16]!r} does not hold the arms")
        if tag.seq <= self.seq:
            raise Rejected("stale", f"seq {tag.seq} after {self.seq}")

    def feed(self, seq: int, now: float) -> None:
        self.seq, self.fed_at = seq, now

    def release(self) -> None:
        self.holder = ""

    def next_epoch(self) -> None:
        """Every lease and command from before is void."""
        self.holder, self.epoch = "", self.epoch + 1
