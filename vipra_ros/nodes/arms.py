"""Arms node: owns every arm of the robot and translates between ROS and `ArmsExecutor`.

Topics `/<arm>/joint_states`, `/<arm>/joint_reference` (what the arm is told), `/<arm>/joint_command`,
`~/status`, `/diagnostics`; services `~/acquire_lease`, `~/stop`, `~/recover`, `~/home`, `~/open_hands`. Every
stamp is executor time. Timers run on the steady clock and motion on the executor clock, so jumps of wall or
ROS time change nothing. A software stop is not a safety function: use the emergency stop.
"""

import array
import contextlib
import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock as RosClock
from rclpy.clock import ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from config.embodiment import Embodiment
from config.loading import ConfigError, load
from config.robot import Robot, safety_of
from config.workcell import Workcell
from simulation.state import StateError
from vipra_ros.clock import make_clock
from vipra_ros.execution.chunk import Chunk, Rejected
from vipra_ros.nodes.messages import stamp as to_time
from vipra_ros.parameters import declare_robot, declare_run_dir
from vipra_ros.process import die_with_parent
from vipra_ros.robot.commands import Assembler, Tag, check_part, joint_names
from vipra_ros.robot.executor import STATES, ArmsExecutor, State
from vipra_ros.robot.franka import ArmFault, FrankaArm
from vipra_ros.robot.gripper import GripperWorker

CONNECT_S = 30.0
STATUS_RATE_HZ = 20.0
_LEVELS = {
    State.IDLE: DiagnosticStatus.OK,
    State.ALIGNING: DiagnosticStatus.OK,
    State.RUNNING: DiagnosticStatus.OK,
    State.HOMING: DiagnosticStatus.OK,
    State.HOLDING: DiagnosticStatus.WARN,
    State.STOPPING: DiagnosticStatus.WARN,
    State.STOPPED: DiagnosticStatus.WARN,
    State.RECOVERING: DiagnosticStatus.WARN,
    State.FAULT: DiagnosticStatus.ERROR,
}


def arm_order(robot: Robot, embodiment: Embodiment) -> tuple[str, ...]:
    """The robot's arms in the order of the action vector. Raises ConfigError if the two do not fit."""
    order = tuple(embodiment.by_arm)
    if set(order) != set(robot.arms):
        raise ConfigError(
            f"embodiment {embodiment.name} has arms {', '.join(order)}, the robot {', '.join(robot.arms)}"
        )
    if not embodiment.stateful:
        for arm, numbers in embodiment.by_arm.items():
            if (len(numbers) > 6) != robot.arms[arm].gripper:
                raise ConfigError(
                    f"embodiment {embodiment.name} and the robot disagree on whether arm {arm} has a gripper"
                )
        return order
    names = [name for arm in order for name in joint_names(arm, robot.arms[arm].gripper)]
    if tuple(names) != embodiment.names:
        raise ConfigError(f"embodiment {embodiment.name}: dimensions must be {', '.join(names)}")
    return order


