"""One simulated FR3 as a body: joint control, and the numbers its state packets carry.

Same interface as franky-sim's robot, leaner: it runs a thousand times a second for each arm beside everything
else on the machine, and franky-sim spends most of a tick on quantities nobody reads.
"""

import itertools

import numpy as np
from franky_sim.base_simulator import InnerRobotState
from franky_sim.constants import FRANKA_HAND_VELOCITY_LIMIT
from franky_sim.franka_robot_state import FrankaRobotState
from franky_sim.mujoco_simulator import FrankaMujocoRobot

TICK = 0.001  # s, one packet each way
BRIDGED_PACKETS = 20  # consecutive missing commands that the arm extrapolates over

# Floats of research_interface::robot::RobotState in wire order (libfranka, robot/rbk_types.h, version 10).
_FIELDS = dict(
    **dict(O_T_EE=16, O_T_EE_d=16, F_T_EE=16, EE_T_K=16, F_T_NE=16, NE_T_EE=16, m_ee=1, I_ee=9, F_x_Cee=3),
    **dict(m_load=1, I_load=9, F_x_Cload=3, elbow=2, elbow_d=2, tau_J=7, tau_J_d=7, dtau_J=7, q=7, q_d=7),
    **dict(dq=7, dq_d=7, ddq_d=7, joint_contact=7, cartesian_contact=6, joint_collision=7),
    **dict(cartesian_collision=6, tau_ext_hat_filtered=7, O_F_ext_hat_K=6, K_F_ext_hat_K=6, O_dP_EE_d=6),
    **dict(O_ddP_O=3, elbow_c=2, delbow_c=2, ddelbow_c=2, O_T_EE_c=16, O_dP_EE_c=6, O_ddP_EE_c=6, theta=7),
    **dict(dtheta=7, accelerometer_top=18, accelerometer_bottom=18),
)
_ENDS = dict(zip(_FIELDS, itertools.accumulate(_FIELDS.values()), strict=True))
_SLICES = {name: slice(end - _FIELDS[name], end) for name, end in _ENDS.items()}
_CONSTANT = (
    "F_T_EE",
    "EE_T_K",
    "F_T_NE",
    "NE_T_EE",
    "m_ee",
    "I_ee",
    "F_x_Cee",
    "m_load",
    "I_load",
    "F_x_Cload",
)


