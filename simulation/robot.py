"""One simulated arm that behaves as a real one does when something goes wrong.

franky-sim's server is kinder than a robot: it raises no reflexes, enforces no limits and has no communication
watchdog. `ArmServer` adds them on top of the same wire protocol (libfranka FCI v10): the rule of 20 lost
packets, reflexes on position, velocity and external torque, the user stop, error flags, recovery and injected
faults. After any abort the arm brakes at a constant rate and holds; it neither coasts nor jumps.
"""

import contextlib
import random
import select
import socket
import struct
import time
from dataclasses import dataclass, field

import mujoco
import numpy as np
from franky_sim.franka_robot_protocol import (
    AutomaticErrorRecoveryCommand,
    AutomaticErrorRecoveryStatus,
    MoveCommand,
    MoveCommandControllerMode,
    MoveStatus,
    RobotCommand,
    RobotMode,
    SetCollisionBehaviorCommand,
    StateControllerMode,
    StateMotionGeneratorMode,
)
from franky_sim.franka_robot_server import FrankaRobotServer
from franky_sim.franka_server import BaseCommand

from simulation.arm import TICK, Arm
from simulation.check import FR3

# Order of research_interface::robot::Error (libfranka, research_interface/robot/error.h): index on the wire.
ERRORS = (
    "joint_position_limits_violation",
    "cartesian_position_limits_violation",
    "self_collision_avoidance_violation",
    "joint_velocity_violation",
    "cartesian_velocity_violation",
    "force_control_safety_violation",
    "joint_reflex",
    "cartesian_reflex",
    "max_goal_pose_deviation_violation",
    "max_path_pose_deviation_violation",
    "cartesian_velocity_profile_safety_violation",
    "joint_position_motion_generator_start_pose_invalid",
    "joint_motion_generator_position_limits_violation",
    "joint_motion_generator_velocity_limits_violation",
    "joint_motion_generator_velocity_discontinuity",
    "joint_motion_generator_acceleration_discontinuity",
    "cartesian_position_motion_generator_start_pose_invalid",
    "cartesian_motion_generator_elbow_limit_violation",
    "cartesian_motion_generator_velocity_limits_violation",
    "cartesian_motion_generator_velocity_discontinuity",
    "cartesian_motion_generator_acceleration_discontinuity",
    "cartesian_motion_generator_elbow_sign_inconsistent",
    "cartesian_motion_generator_start_elbow_invalid",
    "force_controller_desired_force_tolerance_violation",
    "start_elbow_sign_inconsistent",
    "communication_constraints_violation",
    "power_limit_violation",
    "cartesian_motion_generator_joint_position_limits_violation",
    "cartesian_motion_generator_joint_velocity_limits_violation",
    "cartesian_motion_generator_joint_velocity_discontinuity",
    "cartesian_motion_generator_joint_acceleration_discontinuity",
    "cartesian_position_motion_generator_invalid_frame",
    "controller_torque_discontinuity",
    "joint_p2p_insufficient_torque_for_planning",
    "tau_j_range_violation",
    "instability_detected",
    "joint_move_in_wrong_direction",
    "cartesian_spline_motion_generator_violation",
    "joint_via_motion_generator_planning_joint_limit_violation",
    "base_acceleration_initialization_timeout",
    "base_acceleration_invalid_reading",
)

Q_MIN, Q_MAX, DQ_MAX = FR3.q_min, FR3.q_max, FR3.dq  # what the arm itself enforces
LOST_PACKETS = 20  # consecutive; libfranka documentation, "communication_constraints_violation"
# Of joint_reflex and cartesian_reflex, until set_collision_behavior says otherwise (libfranka's examples).
TORQUE_THRESHOLD = np.array([20.0, 20.0, 18.0, 18.0, 16.0, 14.0, 12.0])  # Nm
FORCE_THRESHOLD = np.array([20.0, 20.0, 20.0, 25.0, 25.0, 25.0])  # N, Nm
_IDLE_MODES = (StateMotionGeneratorMode.kIdle, StateControllerMode.kOther)
_STATE_TAIL = struct.Struct("<BB41s41sBf")  # modes, errors, reflex reason, robot mode, success rate
RECOVERY_TICKS = 50
BRAKE = 7.0  # rad/s2, deceleration after an abort: inside the FR3's 10 rad/s2
BRAKE_ONSET = 0.01  # s over which the deceleration builds up
_TAU_EXT_SMOOTHING = 0.05  # share of the newest sample, about 20 ms, as in tau_ext_hat_filtered