class ArmsNode(Node):
    """See the module. Nothing moves before `bring_up`; `close` ends everything from any state.

    A service that takes long ends early once `interrupted()`.
    """

    def __init__(self, interrupted: Callable[[], bool]):
        super().__init__("arms")
        self._interrupted = interrupted
        robot = declare_robot(self, ["arms", "control", "simulation"])
        self._run_dir = declare_run_dir(self)
        safety = safety_of(robot)
        self._names = arm_order(robot, load(Embodiment, robot.embodiment))
        self._arms_config = robot.arms
        self._executor_clock = make_clock(robot)
        realtime = robot.simulation is None
        self._arms = {
            name: FrankaArm(name, robot.arms[name], robot.control, safety, realtime) for name in self._names
        }
        grippers = {
            name: GripperWorker(name, robot.arms[name].hostname, safety.gripper)
            for name in self._names
            if robot.arms[name].gripper
        }
        homes = {name: robot.arms[name].home_rad for name in self._names}
        workcell = load(Workcell, robot.workcell)
        self._executor_core = ArmsExecutor(
            self._arms,
            grippers,
            homes,
            self._executor_clock,
            robot.control,
            safety,
            workcell,
            realtime,
            log_minutes=60 if self._run_dir else 1,
        )
        self._assembler = Assembler(self._names)

        latched = QoSProfile(
            depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
        )
        self._status = self.create_publisher(DiagnosticStatus, "~/status", latched)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._state_publishers = {
            name: self.create_publisher(JointState, f"/{name}/joint_states", 10) for name in self._names
        }
        self._reference_publishers = {
            name: self.create_publisher(JointState, f"/{name}/joint_reference", 10) for name in self._names
        }
        self._joint_rate_hz = robot.control.joint_state_rate_hz
        self._changes = -1
        self._told = ""
        self._ticks = 0

    def bring_up(self) -> None:
        """Connect, open the topics and services, hold every arm. Raises ArmFault, StateError.

        The reference loop starts last: loading message libraries keeps the interpreter to itself for long
        enough to make a dead-man fire. Nothing is answered before the node spins.
        """
        for arm in self._arms.values():
            arm.connect(CONNECT_S)
        core = self._executor_core
        steady = RosClock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(1.0 / self._joint_rate_hz, self._publish, clock=steady)
        self.create_timer(1.0, self._diagnose, clock=steady)
        self.create_timer(10.0, self._collect_garbage, clock=steady)
        for name in self._names:
            self.create_subscription(
                JointTrajectory,
                f"/{name}/joint_command",
                lambda message, name=name: self._on_command(name, message),
                QoSProfile(depth=2, reliability=ReliabilityPolicy.RELIABLE),
            )
        self.create_service(Trigger, "~/acquire_lease", lambda _, r: _answer(r, core.acquire_lease))
        self.create_service(Trigger, "~/stop", lambda _, r: _answer(r, self._stop))
        self.create_service(Trigger, "~/home", lambda _, r: _answer(r, core.home))
        self.create_service(Trigger, "~/open_hands", lambda _, r: _answer(r, core.open_hands))
        self.create_service(Trigger, "~/recover", self._recover)
        # A full collection takes tens of milliseconds and holds the interpreter: never while the loop runs.
        gc.collect()
        gc.freeze()
        gc.disable()
        core.start()
        self.get_logger().info(f"holding {', '.join(self._names)}")

    def close(self) -> bool:
        """Decelerate, stop, write the run log. False when a thread is still stuck in a call of libfranka."""
        clean = self._executor_core.shutdown()
        if self._run_dir is not None:
            names = [n for arm in self._names for n in joint_names(arm, False)]
            self._executor_core.log.save(self._run_dir / "arms.npz", STATES, names)
        return clean

    # --- commands and services

    def _on_command(self, arm: str, message: JointTrajectory) -> None:
        tag = None
        core = self._executor_core
        try:
            tag = Tag.parse(message.header.frame_id)
            part = check_part(
                arm,
                self._arms_config[arm].gripper,
                tag,
                message.joint_names,
                message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec,
                [p.time_from_start.sec + 1e-9 * p.time_from_start.nanosec for p in message.points],
                [p.positions for p in message.points],
            )
            whole = self._assembler.feed(arm, part)
        except Rejected as error:
            core.reject(tag, error)
            self.get_logger().warning(f"command refused: {error.code}: {error}", throttle_duration_sec=1.0)
            return
        if whole is not None:
            core.submit(tag, whole if isinstance(whole, Chunk) else None)

    def _stop(self) -> str:
        self._executor_core.stop("stop requested on ~/stop")
        return "stopping; recover before the next command"

    def _recover(self, _, response: Trigger.Response) -> Trigger.Response:
        """Takes up to seconds, in which nothing is commanded anyway; states are still published."""
        work = threading.Thread(target=_answer, args=(response, self._executor_core.recover), daemon=True)
        work.start()
        while work.is_alive() and not self._interrupted():
            work.join(1.0 / self._joint_rate_hz)
            self._publish()
        self._assembler.reset()
        return response

    # --- what is published

    def _publish(self) -> None:
        core = self._executor_core
        t, states = core.measured()
        stamp = to_time(t)
        for name, (state, opening) in states.items():
            message = JointState(name=joint_names(name, opening is not None))
            message.header.stamp = stamp
            message.header.frame_id = f"{name}_fr3_link0"
            hand = () if opening is None else (opening,)
            still = () if opening is None else (0.0,)
            message.position = array.array("d", (*state.q, *hand))
            message.velocity = array.array("d", (*state.dq, *still))
            message.effort = array.array("d", (*state.tau, *still))
            self._state_publishers[name].publish(message)
        self._publish_reference()
        self._ticks += 1
        every = max(1, round(self._joint_rate_hz / STATUS_RATE_HZ))
        if core.changes != self._changes or self._ticks % every == 0:
            self._changes = core.changes
            status = self._make_status()
            self._status.publish(status)
            text = f"{status.values[0].value}: {status.message}"
            if text != self._told:
                self._told = text
                if status.level == DiagnosticStatus.OK:
                    self.get_logger().info(text)
                else:  # its own line: rclpy ties a severity to the line of the call
                    self.get_logger().warning(text)

    def _publish_reference(self) -> None:
        """The reference that was last sent, with the time it was sent at: a recorder's actions."""
        commanded = self._executor_core.commanded()
        if commanded is None:
            return
        t, arms = commanded
        for name, (q, dq, opening) in arms.items():
            message = JointState(name=joint_names(name, opening is not None))
            message.header.stamp = to_time(t)
            message.header.frame_id = f"{name}_fr3_link0"
            message.position = array.array("d", (*q, *(() if opening is None else (opening,))))
            message.velocity = array.array("d", (*dq, *(() if opening is None else (0.0,))))
            self._reference_publishers[name].publish(message)

    def _make_status(self) -> DiagnosticStatus:
        core, counters = self._executor_core, self._executor_core.counters
        hands = core.gripper_faults()
        state, code, reason = core.phase
        level = _LEVELS[state]
        if not core.alive:
            level, reason = DiagnosticStatus.ERROR, "the reference loop has ended; restart the arms node"
        elif hands and level == DiagnosticStatus.OK:
            level = DiagnosticStatus.WARN
            reason += "; " + "; ".join(f"{name} hand: {fault}" for name, fault in hands.items())
        values = {
            "state": state.value,
            "code": code,
            "lease": core.lease.holder,
            "epoch": core.lease.epoch,
            "accepted_seq": core.accepted_seq,
            "rejected": core.rejected,
            "ticks": counters.ticks,
            "late_ticks": counters.late_ticks,
            "starved_ticks": counters.starved_ticks,
            "interventions": json.dumps(counters.interventions),
            "faults": json.dumps(core.faults),
            "max_late_ms": f"{1000 * counters.max_late_s:.3f}",
            "tracking_error_rms_rad": f"{counters.error_rms_rad:.5f}",
            "tracking_error_max_rad": f"{counters.error_max_rad:.5f}",
            "skew_max_ms": f"{1000 * counters.max_skew_s:.3f}",
            "grippers": json.dumps(core.gripper_report()),
            "time_s": f"{self._executor_clock.now():.3f}",
        }
        status = DiagnosticStatus(level=level, name="arms", message=reason, hardware_id=",".join(self._names))
        status.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        return status

    def _diagnose(self) -> None:
        message = DiagnosticArray(status=[self._make_status()])
        message.header.stamp = to_time(self._executor_clock.now())
        self._diagnostics.publish(message)

    def _collect_garbage(self) -> None:
        """By hand, because an automatic full collection would stop the reference loop wherever it likes."""
        running = self._executor_core.state in (State.RUNNING, State.ALIGNING)
        gc.collect(1 if running else 2)


