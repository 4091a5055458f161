"""The one gate every command passes: chunk knots before they are sent, reference ticks before they reach an
arm.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from config.safety import Safety
from config.workcell import Workcell
from vipra_ros.execution.chunk import Chunk
from vipra_ros.safety.collision import Geometry
from vipra_ros.safety.envelope import Envelope
from vipra_ros.safety.limits import JointLimits

CATCH_UP_S = 0.02  # a tick that comes later than this after the last one moves the target no further


@dataclass(frozen=True)
class Verdict:
    """What may be commanded. `hold`, `fault`: `q`, `dq` brake to rest and stay there until `reset`."""

    q: np.ndarray  # [J] rad
    dq: np.ndarray  # [J] rad/s
    action: Literal["pass", "hold", "fault"]
    code: str = (
        ""  # non_finite, size, late, tracking, self_collision, arm_collision, table, workspace, speed, ...
    )
    reason: str = ""
    interventions: dict[str, int] = field(default_factory=dict)  # joints changed, by kind


class Supervisor:
    """Gate over the J joints of `arms`, in that order, equally many each. Not thread-safe.

    workcell: None leaves out everything that needs geometry (collision, workspace, Cartesian speed,
    manipulability).
    """

    def __init__(
        self, safety: Safety, arms: tuple[str, ...], workcell: Workcell | None, q: np.ndarray, t: float
    ):
        self.safety, self.arms = safety, tuple(arms)
        self.limits = JointLimits.of(safety, len(self.arms))
        self.geometry = Geometry(workcell, self.arms) if workcell is not None else None
        self._envelope = Envelope(self.limits, np.zeros(self.limits.size))
        self.reset(q, t)

    def reset(self, q: np.ndarray, t: float, dq: np.ndarray | None = None) -> None:
        """Continue from `q` [J] rad and `dq` [J] rad/s (at rest when omitted) at `t`; forgets any hold. Call
        with every `Reference.reseed`.

        Raises ValueError when `q` is not a place to start from (`check_start`).
        """
        problem = self.check_start(q)
        if problem:
            raise ValueError(problem)
        self._envelope.reset(q, dq)
        self._t = t
        self._held: tuple[Literal["hold", "fault"], str, str] | None = None
        self._off_since: float | None = None

    @property
    def held(self) -> str | None:
        """Why nothing passes, or None."""
        return self._held[2] if self._held else None

    @property
    def state(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, dq, ddq [J] last let through; what `Reference.stop` should continue from."""
        return self._envelope.q, self._envelope.dq, self._envelope.ddq

    def check_start(self, q: np.ndarray) -> str | None:
        """Why the arms cannot start at `q` [J] rad, or None."""
        q = np.asarray(q, dtype=float)
        if q.shape != (self.limits.size,) or not np.isfinite(q).all():
            return f"need {self.limits.size} finite joint positions, got {q}"
        out = np.maximum(self.limits.hard_min - q, q - self.limits.hard_max)
        j = int(out.argmax())
        if out[j] > 0:
            return f"{self._joint(j)} is {out[j]:.3f} rad outside its hard limits: guide the arm back by hand"
        return None

    def check_chunk(self, chunk: Chunk) -> Verdict:
        """Whether a chunk's knots may be sent: size, hard position, hard velocity between knots, geometry at
        knots.

        Only reads; `q`, `dq` of the verdict are the offending (or last) knot's. Softer excesses pass here and
        are met by the envelope, tick by tick.
        """
        q, limits = chunk.joints, self.limits
        if q.shape[1] != limits.size:
            return Verdict(q[0], 0 * q[0], "hold", "size", f"{q.shape[1]} joints, need {limits.size}")
        dq = np.diff(q, axis=0, prepend=q[:1]) * chunk.rate_hz
        broken = limits.broken_by(q, chunk.rate_hz)
        if broken:
            code, i, j, text = broken
            return Verdict(q[i], dq[i], "hold", code, f"action {i}: {self._joint(j)} {text}")
        if self.geometry is not None:
            for i in range(len(q)):
                problem = self.geometry.problem(self.safety.task, q[i], dq[i], self._envelope.q)
                if problem:
                    return Verdict(q[i], dq[i], "hold", problem[0], f"action {i}: {problem[1]}")
        return Verdict(q[-1], dq[-1], "pass")

    def check(self, t: float, q: np.ndarray, dq: np.ndarray, measured: np.ndarray | None = None) -> Verdict:
        """One tick: target `q` [J] rad, `dq` [J] rad/s at `t`; `measured` [J] rad joint positions."""
        dt = t - self._t
        if self._held is None:
            problem = self._problem(t, dt, q, dq, measured)
            if problem:
                self._held = problem
        if dt <= 0:  # the same tick again
            return self._verdict({})
        self._t = t
        dt = min(dt, CATCH_UP_S)
        if self._held is not None:
            q, dq = self._brake(dt)
        return self._verdict(self._envelope.filter(q, dq, dt)[2])

    def hold(self, code: str, reason: str, action: Literal["hold", "fault"] = "hold") -> None:
        """Brake from the next `check` on, for a reason found elsewhere (watchdog, robot, operator). The first
        stays.
        """
        if self._held is None:
            self._held = (action, code, reason)

    def _verdict(self, interventions: dict[str, int]) -> Verdict:
        action, code, reason = self._held or ("pass", "", "")
        return Verdict(self._envelope.q, self._envelope.dq, action, code, reason, interventions)

    def _problem(self, t, dt, q, dq, measured) -> tuple[Literal["hold", "fault"], str, str] | None:
        n, watchdogs, tracking = self.limits.size, self.safety.watchdogs, self.safety.tracking
        if np.shape(q) != (n,) or np.shape(dq) != (n,):
            return "fault", "size", f"target has shapes {np.shape(q)} and {np.shape(dq)}, need ({n},)"
        if not (np.isfinite(q).all() and np.isfinite(dq).all()):
            return "fault", "non_finite", "target holds NaN or infinity"
        if dt < 0:
            return "fault", "clock", f"time went back by {-dt:.3f} s"
        if dt > watchdogs.tick_gap_s:
            return (
                "fault",
                "late",
                f"no tick for {1000 * dt:.0f} ms, limit {1000 * watchdogs.tick_gap_s:.0f} ms",
            )
        if measured is not None:
            if np.shape(measured) != (n,) or not np.isfinite(measured).all():
                return "fault", "state", "measured positions are not finite or have the wrong size"
            error = np.abs(self._envelope.q - measured)
            if error.max() <= tracking.error_rad:
                self._off_since = None
            elif self._off_since is None:
                self._off_since = t
            elif t - self._off_since >= tracking.duration_s - 1e-9:
                j = int(error.argmax())
                return (
                    "hold",
                    "tracking",
                    f"{self._joint(j)} is {error[j]:.3f} rad off its reference, limit {tracking.error_rad}",
                )
        if self.geometry is not None:
            rest = (
                q + 0.5 * dq * np.abs(dq) / self.safety.stop.deceleration_rad_s2
            )  # where a stop begun now would end
            problem = self.geometry.problem(self.safety.task, rest, dq, self._envelope.q)
            if problem:
                return "hold", *problem
        return None

    def _brake(self, dt: float) -> tuple[np.ndarray, np.ndarray]:
        stop, q, dq, ddq = self.safety.stop, self._envelope.q, self._envelope.dq, self._envelope.ddq
        want = -np.sign(dq) * stop.deceleration_rad_s2
        ddq = np.clip(want, ddq - stop.jerk_rad_s3 * dt, ddq + stop.jerk_rad_s3 * dt)
        slower = dq + ddq * dt
        slower = np.where((slower * dq <= 0.0) | (np.abs(dq) <= stop.deceleration_rad_s2 * dt), 0.0, slower)
        return np.where(slower == dq, q, q + 0.5 * dt * (dq + slower)), slower

    def _joint(self, j: int) -> str:
        each = self.limits.size // len(self.arms)
        return f"{self.arms[j // each]} joint {j % each + 1}"