@dataclass
class Faults:
    """What has been injected into one arm and stays until cleared."""

    silent: bool = False
    freeze_state: bool = False
    user_stop: bool = False
    loss: float = 0.0  # share of packets dropped, each way
    chance: random.Random = field(default_factory=lambda: random.Random(0))


class _Move(MoveCommand):
    """Refused while the arm is in a reflex or user-stopped, as the robot does."""

    def handle(self, server):
        if server.mode not in (RobotMode.kIdle, RobotMode.kMove):
            self.reply(MoveStatus.kCommandNotPossibleRejected)
        else:
            super().handle(server)


class _Recovery(AutomaticErrorRecoveryCommand):
    """Takes its time, as on the robot: clients look at the state right after the reply."""

    def handle(self, server):
        status = server.recover()
        if status == AutomaticErrorRecoveryStatus.kSuccess:
            server.recovery = (self, RECOVERY_TICKS)
        else:
            self.reply(status)


class _CollisionBehavior(SetCollisionBehaviorCommand):
    def handle(self, server):
        server.torque_threshold = np.array(self.upper_torque_thresholds_nominal)
        server.force_threshold = np.array(self.upper_force_thresholds_nominal)
        super().handle(server)


class ArmServer(FrankaRobotServer):
    """FCI of one arm: franky-sim's, plus what a robot does by itself.

    watchdog: abort a motion after LOST_PACKETS consecutive missing commands, and raise reflexes.
    """

    def __init__(self, robot: Arm, hostname_candidates, watchdog: bool = True):
        super().__init__(robot, hostname_candidates)
        self.arm, self.watchdog = robot, watchdog
        self.faults = Faults()
        self.torque_threshold, self.force_threshold = TORQUE_THRESHOLD, FORCE_THRESHOLD
        self.tau_ext = np.zeros(7)  # Nm, filtered, of contacts with the world
        self.wrench_ext = np.zeros(6)  # N, Nm at the TCP in base axes
        self.reflex: str | None = None  # error that aborted the last motion, until recovered
        self.touched: list[str] = []  # pairs of bodies in contact at the last collision reflex
        self.aborts = 0
        self.recovery: tuple[_Recovery, int] | None = None  # to be answered in that many ticks
        self._errors = self._last_errors = bytes(len(ERRORS))  # now, and of the last motion until the next
        self._lost, self._last_packet, self._ticks = 0, 0.0, 0
        self._brake: tuple[np.ndarray, np.ndarray, float] | None = None  # target q, dq and s since the abort
        self._hold: np.ndarray | None = None
        self._frozen: bytes | None = None
        self._modes = _IDLE_MODES  # motion generator and controller, on the wire
        self._success_rate = 0.0
        commands = self._FrankaServer__command_class_map
        commands[RobotCommand.kMove] = _Move
        commands[RobotCommand.kAutomaticErrorRecovery] = _Recovery
        commands[RobotCommand.kSetCollisionBehavior] = _CollisionBehavior

    @property
    def mode(self) -> RobotMode:
        if self.faults.user_stop:
            return RobotMode.kUserStopped
        if self.reflex is not None:
            return RobotMode.kReflex
        if self.recovery is not None and self.recovery[1] > RECOVERY_TICKS // 5:
            return RobotMode.kAutomaticErrorRecovery
        return RobotMode.kMove if self.current_motion_id > 0 else RobotMode.kIdle

    def owed(self) -> int:
        """Commands in a row that the client of a running motion could have sent and has not."""
        injected = self.faults.silent or self.faults.freeze_state or self.faults.loss > 0.0
        return self._lost if self.current_motion_id > 0 and not injected else 0

    def await_command(self, seconds: float) -> None:
        """Return once a command has come, or after `seconds` of wall time."""
        if self.udp_connected:  # a client that left in the middle of a motion owes its commands for ever
            select.select([self._FrankaServer__udp_socket], [], [], seconds)

    def moving(self) -> bool:
        """Under a client's control or still braking."""
        return self.current_motion_id > 0 or self._brake is not None

    def torque_controlled(self) -> bool:
        """A client commands torques."""
        return self._modes[1] == StateControllerMode.kExternalController

    def hold_here(self) -> None:
        """Hold the present joint positions."""
        self._brake = None
        self._hold = self.arm.joints()[0].copy()
        self.tau_ext, self.wrench_ext = np.zeros(7), np.zeros(6)

    # --- motions --------------------------------------------------------------------------------------------

    def start_motion(self, controller_mode, motion_generator_mode, motion_id):
        super().start_motion(controller_mode, motion_generator_mode, motion_id)
        if controller_mode == MoveCommandControllerMode.kExternalController:
            self._modes = (StateMotionGeneratorMode.kNone, StateControllerMode.kExternalController)
        else:  # the generators of a Move command count from 0, those of a state from 1
            self._modes = (motion_generator_mode + 1, controller_mode)
        self._success_rate, self._last_errors = 1.0, bytes(len(ERRORS))
        self._lost, self._last_packet = 0, time.monotonic()
        self._brake = self._hold = None
        self.arm.reset_target()

    def stop_motion(self, send_preemption_signal: bool = True):
        moving = self.current_motion_id > 0
        super().stop_motion(send_preemption_signal)
        self._modes = _IDLE_MODES
        if moving:
            self._start_brake()

    def trip(self, error: str, status: MoveStatus = MoveStatus.kReflexAborted) -> None:
        """Abort the running motion, if any, as the robot does on `error` (of ERRORS): brake and hold."""
        self._raise(error)
        self._abort(status)

    def _raise(self, error: str) -> None:
        if self.reflex is None:
            self.reflex = error
            self._errors = self._last_errors = bytes(name == error for name in ERRORS)

    def recover(self) -> AutomaticErrorRecoveryStatus:
        """Clear a reflex. Refused while user-stopped, or outside the joint limits (needs guiding by hand)."""
        if self.faults.user_stop:
            return AutomaticErrorRecoveryStatus.kCommandNotPossibleRejected
        q, _ = self.arm.joints()
        if ((q < Q_MIN - 0.01) | (q > Q_MAX + 0.01)).any():
            return AutomaticErrorRecoveryStatus.kManualErrorRecoveryRequiredRejected
        self.reflex, self._errors = None, bytes(len(ERRORS))
        return AutomaticErrorRecoveryStatus.kSuccess

    def stop_by_user(self) -> None:
        """The user stop is pressed: abort, brake, hold until released with `faults = Faults()`."""
        self.faults.user_stop = True
        self._abort(MoveStatus.kEmergencyAborted)

    def _abort(self, status: MoveStatus) -> None:
        motion_id = self.current_motion_id
        if not motion_id:
            return
        super().stop_motion(send_preemption_signal=False)
        self.reset_current_motion_id()
        self._modes, self._success_rate = _IDLE_MODES, 0.0
        self._start_brake()
        if self._tcp_socket is not None:
            BaseCommand.send_response(self._tcp_socket, RobotCommand.kMove, motion_id, status)
        self.aborts += 1

    def _start_brake(self) -> None:
        q, dq = self.arm.joints()
        self._brake = (q.copy(), dq.copy(), 0.0)

    def _reset_state(self):
        """A client has come or gone. One that leaves in mid-motion has broken the communication rule."""
        broken = self.arm.data is not None and self.current_motion_id > 0
        super()._reset_state()
        self._modes, self.recovery = _IDLE_MODES, None
        if broken:
            self._start_brake()
            self.aborts += 1
            if self.watchdog:
                self._raise("communication_constraints_violation")

    # --- the state on the wire ------------------------------------------------------------------------------

    def _get_state_bytes(self) -> bytes:
        if self._frozen is None or not self.faults.freeze_state:
            self._frozen = self.arm.numbers(self.tau_ext, self.wrench_ext, self.current_motion_id == 0)
        generator, controller = self._modes
        return self._frozen + _STATE_TAIL.pack(
            generator, controller, self._errors, self._last_errors, self.mode, self._success_rate
        )

    def send_state(self):
        lost = self.faults.loss and self.faults.chance.random() < self.faults.loss
        if self.faults.silent or lost:
            if self.udp_connected:
                self._FrankaServer__message_id += 1  # the robot's clock runs on
            self.gripper_server.send_state()
        else:
            super().send_state()

    # --- one tick -------------------------------------------------------------------------------------------

    def process_commands(self):
        self._ticks += 1
        if self.tcp_connected and self._ticks % 50 == 0:
            self._refuse_second_client()
        super().process_commands()
        if self.recovery is not None:
            command, left = self.recovery
            self.recovery = (command, left - 1) if left > 1 else None
            if self.recovery is None:
                command.reply(AutomaticErrorRecoveryStatus.kSuccess)

    def _refuse_second_client(self) -> None:
        """An arm has one client; another one is turned away rather than kept waiting."""
        with contextlib.suppress(OSError):
            if self._tcp_socket.recv(1, socket.MSG_PEEK) == b"":
                return  # the first one has just left: the next tick takes the newcomer
        with contextlib.suppress(BlockingIOError):
            self._FrankaServer__server_socket.accept()[0].close()

    def _process_udp_commands(self):
        self._got_packet = False
        super()._process_udp_commands()
        if self.current_motion_id > 0:
            self._watch()

    def _handle_udp_command(self, command_data: bytes):
        if self.faults.loss and self.faults.chance.random() < self.faults.loss:
            return
        (message_id,) = struct.unpack_from("<Q", command_data)
        self._got_packet |= message_id > 0
        super()._handle_udp_command(command_data)

    def _watch(self) -> None:
        """The robot's own rules, each tick of a motion."""
        now = time.monotonic()
        self._success_rate += 0.01 * (self._got_packet - self._success_rate)  # of the last 100 ms or so
        if self._got_packet:
            self._lost, self._last_packet = 0, now
            return
        self._lost += 1
        # Ticks come faster than 1 kHz while the simulator catches up: the client must have had its time.
        if self.watchdog and self._lost >= LOST_PACKETS and now - self._last_packet >= LOST_PACKETS * TICK:
            self.trip("communication_constraints_violation")

    def _post_process_commands(self):
        if self.current_motion_id > 0:
            super()._post_process_commands()
        elif self._brake is not None:
            self._continue_brake()
        else:
            if self._hold is None:
                self._hold = self.arm.joints()[0].copy()
            self.arm.follow(self._hold, np.zeros(7))

    def _continue_brake(self) -> None:
        """Constant deceleration of every joint, built up over BRAKE_ONSET; then hold."""
        q, dq, elapsed = self._brake
        step = BRAKE * min(1.0, (elapsed + TICK) / BRAKE_ONSET) * TICK
        slower = np.sign(dq) * np.maximum(np.abs(dq) - step, 0.0)
        q = q + 0.5 * (dq + slower) * TICK
        self._brake = (q, slower, elapsed + TICK)
        self.arm.follow(q, slower)
        if not slower.any():
            self._brake, self._hold = None, q

    def after_step(self, model, data) -> None:
        """External torques and reflexes, from the step just made."""
        self._sense_contacts(model, data)
        if not self.watchdog or self.reflex is not None:
            return
        q, dq = self.arm.joints()
        if (np.abs(dq) > DQ_MAX).any():
            self.trip("joint_velocity_violation")
        elif ((q < Q_MIN) | (q > Q_MAX)).any():
            if self.current_motion_id > 0:
                self.trip("joint_position_limits_violation")
        elif (np.abs(self.tau_ext) > self.torque_threshold).any():
            self.touched = _touching(model, data)
            self.trip("joint_reflex")
        elif (np.abs(self.wrench_ext) > self.force_threshold).any():
            self.touched = _touching(model, data)
            self.trip("cartesian_reflex")

    def _sense_contacts(self, model, data) -> None:
        """tau_ext: what contacts put on the joints, low-passed like the robot's estimate."""
        tau = np.zeros(model.nv)
        if data.ncon:
            force = data.efc_force.copy()
            force[data.efc_type < int(mujoco.mjtConstraint.mjCNSTR_CONTACT_FRICTIONLESS)] = 0.0
            if force.any():
                mujoco.mj_mulJacTVec(model, data, tau, force)
        newest = tau[self.arm.dof_slice]
        self.tau_ext += _TAU_EXT_SMOOTHING * (newest - self.tau_ext)
        if np.abs(self.tau_ext).max() > 0.5:
            jacobian = np.zeros((6, model.nv))
            hand = self.arm.hand_body
            mujoco.mj_jacBody(model, data, jacobian[:3], jacobian[3:], hand)
            columns = jacobian[:, self.arm.dof_slice]
            # Least squares with a little damping: near a singularity the force is not observable.
            wrench = np.linalg.solve(columns @ columns.T + 1e-3 * np.eye(6), columns @ self.tau_ext)
            turn = data.xmat[self.arm.base_body].reshape(3, 3)
            self.wrench_ext = np.concatenate([turn.T @ wrench[:3], turn.T @ wrench[3:]])
        else:
            self.wrench_ext = np.zeros(6)


def _touching(model, data) -> list[str]:
    """Pairs of bodies in contact with an arm, as "a - b"."""
    pairs = set()
    for contact in data.contact[: data.ncon]:
        names = [model.body(model.geom_bodyid[geom]).name for geom in contact.geom]
        if any(name.startswith("robot") for name in names):
            pairs.add(" - ".join(sorted(names)))
    return sorted(pairs)
