"""Joint positions for a hand pose: differential inverse kinematics by `mink` on the workcell's own model."""

import mink
import numpy as np

from config.workcell import Workcell
from simulation.arm import Arm
from simulation.workcell import HOME, build, strip_visuals

ITERATIONS, STEP_S = 12, 0.1
TCP_M = 0.1034  # as simulation.lockstep


class HandIK:
    """Follows a path of hand poses: near the last joints, and near home where the task leaves a choice."""

    def __init__(self, workcell: Workcell):
        sim = build(workcell.model_copy(update={"props": ()}), None, Arm)
        strip_visuals(sim.scene)
        sim.start()
        self._model = sim.model
        self._slices = {name: arm.qpos_slice for name, arm in zip(workcell.arms, sim.robots, strict=True)}
        self._hands = {name: f"robot{i}_hand" for i, name in enumerate(workcell.arms)}
        self._posture = mink.PostureTask(self._model, cost=2e-3, gain=0.05)  # no sudden turns of the elbow
        self._limits = [mink.ConfigurationLimit(self._model)]

    def solve(self, arm: str, xyz: np.ndarray, rotation: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Joints [7] rad that bring the tool centre to `xyz` [3] m, `rotation` [3, 3], both in `world`, from
        `near`.

        What is out of reach is approached as far as the joint limits allow.
        """
        configuration = mink.Configuration(self._model)
        q = configuration.q.copy()
        q[self._slices[arm]] = HOME
        self._posture.set_target(q)
        q[self._slices[arm]] = near
        configuration.update(q)
        hand = mink.FrameTask(
            self._hands[arm], "body", position_cost=1.0, orientation_cost=0.3, lm_damping=1e-4
        )
        flange = np.asarray(xyz) - rotation[:, 2] * TCP_M
        hand.set_target(mink.SE3.from_rotation_and_translation(mink.SO3.from_matrix(rotation), flange))
        for _ in range(ITERATIONS):
            velocity = mink.solve_ik(
                configuration, [hand, self._posture], STEP_S, "daqp", damping=1e-6, limits=self._limits
            )
            configuration.integrate_inplace(velocity, STEP_S)
            if np.linalg.norm(hand.compute_error(configuration)) < 1e-4:
                break
        return configuration.q[self._slices[arm]].copy()
