"""Hands in circles over the table: the motion that the shipped tiny policy imitates.

The demonstration is an autonomous vector field dq/dt = f(q) with a limit cycle, an ellipse in joint space
through the home position, so that the arm's configuration alone (which a picture shows) determines every
chunk, and an arm pushed off the cycle returns to it. Opening of the gripper follows the phase: open in the
first half, closed in the second.
"""

import numpy as np

TASKS = {
    "move both hands in circles": ("left", "right"),
    "move the left hand in circles": ("left",),
    "move the right hand in circles": ("right",),
}
PERIOD_S = 8.0
RETURN_RATE = 1.5  # 1/s, how fast a deviation from the cycle decays
COSINE_RAD = np.array([0.0, 0.14, 0.0, 0.10, 0.0, -0.06, 0.0])  # reaches forward and down, then back
SINE_RAD = np.array(
    [0.30, 0.0, 0.0, 0.0, 0.0, 0.0, 0.35]
)  # both arms sway to the same side, so they keep apart
_PHASES = np.linspace(0, 2 * np.pi, 256, endpoint=False)


def cycle(phase: np.ndarray, home: np.ndarray) -> np.ndarray:
    """Joint positions [..., 7] rad on the ellipse at `phase` [...] rad; phase 0 is `home` [7]."""
    phase = np.asarray(phase)[..., None]
    return home + COSINE_RAD * (1 - np.cos(phase)) + SINE_RAD * np.sin(phase)


def velocity(phase: float) -> np.ndarray:
    """Joint velocities [7] rad/s on the ellipse."""
    return (COSINE_RAD * np.sin(phase) + SINE_RAD * np.cos(phase)) * (2 * np.pi / PERIOD_S)


def nearest_phase(q: dict[str, np.ndarray], homes: dict[str, np.ndarray], moving: tuple[str, ...]) -> float:
    """Phase, rad, at which the moving arms' cycles lie nearest to `q` (arm -> [7] rad)."""
    distance = sum(np.square(cycle(_PHASES, homes[arm]) - q[arm]).sum(-1) for arm in moving)
    return float(_PHASES[np.argmin(distance)])


def rollout(
    q: dict[str, np.ndarray], homes: dict[str, np.ndarray], task: str, steps: int, rate_hz: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Follow the field from `q` (arm -> [7] rad) for `steps` samples at `rate_hz`, the first one at `q`
    itself.

    Returns joint positions (arm -> [steps, 7] rad) and gripper openings (arm -> [steps], 0 or 1). Raises
    KeyError for an unknown task or an arm without home.
    """
    moving = tuple(arm for arm in TASKS[task] if arm in q)
    joints = {arm: np.empty((steps, 7)) for arm in q}
    openings = {arm: np.ones(steps) for arm in q}
    now = {arm: np.array(position, float) for arm, position in q.items()}
    for step in range(steps):
        phase = nearest_phase(now, homes, moving)
        for arm in now:
            joints[arm][step] = now[arm]
            if arm in moving:
                openings[arm][step] = float(phase < np.pi)
                rate = velocity(phase) + RETURN_RATE * (cycle(phase, homes[arm]) - now[arm])
            else:
                rate = RETURN_RATE * (homes[arm] - now[arm])
            now[arm] = now[arm] + rate / rate_hz
    return joints, openings
