"""Whether a 1 kHz record of the simulator stays inside the arm's limits.

Position and velocity are judged sample by sample. Acceleration is the slope of dq over a window, by default
10 ms, a tenth of the control bandwidth: a difference over 1 ms mostly shows stick-slip of the simulated joint
friction. The torque step is the difference of commanded torque between neighbouring samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from config.loading import load
from config.safety import Safety


@dataclass(frozen=True)
class Limits:
    """Of one arm; arrays [7]."""

    q_min: np.ndarray  # rad
    q_max: np.ndarray
    dq: np.ndarray  # rad/s
    ddq: np.ndarray  # rad/s2
    tau_step: float  # Nm per 1 ms

    @classmethod
    def of(cls, safety: Safety) -> "Limits":
        """The hard limits of an arm model."""
        joints = safety.joints
        arrays = (
            joints.position_min_rad,
            joints.position_max_rad,
            joints.velocity_rad_s,
            joints.acceleration_rad_s2,
        )
        return cls(*map(np.array, arrays), tau_step=1e-3 * joints.torque_rate_nm_s)


FR3 = Limits.of(load(Safety, "fr3"))


def acceleration(t: np.ndarray, dq: np.ndarray, window_s: float = 0.01) -> np.ndarray:
    """Mean acceleration over `window_s` around each sample, rad/s2 [n, ...]; zero at the record's ends.

    t [n] s, dq [n, ...] rad/s. Raises ValueError for a record whose time does not run at one even step.
    """
    result = np.zeros_like(dq)
    if len(t) < 3:
        return result
    step = float(np.median(np.diff(t)))
    if not np.allclose(np.diff(t), step, atol=1e-6):
        raise ValueError("the record's time has gaps: it was not taken in one piece")
    half = max(1, round(window_s / step / 2))
    if len(t) > 2 * half:
        result[half:-half] = (dq[2 * half :] - dq[: -2 * half]) / (2 * half * step)
    return result


def torque_steps(tau_cmd: np.ndarray, torque_control: np.ndarray) -> np.ndarray:
    """Change of commanded torque from the sample before, Nm [n, A, 7]; zero where no client commands torques.

    tau_cmd [n, A, 7] Nm, torque_control [n, A]. A lost packet shows as a step of two cycles.
    """
    steps = np.zeros_like(tau_cmd)
    commanded = torque_control[1:] & torque_control[:-1]
    steps[1:] = np.abs(np.diff(tau_cmd, axis=0)) * commanded[..., None]
    return steps


def violations(record: Mapping[str, np.ndarray], limits: Limits = FR3, window_s: float = 0.01) -> dict:
    """Samples beyond the limits, by kind and joint.

    record: arrays of simulation.record (an open npz will do). Returns {"position" | "velocity" |
    "acceleration": {joint: samples}} with joints such as "left_joint4" and only those that violate; {} means
    a clean run.
    """
    q, dq = record["q"], record["dq"]
    beyond = {
        "position": (q < limits.q_min) | (q > limits.q_max),
        "velocity": np.abs(dq) > limits.dq,
        "acceleration": np.abs(acceleration(record["t"], dq, window_s)) > limits.ddq,
    }
    found = {}
    for kind, samples in beyond.items():
        counts = samples.sum(axis=0)
        joints = {
            f"{arm}_joint{j + 1}": int(counts[a, j])
            for a, arm in enumerate(record["arms"].tolist())
            for j in range(7)
            if counts[a, j]
        }
        if joints:
            found[kind] = joints
    return found


def extremes(record: Mapping[str, np.ndarray], window_s: float = 0.01) -> dict[str, float]:
    """Largest |dq| rad/s, windowed |ddq| rad/s2 and commanded torque step Nm of a record."""
    return {
        "velocity_rad_s": float(np.abs(record["dq"]).max(initial=0.0)),
        "acceleration_rad_s2": float(
            np.abs(acceleration(record["t"], record["dq"], window_s)).max(initial=0.0)
        ),
        "torque_step_nm": float(torque_steps(record["tau_cmd"], record["torque_control"]).max(initial=0.0)),
    }
