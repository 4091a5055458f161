"""End-effector steps -> joint positions, by damped least squares along the chunk. Pure.

What comes out is a chunk of joints like any other: every check on joint commands still lies ahead of it. What
the steps leave free (the elbow of a seven-joint arm) moves as little as possible.
"""

from typing import Protocol

import numpy as np
import pinocchio as pin

from config.embodiment import Embodiment
from vipra_ros.execution.chunk import Chunk, Rejected

DAMPING = 0.02  # m and rad of error a rad of motion is worth: keeps the motion small near a singularity
ITERATIONS = 30
CLOSE_M, CLOSE_RAD = 2e-4, 1e-3  # a goal this near is met
OFF_M, OFF_RAD = 2e-3, 1e-2  # further than this it is out of reach

Tool = tuple[np.ndarray, np.ndarray, np.ndarray]


class Kinematics(Protocol):
    """Where the tools are. `vipra_ros.safety.collision.Geometry` is that of Franka arms."""

    arms: tuple[str, ...]

    def tools(self, q: np.ndarray) -> list[Tool]:
        """Of every arm at `q` [J] rad: tool centre point [3] m, its rotation [3, 3] and its Jacobian [6, n]
        (linear, then angular), all in the axes of the arm's base.
        """


def joint_chunk(
    seq: int,
    t0: float,
    rate_hz: float,
    actions: np.ndarray,
    embodiment: Embodiment,
    kinematics: Kinematics,
    q: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> Chunk:
    """The joints that do what `actions` [H, D] of end-effector steps ask for, from `q` [J] rad at `t0`.

    Step i is done at t0 + (i + 1) / rate_hz (`config.embodiment`). low, high: [J] rad, where joints may go.
    Raises Rejected: shape, non_finite; reach for a step that the arm cannot make.
    """
    actions = np.asarray(actions, dtype=float)
    if actions.ndim != 2 or actions.shape[1] != embodiment.action_dim:
        raise Rejected("shape", f"actions {actions.shape}: need [H, {embodiment.action_dim}]")
    if not np.isfinite(actions).all():
        raise Rejected("non_finite", "actions hold NaN or infinity")
    gripper = np.array([d.kind == "gripper" for d in embodiment.dimensions])
    steps = actions[:, ~gripper].reshape(len(actions), -1, 6)
    joints = joint_path(kinematics, q, steps, low, high)
    return Chunk(seq, t0 + 1.0 / rate_hz, rate_hz, joints, actions[:, gripper])


def joint_path(
    kinematics: Kinematics, q: np.ndarray, steps: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Joints [H, J] rad after each of `steps` [H, A, 6] (m, rad), made one after another from `q` [J].

    Raises Rejected (reach).
    """
    low, high = np.minimum(low, q), np.maximum(high, q)
    goals = [(p, r) for p, r, _ in kinematics.tools(q)]
    path = np.empty((len(steps), len(q)))
    for i, step in enumerate(steps):
        goals = [(p + d[:3], pin.exp3(d[3:]) @ r) for (p, r), d in zip(goals, step, strict=True)]
        path[i] = q = _solve(kinematics, q, goals, low, high, i)
    return path


def _solve(kinematics: Kinematics, q, goals, low, high, action: int) -> np.ndarray:
    for left in range(ITERATIONS, -1, -1):
        tools = kinematics.tools(q)
        errors = [_error(tool, goal) for tool, goal in zip(tools, goals, strict=True)]
        near = [np.linalg.norm(e[:3]) <= CLOSE_M and np.linalg.norm(e[3:]) <= CLOSE_RAD for e in errors]
        if all(near) or not left:
            break
        jacobians = [j for _, _, j in tools]
        move = _move(jacobians, errors)
        stuck = ((q <= low) & (move < 0)) | ((q >= high) & (move > 0))
        if stuck.any():  # what these joints cannot do, the others may
            ends = np.cumsum([j.shape[1] for j in jacobians])[:-1]
            free = np.split(~stuck, ends)
            move = _move([j * f for j, f in zip(jacobians, free, strict=True)], errors)
        q = np.clip(q + move, low, high)
    for arm, e in zip(kinematics.arms, errors, strict=True):
        off_m, off_rad = np.linalg.norm(e[:3]), np.linalg.norm(e[3:])
        if off_m > OFF_M or off_rad > OFF_RAD:
            raise Rejected(
                "reach",
                f"action {action}: the {arm} arm comes no closer than {off_m:.3f} m and {off_rad:.2f} rad",
            )
    return q


def _move(jacobians: list[np.ndarray], errors: list[np.ndarray]) -> np.ndarray:
    """Change of the joints [J] rad that takes away `errors` [6], damped."""
    damping = DAMPING**2 * np.eye(6)
    return np.concatenate(
        [j.T @ np.linalg.solve(j @ j.T + damping, e) for j, e in zip(jacobians, errors, strict=True)]
    )


def _error(tool: Tool, goal: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """What is missing to `goal`: [6] m and rad, in the base's axes."""
    return np.concatenate([goal[0] - tool[0], pin.log3(goal[1] @ tool[1].T)])
