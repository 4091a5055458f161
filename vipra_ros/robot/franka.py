"""One Franka arm, real or simulated, streamed to through franky: torque control with a dead-man.

The arm follows `JointImpedanceTrackingMotion`s, which hold their last target for ever. Each is therefore
armed with a reaction that stops the arm when the motion gets older than `deadman_timeout_s`, and is replaced
by a fresh one every `deadman_refresh_s`. The reaction runs in franky's own thread, so it also works while
Python stands still. libfranka limits neither target nor velocity in this mode: what is passed to `set_target`
must be safe already.
"""

import contextlib
import threading
import time

import franky
import numpy as np

from config.robot import Arm, Control
from config.safety import Safety
from vipra_ros.robot.arm import ArmFault, ArmState

_POLL_S = 0.01  # period of reading the state of an arm that is not under control
_TELL_S = 0.04  # in which that state tells of a reflex; well below the dead-man of the other arm


class FrankaArm:
    """Connection to one arm (`robot.arm.Arm`). `connect`, `start`, then `set_target` at a steady rate;
    `shutdown` at the end.

    `read` and `set_target` never block; the other methods do, for bounded times, and must come from one
    thread at a time. Everything that goes wrong is raised as ArmFault.
    """

    def __init__(self, name: str, arm: Arm, control: Control, safety: Safety, realtime: bool):
        self.name, self.hostname = name, arm.hostname
        self._control, self._safety, self._realtime = control, safety, realtime
        self._lower = np.array(safety.joints.position_min_rad)
        self._upper = np.array(safety.joints.position_max_rad)
        self._stiffness = np.array(control.stiffness)
        self._robot: franky.Robot | None = None
        self._motion: franky.JointImpedanceTrackingMotion | None = None
        self._armed_at = -np.inf
        self._streaming = False
        self._state: ArmState | None = None
        self._link_error = ""
        self._closing = threading.Event()
        self._poller = threading.Thread(target=self._poll, name=f"{name}-state", daemon=True)

    @property
    def streaming(self) -> bool:
        """Whether `set_target` may be called: started, and neither released nor found faulty since."""
        return self._streaming

    def connect(self, timeout_s: float = 30.0) -> None:
        """Connect, retrying until `timeout_s`; set limits, thresholds and load; leave the arm idle."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._open()
                break
            except ArmFault as fault:
                if fault.code != "connection" or time.monotonic() > deadline or self._closing.wait(0.25):
                    raise
        if not self._poller.is_alive():
            self._poller.start()

    def _open(self) -> None:
        realtime = franky.RealtimeConfig.Enforce if self._realtime else franky.RealtimeConfig.Ignore
        joints, contact = self._safety.joints, self._safety.contact
        self._robot = None  # the arm accepts one connection at a time
        with self._typed("connect"):
            robot = franky.Robot(self.hostname, realtime_config=realtime)
            # The wheel's default acceleration and jerk limits are Panda's, above FR3's.
            for limit, value in (
                (robot.joint_acceleration_limit, joints.acceleration_rad_s2),
                (robot.joint_jerk_limit, joints.jerk_rad_s3),
            ):
                limit.set(np.minimum(value, limit.max))
            robot.set_collision_behavior(
                contact.contact_torque_nm,
                contact.collision_torque_nm,
                contact.contact_force,
                contact.collision_force,
            )
            robot.set_load(
                contact.load_mass_kg, contact.load_centre_m, np.diag(contact.load_inertia_kg_m2).reshape(-1)
            )
            self._state = _convert(robot.state)
        self._link_error = ""
        self._robot = robot

    def start(self) -> np.ndarray:
        """Take control and hold where the arm is. Returns that position [7]."""
        robot = self._connected()
        state = self._now(robot)
        if state.fault:
            raise ArmFault(state.fault[0], f"{self.name}: {state.fault[1]}; clear it and recover")
        with self._typed("start"):
            self._motion = self._fresh(state.q, np.zeros(7))
            robot.move(self._motion, asynchronous=True)
        # The dead-man runs from here on: the caller must stream at once. A second motion buys the hand-over
        # time.
        if not _wait(lambda: robot.is_in_control, 1.0):
            self._raise_stored("start")
            raise ArmFault("control", f"{self.name}: the arm did not accept torque control within 1 s")
        self._armed_at = -np.inf
        self._streaming = True
        return state.q

    def set_target(self, q: np.ndarray, dq: np.ndarray, now: float, fresh: bool = False) -> None:
        """Stream target `q` [7] rad, `dq` [7] rad/s at executor time `now`; `fresh` re-arms the dead-man at
        once.

        Raises ArmFault when the arm has left control (dead-man, reflex, lost connection).
        """
        if not self._robot.is_in_control:
            self._streaming = False
            try:
                self._raise_stored("stream")
            except ArmFault as fault:
                # A motion that begins in the moment of a reflex is refused, which hides the reflex.
                if fault.code != "arm" or not _wait(lambda: self._state.fault is not None, _TELL_S):
                    raise
                code, reason = self._state.fault
                raise ArmFault(code, f"{self.name}: stream: {reason}") from fault
            raise ArmFault("deadman", f"{self.name}: stopped by the dead-man, no fresh command in time")
        if fresh or not 0.0 <= now - self._armed_at < self._control.deadman_refresh_s:
            with self._typed("stream"):
                motion = self._fresh(q, dq)
                self._robot.move(motion, asynchronous=True)
            self._motion, self._armed_at = motion, now
        else:
            self._motion.set_reference(franky.JointReference(q=q, dq=dq))

    def read(self) -> ArmState:
        """The newest state, without blocking; of an arm that is not streamed to, some 10 ms old."""
        if self._streaming and self._robot.is_in_control:
            self._state = _convert(self._robot.state)
        return self._state

    @property
    def link_error(self) -> str:
        """Why the connection is down, "" while it is up."""
        return self._link_error

    def abort(self) -> None:
        """Stop streaming at once; if the arm is still under control, have the robot itself brake and hold.

        For an arm whose state cannot be trusted: every torque motion, the dead-man's too, would act on that
        state.
        """
        self._streaming = False
        robot = self._robot

        def stop():
            with contextlib.suppress(ArmFault), self._typed("abort"):
                if robot.is_in_control:
                    robot.stop()

        threading.Thread(target=stop, name=f"{self.name}-abort", daemon=True).start()

    def stop(self, timeout_s: float = 1.5) -> None:
        """Damp the arm to rest and give up control. Raises ArmFault if that did not end in time."""
        self._streaming = False
        robot = self._robot
        if robot is None or not robot.is_in_control:
            return
        with self._typed("stop"):
            robot.move(franky.TorqueStopMotion(), asynchronous=True)
            if not robot.join_motion(timeout_s):
                raise ArmFault("stop", f"{self.name}: still under control {timeout_s:g} s after the stop")

    def recover(self, timeout_s: float = 5.0) -> None:
        """Clear the arm's errors (and reconnect if the link broke). Raises ArmFault if it stays at fault.

        A pressed user stop is never worked around: release it first.
        """
        self._streaming = False
        robot = self._robot
        if robot is not None:
            with contextlib.suppress(ArmFault), self._typed("recover"):
                robot.join_motion(1.0)
        if robot is None or self._link_error or robot.is_in_control:
            robot = None
            self.connect(timeout_s)
            robot = self._robot
        # The first states after a change may still be those from before it.
        if not _wait(lambda: self._now(robot).mode != "UserStopped", 0.2):
            raise ArmFault("user_stop", f"{self.name}: user stop is pressed; release it, then recover")
        with self._typed("recover"):
            if self._now(robot).fault:
                robot.recover_from_errors()
        if not _wait(lambda: self._now(robot).fault is None, 1.0):
            code, reason = self._now(robot).fault or ("reflex", "unknown error")
            raise ArmFault(code, f"{self.name}: not recovered: {reason}")

    def shutdown(self) -> None:
        """Stop and drop the connection; raises nothing. Callable at any time, also when the arm is gone."""
        self._closing.set()
        with contextlib.suppress(ArmFault):
            self.stop()
        if self._poller.is_alive():
            self._poller.join(1.5)
        self._robot = None

    def _fresh(self, q: np.ndarray, dq: np.ndarray) -> franky.JointImpedanceTrackingMotion:
        motion = franky.JointImpedanceTrackingMotion(
            stiffness=self._stiffness,  # damping unset: critical
            max_delta_tau=self._control.max_delta_tau_nm,
            lower_joint_limits=self._lower,
            upper_joint_limits=self._upper,
        )
        motion.set_reference(franky.JointReference(q=q, dq=dq))
        too_old = self._control.deadman_timeout_s < franky.Measure.REL_TIME
        motion.add_reaction(franky.Reaction(too_old, franky.TorqueStopMotion()))
        return motion

    def _connected(self) -> franky.Robot:
        if self._robot is None or self._link_error:
            raise ArmFault(
                "connection",
                f"{self.name}: not connected to {self.hostname}: {self._link_error or 'never was'}",
            )
        return self._robot

    def _now(self, robot: franky.Robot) -> ArmState:
        """The state of an arm that is not under control, read from the wire; blocks, up to a second if it is
        silent.
        """
        with self._typed("read"):
            self._state = _convert(robot.state)
        return self._state

    def _raise_stored(self, doing: str) -> None:
        """Raise what ended the last motion, if anything did."""
        with self._typed(doing):
            self._robot.poll_motion()

    @contextlib.contextmanager
    def _typed(self, doing: str):
        """franky's exceptions as ArmFault with a code."""
        try:
            yield
        except ArmFault:
            raise
        except franky.ControlException as error:
            text = str(error)
            code = "communication" if "communication_constraints" in text else "reflex"
            code = "user_stop" if "User Stop" in text else code
            raise ArmFault(code, f"{self.name}: {doing}: {_plain(error)}") from error
        except (franky.NetworkException, franky.ProtocolException, RuntimeError) as error:
            # Poco's own exceptions arrive as RuntimeError once the sockets are closed.
            self._link_error = _plain(error)
            raise ArmFault(
                "connection", f"{self.name} ({self.hostname}): {doing}: {_plain(error)}"
            ) from error
        except Exception as error:
            raise ArmFault("arm", f"{self.name}: {doing}: {type(error).__name__}: {_plain(error)}") from error

    def _poll(self) -> None:
        """Keep the state of an arm that is not under control; libfranka then reads it from the wire,
        blocking.
        """
        while not self._closing.wait(_POLL_S):
            robot = self._robot
            if robot is None or self._link_error or robot.is_in_control:
                continue
            try:
                self._now(robot)
            except ArmFault:
                continue  # noted in _link_error; recover() reconnects


def _convert(state: franky.RobotState) -> ArmState:
    mode = state.robot_mode.name
    errors = ""
    if mode not in ("Move", "Idle"):
        errors = repr(state.current_errors).strip("[]").replace('"', "")
    return ArmState(state.time.to_sec(), state.q, state.dq, state.tau_J, mode, errors)


def _plain(error: BaseException) -> str:
    return " ".join(str(error).removeprefix("libfranka: ").split())


def _wait(condition, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
