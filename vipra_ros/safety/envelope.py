"""The joint envelope: whatever comes in, what goes out is within position, velocity and acceleration limits.

In the spirit of libfranka's rate_limiting.h, with positions: a joint may only be as fast as lets it stop
before its soft limit. What is within limits goes through unchanged, bit for bit.
"""

import numpy as np

from vipra_ros.safety.limits import JointLimits

KINDS = ("position", "velocity", "acceleration", "jerk", "step")


class Envelope:
    """Filters one target per tick. Guaranteed for every finite input: soft positions, velocity bounds of
    `JointLimits.velocity_bounds`, and |dq - previous dq| <= acceleration dt. Jerk yields to these three.

    A joint that starts outside its soft limits may rest there and move inwards only.
    """

    def __init__(self, limits: JointLimits, q: np.ndarray):
        self._limits = limits
        self.reset(q)

    def reset(self, q: np.ndarray, dq: np.ndarray | None = None) -> None:
        """Continue from `q` [J] rad and `dq` [J] rad/s (zero when omitted)."""
        limits = self._limits
        self.q = np.array(q, dtype=float)
        self.dq = np.zeros_like(self.q) if dq is None else np.array(dq, dtype=float)
        self.ddq = np.zeros_like(self.q)
        self._low = np.minimum(limits.soft_min, self.q)
        self._high = np.maximum(limits.soft_max, self.q)

    def filter(
        self, q: np.ndarray, dq: np.ndarray, dt: float
    ) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Target `q` [J] rad, `dq` [J] rad/s for `dt` s after the last one -> allowed target and, by kind,
        how many joints were changed. Raises ValueError when a target is not finite.
        """
        if not (np.isfinite(q).all() and np.isfinite(dq).all()):
            raise ValueError("target is not finite")
        limits = self._limits
        slowest, fastest = self._velocity_bounds(q)
        ddq = (dq - self.dq) / dt
        off = q - self.q - 0.5 * dt * (self.dq + dq)  # what the velocities do not explain
        broken = {
            "position": (q < self._low) | (q > self._high),
            "velocity": (dq < slowest) | (dq > fastest),
            "acceleration": np.abs(ddq) > limits.acceleration,
            "jerk": np.abs(ddq - self.ddq) > limits.jerk * dt,
            "step": np.abs(off) > np.minimum(limits.jerk * dt / 3.0, limits.acceleration) * dt * dt / 4.0,
        }
        changed = np.logical_or.reduce(list(broken.values()))
        interventions: dict[str, int] = {}
        if changed.any():
            for kind in KINDS:  # a joint counts once, under the first kind it breaks
                count = int((broken[kind] & changed).sum())
                changed = changed & ~broken[kind]
                if count:
                    interventions[kind] = count
            changed = np.logical_or.reduce(list(broken.values()))
            near_q, near_dq = self._follow(q, dq, dt)
            q, dq = np.where(changed, near_q, q), np.where(changed, near_dq, dq)
            ddq = (dq - self.dq) / dt
        self.q, self.dq, self.ddq = q, dq, ddq
        self._low = np.minimum(limits.soft_min, np.maximum(self._low, q))
        self._high = np.maximum(limits.soft_max, np.minimum(self._high, q))
        return q, dq, interventions

    def _velocity_bounds(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        limits = self._limits
        down, up = limits.envelope.bounds(q)
        k = limits.to_soft.coefficient
        up = np.minimum(np.minimum(up, np.sqrt(k * np.maximum(self._high - q, 0.0))), limits.velocity)
        down = np.maximum(np.maximum(down, -np.sqrt(k * np.maximum(q - self._low, 0.0))), -limits.velocity)
        return down, up

    def _follow(self, q: np.ndarray, dq: np.ndarray, dt: float) -> tuple[np.ndarray, np.ndarray]:
        """One tick of constant acceleration towards the target, within limits."""
        limits = self._limits
        q = np.clip(q, self._low, self._high)
        slowest, fastest = self._velocity_bounds(q)
        dq = np.clip(dq, slowest, fastest)
        # a velocity that closes the gap and can still be shed in time with half of the acceleration
        gap = q - self.q - 0.5 * dt * (self.dq + dq)
        want = dq + np.sign(gap) * np.minimum(
            np.abs(gap) / (4.0 * dt), np.sqrt(limits.acceleration * np.abs(gap))
        )
        want = np.clip(
            want, self.dq + dt * (self.ddq - limits.jerk * dt), self.dq + dt * (self.ddq + limits.jerk * dt)
        )
        reach = limits.acceleration * dt
        want = np.clip(want, self.dq - reach, self.dq + reach)
        want = np.clip(want, -self._fastest(-self.q, -self.dq, -self._low, -limits.envelope.lower, dt),
                       self._fastest(self.q, self.dq, self._high, limits.envelope.upper, dt))  # fmt: skip
        want = np.clip(want, self.dq - reach, self.dq + reach)
        return np.clip(self.q + 0.5 * dt * (self.dq + want), self._low, self._high), want

    def _fastest(self, q, dq, soft, end, dt: float) -> np.ndarray:
        """Largest velocity [J] after `dt` that is still below both braking curves at the position reached by
        then.
        """
        limits = self._limits
        k, o = limits.envelope.coefficient, limits.envelope.offset
        room = soft - q - 0.5 * dt * dq
        p = 0.25 * k * dt
        to_soft = np.where(room >= 0.0, np.sqrt(p * p + k * np.maximum(room, 0.0)) - p, 2.0 * room / dt)
        p = p + o
        room = np.maximum(p * p - o * o + k * (end - q - 0.5 * dt * dq), 0.0)
        to_end = np.maximum(np.sqrt(room) - p, 0.0)
        return np.minimum(np.minimum(to_soft, to_end), limits.velocity)
