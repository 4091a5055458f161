"""The joint limits of a whole robot as arrays: `config.safety.Safety`, once per arm, side by side."""

from dataclasses import dataclass

import numpy as np

from config.safety import Safety


@dataclass(frozen=True)
class Braking:
    """One family of velocity bounds per joint: dq <= -offset + sqrt(coefficient (upper - q)) and its mirror
    image.
    """

    upper: np.ndarray  # [J] rad
    lower: np.ndarray  # [J] rad
    offset: np.ndarray  # [J] rad/s
    coefficient: np.ndarray  # [J] rad/s2

    def bounds(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest velocity [J] rad/s at `q` [J] rad; zero beyond the ends."""
        up = np.sqrt(self.coefficient * np.maximum(self.upper - q, 0.0)) - self.offset
        down = np.sqrt(self.coefficient * np.maximum(q - self.lower, 0.0)) - self.offset
        return -np.maximum(down, 0.0), np.maximum(up, 0.0)


@dataclass(frozen=True)
class JointLimits:
    """Limits of J joints, equally many an arm. `velocity` and `acceleration` are the software's share of the
    hard ones.
    """

    hard_min: np.ndarray  # [J] rad
    hard_max: np.ndarray  # [J] rad
    soft_min: np.ndarray  # [J] rad
    soft_max: np.ndarray  # [J] rad
    hard_velocity: np.ndarray  # [J] rad/s
    velocity: np.ndarray  # [J] rad/s
    acceleration: np.ndarray  # [J] rad/s2
    jerk: np.ndarray  # [J] rad/s3
    reference_jerk: np.ndarray  # [J] rad/s3
    published: Braking  # what the robot itself accepts
    envelope: Braking  # at `share` of the published coefficients
    to_soft: Braking  # as `envelope`, ending at the soft position limits

    @classmethod
    def of(cls, safety: Safety, arms: int) -> "JointLimits":
        """Limits of `arms` equal arms."""

        def tiled(values) -> np.ndarray:
            array = np.tile(np.asarray(values, dtype=float), arms)
            array.setflags(write=False)
            return array

        joints, envelope = safety.joints, safety.joints.velocity_envelope
        hard_min, hard_max = tiled(joints.position_min_rad), tiled(joints.position_max_rad)
        soft_min, soft_max = hard_min + joints.soft_margin_rad, hard_max - joints.soft_margin_rad
        upper, lower = tiled(envelope.upper_rad), tiled(envelope.lower_rad)
        offset, coefficient = tiled(envelope.offset_rad_s), tiled(envelope.coefficient_rad_s2)
        velocity, acceleration = tiled(joints.velocity_rad_s), tiled(joints.acceleration_rad_s2)
        jerk = tiled(joints.jerk_rad_s3)
        return cls(
            hard_min=hard_min,
            hard_max=hard_max,
            soft_min=soft_min,
            soft_max=soft_max,
            hard_velocity=velocity,
            velocity=joints.software_share * velocity,
            acceleration=joints.software_share * acceleration,
            jerk=jerk,
            reference_jerk=joints.reference_jerk_share * jerk,
            published=Braking(upper, lower, offset, coefficient),
            envelope=Braking(upper, lower, offset, envelope.share * coefficient),
            to_soft=Braking(soft_max, soft_min, 0.0 * offset, envelope.share * coefficient),
        )

    @property
    def size(self) -> int:
        """J."""
        return len(self.soft_min)

    def velocity_bounds(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest commanded velocity [J] rad/s at `q` [J] rad."""
        low, high = self.envelope.bounds(q)
        soft_low, soft_high = self.to_soft.bounds(q)
        low = np.maximum(np.maximum(low, soft_low), -self.velocity)
        high = np.minimum(np.minimum(high, soft_high), self.velocity)
        return low, high

    def broken_by(self, joints: np.ndarray, rate_hz: float) -> tuple[str, int, int, str] | None:
        """What no command may ask for: hard positions, and hard velocities from one row of `joints` [H, J]
        rad to the next at `rate_hz`. (code, row, joint, text) of the worst, or None.
        """
        out = np.maximum(self.hard_min - joints, joints - self.hard_max)
        if out.max() > 0.0:
            i, j = np.unravel_index(out.argmax(), out.shape)
            return "position", int(i), int(j), f"{out[i, j]:.3f} rad outside its range"
        speed = np.abs(np.diff(joints, axis=0, prepend=joints[:1])) * rate_hz
        over = speed - self.hard_velocity
        if over.max() > 0.0:
            i, j = np.unravel_index(over.argmax(), over.shape)
            return (
                "velocity",
                int(i),
                int(j),
                f"at {speed[i, j]:.2f} rad/s, limit {self.hard_velocity[j]:.2f}",
            )
        return None