class Arm(FrankaMujocoRobot):
    """An FR3 whose own position controller feeds the target's velocity forward.

    franky-sim's damps against standstill, which drags 0.1 s behind a moving target and slams a moving arm to
    a halt.
    """

    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.commanded_tau = np.zeros(7)  # Nm without gravity, last tick
        self.applied_tau = np.zeros(7)  # Nm with gravity, within the motors' limits
        self._applied_before = np.zeros(7)
        self._q_d, self._dq_d, self._ddq_d = np.zeros(7), np.zeros(7), np.zeros(7)
        self._missing = 0  # packets since the last command
        self._commanded_q, self._velocity = np.zeros(7), np.zeros(7)  # of that command, rad and rad/s
        self._following = False  # the present target is an explicit one, with its velocity
        self._streaming = False  # _q_d is last tick's target
        self._numbers = np.zeros(sum(_FIELDS.values()), "<f4")
        self._constants_known = False
        self._low, self._high = np.array(self.torque_limit_low), np.array(self.torque_limit_high)

    def _attach_to_scene(self, model, data, prefix: str) -> None:
        super()._attach_to_scene(model, data, prefix)
        self.base_body, self.hand_body = model.body(f"{prefix}base").id, model.body(f"{prefix}hand").id
        # The seven joints of an arm are a chain, so their numbers are neighbours.
        first_q, first_dof = self._qpos_addrs[0], self._dof_addrs[0]
        self.qpos_slice, self.dof_slice = slice(first_q, first_q + 7), slice(first_dof, first_dof + 7)
        self._q_d = np.array(self.initial_q)

    # --- control -----------------------------------------------------------------------------------------

    def torque_control(self, torques, has_new_command: bool = True) -> None:
        """Joint torques on top of gravity compensation, Nm [7]."""
        self.commanded_tau = np.clip(torques, self._low, self._high)
        super().torque_control(torques, has_new_command)

    def _torque_control(self, torques: np.ndarray) -> None:
        self.applied_tau = self._applied_torques = np.clip(torques, self._low, self._high)
        self.data.qfrc_applied[self.dof_slice] = self.applied_tau

    def follow(self, q: np.ndarray, dq: np.ndarray) -> None:
        """Track a target that moves with dq: rad, rad/s."""
        self._ddq_d = (dq - self._dq_d) / TICK if self._streaming else np.zeros(7)
        self._dq_d, self._following = dq, True
        self.joint_position_control(q)
        self._following = False

    def reset_target(self) -> None:
        """Control starts anew: the last target says nothing about the next one's velocity."""
        self._streaming = False
        self._commanded_q, self._velocity, self._missing = self.joints()[0].copy(), np.zeros(7), 0

    def joint_position_control(self, target_q, has_new_command: bool = True) -> None:
        """Track the client's 1 kHz stream; a missing packet is bridged with the last velocity."""
        if self._following:
            pass
        elif has_new_command:
            # Over a gap the velocity is the mean, not the jump divided by one cycle.
            self._velocity = (target_q - self._commanded_q) / ((self._missing + 1) * TICK)
            self._commanded_q, self._missing = target_q, 0
        else:
            self._missing += 1
            if self._streaming and self._missing <= BRIDGED_PACKETS:
                target_q = self._q_d + TICK * self._dq_d
        super().joint_position_control(target_q, has_new_command)

    def _joint_position_control(self, target_q: np.ndarray) -> None:
        if not self._following:
            bridged = self._streaming and self._missing <= BRIDGED_PACKETS
            dq = self._velocity if bridged else np.zeros(7)
            self._ddq_d = (dq - self._dq_d) / TICK if self._streaming else np.zeros(7)
            self._dq_d = dq
        self._q_d, self._streaming = target_q, True
        q, dq = self.joints()
        self.torque_control(self.kp * (target_q - q) + self.kv * (self._dq_d - dq))

    def teleport(self) -> None:
        """Back to the initial pose with an open hand, at rest, without a motion."""
        self.data.qpos[self.qpos_slice] = self.initial_q
        self.data.qpos[self._finger_qpos_addrs] = self._initial_hand_width / 2
        self.data.qvel[self.dof_slice] = 0.0
        self.data.qvel[self._finger_dof_addrs] = 0.0
        self.set_hand_goal(self._initial_hand_width, FRANKA_HAND_VELOCITY_LIMIT, 70.0)
        self.reset_target()

    # --- state -------------------------------------------------------------------------------------------

    def joints(self) -> tuple[np.ndarray, np.ndarray]:
        """Measured positions and velocities, rad and rad/s, each [7], views of the simulation's arrays."""
        return self.data.qpos[self.qpos_slice], self.data.qvel[self.dof_slice]

    def _get_state(self) -> InnerRobotState:
        if self.data is None:
            return super()._get_state()
        q, dq = self.joints()
        return InnerRobotState(tuple(q.tolist()), tuple(dq.tolist()), tuple(self.applied_tau.tolist()))

    def set_load(self, *arguments) -> None:
        super().set_load(*arguments)
        self._constants_known = False

    def set_NE_T_EE(self, *arguments) -> None:
        super().set_NE_T_EE(*arguments)
        self._constants_known = False

    def set_EE_T_K(self, *arguments) -> None:
        super().set_EE_T_K(*arguments)
        self._constants_known = False

    def _post_step(self) -> None:
        if not self._constants_known:
            super()._post_step()  # franky-sim's way, once, for the frames and masses that rarely change
            state = super().state
            for name in _CONSTANT:
                self._numbers[_SLICES[name]] = np.ravel(getattr(state, name))[: _FIELDS[name]]
            self._constants_known = True

    @property
    def state(self) -> FrankaRobotState:
        """What franky-sim's server asks for when a motion starts or ends."""
        q, dq = self.joints()
        return FrankaRobotState(
            q=tuple(q.tolist()),
            dq=tuple(dq.tolist()),
            q_d=tuple(self._q_d.tolist()),
            O_T_EE=self.to_franka_pose(self.kinematics(q)),
        )

    def numbers(self, tau_ext: np.ndarray, wrench_ext: np.ndarray, idle: bool) -> bytes:
        """The float part of a state packet. tau_ext [7] Nm, wrench_ext [6] N and Nm.

        Under torque control the desired joints are the measured ones, as on the robot; `idle` is its own
        hold.
        """
        q, dq = self.joints()
        positioned = self._streaming
        q_d, dq_d, ddq_d = (self._q_d, self._dq_d, self._ddq_d) if positioned else (q, dq, np.zeros(7))
        pose = self.kinematics(q).homogeneous.ravel(order="F")
        pose_d, twist_d = pose, np.zeros(6)
        if positioned and not idle:
            pose_d = self.kinematics(q_d).homogeneous.ravel(order="F")
            twist_d = self.d_kinematics(q_d, dq_d)
        tau_rate = (self.applied_tau - self._applied_before) / TICK
        self._applied_before = self.applied_tau
        for name, value in (
            ("O_T_EE", pose),
            ("O_T_EE_d", pose_d),
            ("O_T_EE_c", pose_d),
            ("O_dP_EE_d", twist_d),
            ("O_dP_EE_c", twist_d),
            ("elbow", _elbow(q)),
            ("elbow_d", _elbow(q_d)),
            ("elbow_c", _elbow(q_d)),
            ("tau_J", self.applied_tau),
            ("tau_J_d", self.commanded_tau),
            ("dtau_J", tau_rate),
            ("q", q),
            ("q_d", q_d),
            ("dq", dq),
            ("dq_d", dq_d),
            ("ddq_d", ddq_d),
            ("theta", q),
            ("dtheta", dq),
            ("tau_ext_hat_filtered", tau_ext),
            ("O_F_ext_hat_K", wrench_ext),
        ):
            self._numbers[_SLICES[name]] = value
        return self._numbers.tobytes()


def _elbow(q: np.ndarray) -> tuple[float, float]:
    return float(q[2]), 1.0 if q[3] > 0.0 else -1.0
