"""A chunk: the H actions of one inference for every arm, with the times they are due."""

import math
from dataclasses import dataclass

import numpy as np

from config.embodiment import Embodiment


class Rejected(ValueError):
    """A chunk that will not run. `code`: shape, units, reach, non_finite, rate, gripper, stale, expired,
    future, position, velocity, rough, jump, start.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Chunk:
    """Action i is due at t0 + i / rate_hz and stays due for one period.

    Raises Rejected (shape, non_finite, rate, gripper) when built from something that cannot be a chunk.
    """

    seq: int
    t0: float  # s, executor clock
    rate_hz: float
    joints: np.ndarray  # [H, J] rad
    grippers: np.ndarray  # [H, G] opening, 0 closed to 1 open

    def __post_init__(self):
        for name in ("joints", "grippers"):
            array = np.array(getattr(self, name), dtype=float)
            if array.ndim != 2:
                raise Rejected("shape", f"{name} must be two-dimensional, got shape {array.shape}")
            if not np.isfinite(array).all():
                raise Rejected("non_finite", f"{name} holds NaN or infinity")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if not 1 <= len(self.joints) <= 256 or len(self.grippers) != len(self.joints):
            raise Rejected(
                "shape",
                f"{len(self.joints)} joint rows and {len(self.grippers)} gripper rows: need 1..256, equal",
            )
        if not (math.isfinite(self.rate_hz) and 0.5 <= self.rate_hz <= 200):
            raise Rejected("rate", f"rate {self.rate_hz} Hz is outside 0.5..200")
        if not math.isfinite(self.t0):
            raise Rejected("non_finite", "t0 is not a time")
        if self.grippers.size and (self.grippers.min() < -0.01 or self.grippers.max() > 1.01):
            raise Rejected("gripper", "gripper opening outside 0..1")

    @classmethod
    def from_actions(
        cls, seq: int, t0: float, rate_hz: float, actions: np.ndarray, embodiment: Embodiment
    ) -> "Chunk":
        """From `actions` [H, D], joints and openings in the embodiment's order.

        End-effector steps are refused (units): `execution.cartesian` makes joints of them.
        """
        if embodiment.action_space != "absolute_joints":
            raise Rejected(
                "units", f"embodiment {embodiment.name} commands {embodiment.action_space}, not joints"
            )
        actions = np.asarray(actions, dtype=float)
        if actions.ndim != 2 or actions.shape[1] != embodiment.action_dim:
            raise Rejected("shape", f"actions {actions.shape}: need [H, {embodiment.action_dim}]")
        gripper = np.array([d.kind == "gripper" for d in embodiment.dimensions])
        return cls(seq, t0, rate_hz, actions[:, ~gripper], actions[:, gripper])

    def __len__(self) -> int:
        return len(self.joints)

    @property
    def end(self) -> float:
        """When the last action stops being due, s."""
        return self.t0 + len(self) / self.rate_hz

    def sustained(self, least: int, before: np.ndarray | None = None) -> "Chunk":
        """The chunk with hands that open or close (a side of 0.5) for `least` actions in a row or not at all.

        A shorter run, at the chunk's end too, goes on with the opening before it. before: openings [G] when
        the chunk takes over; None: the first run stands.
        """
        openings = self.grippers.copy()
        for column, hand in enumerate(openings.T):
            edges = np.flatnonzero(np.diff(hand > 0.5)) + 1
            last = None if before is None else before[column]
            for run in np.split(hand, edges):  # views of `openings`
                if len(run) < least and last is not None and (run[0] > 0.5) != (last > 0.5):
                    run[:] = last
                last = run[-1]
        return Chunk(self.seq, self.t0, self.rate_hz, self.joints, openings)

    def index(self, t: float) -> int:
        """Latest action due at t: -1 before the first, H - 1 from the last one on."""
        return int(min(max(math.floor((t - self.t0) * self.rate_hz + 1e-6), -1), len(self) - 1))