def _answer(response: Trigger.Response, action) -> Trigger.Response:
    try:
        response.message = action()
        response.success = True
    except Rejected as error:
        response.success, response.message = False, f"{error.code}: {error}"
    return response


def _run(work: Callable[[], None], interrupted: Callable[[], bool]) -> None:
    """Run `work` in a thread until it ends or we are interrupted: a call of libfranka cannot be. Raises its
    error.
    """
    failed = []

    def run():
        try:
            work()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="bring-up", daemon=True)
    thread.start()
    while thread.is_alive() and not interrupted():
        thread.join(0.05)
    if failed:
        raise failed[0]


def main() -> int:
    """Run the node until interrupted; 1 when an arm cannot be used, 2 for a wrong configuration."""
    signals = []  # looked at between callbacks: one that is interrupted halfway would leave the arms anyhow
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, lambda number, frame: signals.append(number))

    def interrupted() -> bool:
        return bool(signals)

    die_with_parent()
    with contextlib.suppress(PermissionError):  # for franky's control threads too, which inherit it
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    # The reference loop must not wait 5 ms for a callback that holds the interpreter.
    sys.setswitchinterval(0.0005)
    node, status = None, 0
    try:
        node = ArmsNode(interrupted)
        _run(node.bring_up, interrupted)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        while not interrupted():
            executor.spin_once()
    except (ConfigError, StateError) as error:
        print(f"arms: {error}", file=sys.stderr)
        status = 2
    except ArmFault as error:
        print(f"arms: {error.code}: {error}", file=sys.stderr)
        status = 1
    except Exception:  # a defect in a callback must still end in a controlled stop
        traceback.print_exc()
        status = 1
    clean = node.close() if node is not None else True
    rclpy.try_shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if not clean:
        status = status or 3
    os._exit(status)  # unloading franky below a thread that still waits in it crashes


if __name__ == "__main__":
    sys.exit(main())
