"""Teleop node: arms follow GELLO leaders, through the same lease, chunks and safety as the policy.

Takes GELLO's topics (`<namespace>/gello/joint_states` and `<namespace>/gripper/gripper_client/
target_gripper_width_percent`) or its servos on a serial port, `/<arm>/joint_states`, `/<arm>/joint_reference`
and `/arms/status`; gives `/<arm>/joint_command` under a lease of the arms, `~/status` and `/diagnostics`;
services `~/start`, `~/stop` and `~/pause` (clutch, on and off). Timers run on the steady clock and everything
else is counted on the executor clock.
"""

import contextlib
import sys
import time
from functools import partial

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock as RosClock
from rclpy.clock import ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.task import Future
from sensor_msgs.msg import JointState
from std_msgs.msg import Float32
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from config.loading import ConfigError, load
from config.robot import safety_of
from config.teleop import Teleop
from simulation.state import StateError
from vipra_ros.clock import make_clock
from vipra_ros.commander import (
    ACKNOWLEDGE_S,
    ARMS_SILENT_S,
    GIVE_UP,
    JOINTS_OLD_S,
    LATCHED,
    PASSING,
    ArmsStatus,
)
from vipra_ros.execution.chunk import Chunk
from vipra_ros.nodes.messages import parts, seconds, stamp
from vipra_ros.nodes.run import run
from vipra_ros.parameters import declare, declare_robot
from vipra_ros.robot.commands import joint_names
from vipra_ros.safety.limits import JointLimits
from vipra_ros.teleop.dynamixel import Reader
from vipra_ros.teleop.follow import Refused, State, Teleoperation
from vipra_ros.teleop.leader import Stamps

TICK_S = 0.01
STATUS_S = 0.1
LEASE_TIMEOUT_S = 2.0  # wall time for the arms to answer
AGAIN_S = 0.7  # wall time after a pause in which another press, a bounce say, does not couple
TRIGGER_SILENT_S = 1.0
FROZEN_S = 3.0  # a leader whose samples have not changed for this long is told
_LEVELS = {
    State.OFF: DiagnosticStatus.OK,
    State.ALIGNING: DiagnosticStatus.OK,
    State.FOLLOWING: DiagnosticStatus.OK,
    State.PAUSED: DiagnosticStatus.WARN,
    State.LOST: DiagnosticStatus.ERROR,
}


class TeleopNode(Node):
    """See the module."""

    def __init__(self, **options):
        self._resources = contextlib.ExitStack()  # first: a half-made node is destroyed as well
        super().__init__("teleop", **options)
        robot = declare_robot(self, ["simulation"])
        about = ParameterDescriptor(description="file in config/teleop, or a path to one", read_only=True)
        self._config = declare(self, load(Teleop, self.declare_parameter("teleop", "gello", about).value))
        if missing := [arm for arm in robot.arms if arm not in self._config.leaders]:
            raise ConfigError(f"no leader for the {' and the '.join(missing)} arm: add it under `leaders`")
        self._arms = tuple(robot.arms)
        self._names = {arm: joint_names(arm, robot.arms[arm].gripper) for arm in self._arms}
        self._clock = make_clock(robot)
        self._resources.callback(self._clock.close)
        safety = safety_of(robot)
        limits = JointLimits.of(safety, len(self._arms))
        hands = tuple(robot.arms[arm].gripper for arm in self._arms)
        half_open = 0.5 * (safety.gripper.close_below + safety.gripper.open_above)
        self._teleop = Teleoperation(
            self._config, self._arms, hands, limits.soft_min, limits.soft_max, half_open
        )

        self._lease = ""
        self._leased_at = 0.0
        self._coupling: Future | None = None  # ~/start and ~/pause wait for it
        self._lease_call: tuple[Future, float] | None = None
        self._status_of_arms: ArmsStatus | None = None
        self._heard = -np.inf  # wall time of it
        self._joints: dict[tuple[str, str], tuple[float, np.ndarray]] = {}  # by arm and topic
        self._seq = -1
        self._sent: dict[int, float] = {}  # seq -> when; neither accepted nor refused yet
        self._rejection = ""  # the last one that was looked at
        self._refused_in_a_row = 0
        self._chunks = self._refused = 0
        self._told: tuple | None = None
        self._paused_at = -np.inf  # wall time

        command = QoSProfile(depth=2, reliability=ReliabilityPolicy.RELIABLE)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._commands = {
            arm: self.create_publisher(JointTrajectory, f"/{arm}/joint_command", command)
            for arm in self._arms
        }
        self._status = self.create_publisher(DiagnosticStatus, "~/status", latched)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._lease_client = self.create_client(Trigger, "/arms/acquire_lease")
        # A group of its own: in the node's, a waiting coroutine would hold off every other callback.
        waiting = ReentrantCallbackGroup()
        self.create_service(Trigger, "~/start", self._on_start, callback_group=waiting)
        self.create_service(Trigger, "~/pause", self._on_pause, callback_group=waiting)
        self.create_service(Trigger, "~/stop", self._on_stop)
        self.create_subscription(DiagnosticStatus, "/arms/status", self._on_arms, latched)
        for arm in self._arms:
            for topic in ("joint_states", "joint_reference"):
                on_joints = partial(self._on_joints, arm, topic)
                self._listen(JointState, f"/{arm}/{topic}", on_joints)
        self._readers: dict[str, Reader] = {}
        self._triggers: dict[str, tuple[float, float]] = {}  # opening, wall time
        self._stamps = {arm: Stamps() for arm in self._arms}
        if self._config.source == "dynamixel":
            self._read_servos()
        else:
            self._subscribe()
        self._resources.callback(self._let_go, "the teleop node ends")
        steady = RosClock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(TICK_S, self._tick, clock=steady)
        self.create_timer(STATUS_S, self._publish_status, clock=steady)
        self.create_timer(1.0, self._diagnose, clock=steady)

    def destroy_node(self) -> None:
        """Lets the arms go first, where ROS still runs."""
        self._resources.close()
        super().destroy_node()

    # --- leaders

    def _subscribe(self) -> None:
        for arm in self._arms:
            namespace = self._config.leaders[arm].namespace.strip("/")
            prefix = f"/{namespace}" if namespace else ""
            self._listen(
                JointState, f"{prefix}/gello/joint_states", lambda m, arm=arm: self._on_leader(arm, m)
            )
            self._listen(
                Float32,
                f"{prefix}/gripper/gripper_client/target_gripper_width_percent",
                lambda m, arm=arm: self._triggers.__setitem__(arm, (m.data, time.monotonic())),
            )

    def _listen(self, kind: type, topic: str, callback) -> None:
        self.create_subscription(kind, topic, callback, qos_profile_sensor_data)

    def _read_servos(self) -> None:
        for arm in self._arms:
            reader = Reader(self._config.leaders[arm].dynamixel, self._config.rate_hz, self._clock.now)
            self._resources.callback(reader.close)
            reader.start()
            self._readers[arm] = reader

    def _on_leader(self, arm: str, message: JointState) -> None:
        rows = [[n for n, name in enumerate(message.name) if name.endswith(f"joint{i}")] for i in range(1, 8)]
        if any(len(row) != 1 for row in rows) or len(message.position) != len(message.name):
            text = f"{arm} leader: joint states name {', '.join(message.name)}; need fr3_joint1 to fr3_joint7"
            self.get_logger().error(text, throttle_duration_sec=5.0)
            return
        t = self._stamps[arm].map(seconds(message.header.stamp), self._clock.now())
        joints = [message.position[row[0]] for row in rows]
        trigger = None if self._trigger_silent(arm) else self._triggers.get(arm, (None,))[0]
        self._teleop.add(arm, t, joints, trigger)
        self._tick()  # at once: waiting for the timer would only add latency

    # --- arms

    def _on_joints(self, arm: str, topic: str, message: JointState) -> None:
        if tuple(message.name) != self._names[arm] or len(message.position) != len(message.name):
            names, expected = ", ".join(message.name), ", ".join(self._names[arm])
            text = f"/{arm}/{topic} names {names}, expected {expected}"
            self.get_logger().error(text, throttle_duration_sec=5.0)
            return
        self._joints[arm, topic] = seconds(message.header.stamp), np.array(message.position)

    def _on_arms(self, message: DiagnosticStatus) -> None:
        try:
            status = ArmsStatus.of(message.message, {v.key: v.value for v in message.values})
        except (KeyError, ValueError) as error:
            self.get_logger().error(
                f"/arms/status is not the arms node's: {error}", throttle_duration_sec=5.0
            )
            return
        self._status_of_arms, self._heard = status, time.monotonic()

    def _arms_problem(self) -> str:
        arms = self._status_of_arms
        if arms is None:
            return "no status from the arms: is the arms node up?"
        if time.monotonic() - self._heard > ARMS_SILENT_S:
            return "the arms node has fallen silent"
        if arms.state in LATCHED:
            return f"arms {arms.state}: {arms.reason}; /arms/recover, then ~/start"
        return "the arms are homing" if arms.state == "HOMING" else ""

    def _newest(self, topic: str) -> list[np.ndarray]:
        """By arm: joints [7] rad, and the opening of a hand. Raises Refused while they are not known."""
        now = self._clock.now()
        for arm in self._arms:
            if now - self._joints.get((arm, topic), (-np.inf,))[0] > JOINTS_OLD_S:
                raise Refused(f"nothing new on /{arm}/{topic}: is the arms node up?")
        return [self._joints[arm, topic][1] for arm in self._arms]

    def _measured(self) -> np.ndarray:
        """Joints [J] rad. Raises Refused."""
        return np.concatenate([row[:7] for row in self._newest("joint_states")])

    def _told_hands(self) -> np.ndarray:
        """Openings [G] the hands were told last. Raises Refused."""
        return np.concatenate([row[7:] for row in self._newest("joint_reference")])

    # --- services

    async def _on_start(self, _, response: Trigger.Response) -> Trigger.Response:
        response.success, response.message = await self._couple()
        return response

    async def _on_pause(self, _, response: Trigger.Response) -> Trigger.Response:
        if self._teleop.active:
            self._teleop.pause()
            self._let_go()
            self._paused_at = time.monotonic()
            response.success, response.message = True, self._teleop.reason
        elif self._teleop.state is State.OFF:
            response.success, response.message = False, "not coupled: ~/start first"
        elif self._teleop.state is State.LOST:  # who presses now may mean to let go
            response.success, response.message = False, f"lost, {self._teleop.reason}; ~/start couples again"
        elif time.monotonic() - self._paused_at < AGAIN_S:
            response.success, response.message = True, self._teleop.reason
        else:
            response.success, response.message = await self._couple()
        return response

    def _on_stop(self, _, response: Trigger.Response) -> Trigger.Response:
        self._teleop.stop()
        self._let_go()
        if self._coupling is not None:  # a lease that comes now is given back
            coupling, self._coupling = self._coupling, None
            coupling.set_result((False, "stopped"))
        response.success, response.message = True, "let go; the arms decelerate and hold"
        return response

    async def _couple(self) -> tuple[bool, str]:
        """Check, get the lease, couple: whether that worked, and why not."""
        if self._teleop.active:
            return True, f"already coupled: {self._teleop.reason}"
        try:
            if problem := self._arms_problem():
                raise Refused(problem)
            self._check_leaders()
        except Refused as error:
            return False, str(error)
        if self._coupling is None:
            if self._lease_call is not None:
                return False, "stopped a moment ago: once more"
            self._coupling = Future(executor=self.executor)
            call = self._lease_client.call_async(Trigger.Request())
            self._lease_call = call, time.monotonic() + LEASE_TIMEOUT_S
        return await self._coupling

    def _check_leaders(self) -> None:
        """Raises Refused."""
        for arm, reader in self._readers.items():
            if reader.problem:
                raise Refused(f"{arm} leader: {reader.problem}")
        self._teleop.check(self._clock.now(), self._measured())

    def _pursue_lease(self) -> None:
        if self._lease_call is None:
            return
        call, deadline = self._lease_call
        if call.done():
            answer = self._coupled(call.result())
        elif time.monotonic() > deadline:
            self._lease_client.remove_pending_request(call)
            answer = False, "no answer from /arms/acquire_lease"
        else:
            return
        self._lease_call = None
        if self._coupling is not None:
            coupling, self._coupling = self._coupling, None
            coupling.set_result(answer)

    def _coupled(self, answer: Trigger.Response) -> tuple[bool, str]:
        if not answer.success:
            return False, f"the arms gave no lease: {answer.message}"
        self._lease, self._leased_at, self._seq = answer.message, self._clock.now(), -1
        self._sent.clear()
        self._refused_in_a_row = 0
        self._rejection = self._status_of_arms.rejected
        if self._coupling is None:  # stopped meanwhile
            self._let_go()
            return False, "stopped"
        try:
            self._teleop.engage(self._leased_at, self._measured(), self._told_hands())
        except Refused as error:  # they moved meanwhile
            self._let_go()
            return False, str(error)
        return True, self._teleop.reason

    # --- commands

    def _tick(self) -> None:
        for arm, reader in self._readers.items():
            reader.coupled = self._teleop.active
            for t, joints, opening in reader.take():
                self._teleop.add(arm, t, joints, opening)
            if reader.problem and self._teleop.active:
                self._teleop.lose(f"{arm} leader lost: {reader.problem}")
        self._pursue_lease()
        if self._teleop.active and (problem := self._arms_problem() or self._answered()):
            self._teleop.lose(problem)
        chunk = self._teleop.tick(self._clock.now())
        if chunk is not None:
            self._send(chunk)
        if not self._teleop.active:
            self._let_go()
        if (self._teleop.state, self._teleop.reason) != self._told:
            self._publish_status()

    def _answered(self) -> str:
        """What is wrong with the arms' answers to our chunks, or "" ."""
        arms, now = self._status_of_arms, self._clock.now()
        if arms.lease != self._lease:
            return "the lease has ended: ~/start asks for another" if arms.time_s > self._leased_at else ""
        for seq in [seq for seq in self._sent if seq <= arms.accepted_seq]:
            del self._sent[seq]
            self._refused_in_a_row = 0
        if arms.rejected != self._rejection:
            self._rejection = arms.rejected
            seq, _, text = arms.rejected.partition(" ")
            code = text.partition(" ")[0]
            if seq.isdigit() and self._sent.pop(int(seq), None) is not None:
                self._refused += 1
                self._refused_in_a_row += 1
                if code not in PASSING or self._refused_in_a_row >= GIVE_UP:
                    return f"the arms refuse to go on: {text}"
        if any(now - sent > ACKNOWLEDGE_S for sent in self._sent.values()):
            return "the arms do not answer"
        return ""

    def _send(self, chunk: Chunk) -> None:
        self._command(chunk.seq, chunk)
        self._seq = chunk.seq
        self._sent[chunk.seq] = self._clock.now()
        self._chunks += 1

    def _let_go(self, reason: str = "") -> None:
        """Give the lease back, if there is one: the arms decelerate and hold."""
        if reason and self._teleop.active:
            self._teleop.stop(reason)
        if not self._lease or not self.context.ok():
            return
        self._command(self._seq + 1, None)
        self._lease = ""

    def _command(self, seq: int, chunk: Chunk | None) -> None:
        """Both arms' parts of one chunk, or of letting go."""
        for arm, message in parts(f"{self._lease}:{seq}", chunk, self._names).items():
            self._commands[arm].publish(message)

    # --- what is published

    def _publish_status(self) -> None:
        told = self._teleop.state, self._teleop.reason
        if told != self._told:
            self._told = told
            text = f"{told[0].value}: {told[1]}"
            if told[0] is State.LOST:
                self.get_logger().error(text)
            else:  # its own line: rclpy ties a severity to the line of the call
                self.get_logger().info(text)
        self._status.publish(self._make_status())

    def _make_status(self) -> DiagnosticStatus:
        teleop, now = self._teleop, self._clock.now()
        level, reason = _LEVELS[teleop.state], teleop.reason
        if teleop.waiting_triggers and teleop.state is State.FOLLOWING:
            reason += f"; move the trigger to take over the {', '.join(teleop.waiting_triggers)} hand"
        frozen = [arm for arm in self._arms if teleop.samples[arm].unchanged_s > FROZEN_S]
        if frozen and teleop.active and self._config.source == "topics":
            reason += (
                f"; the {', '.join(frozen)} leader has not moved to the bit for {FROZEN_S:g} s: power, cable?"
            )
        ages = {arm: now - teleop.samples[arm].newest_s for arm in self._arms}
        difference, joint = np.nan, ""
        with contextlib.suppress(Refused):
            difference, joint = teleop.difference(self._measured())
        values = {
            "state": teleop.state.value,
            "source": self._config.source,
            "difference_rad": f"{difference:.3f}",
            "difference_joint": joint,
            "leaders": ", ".join(f"{arm} {self._leader_text(arm, age)}" for arm, age in ages.items()),
            "delay_s": f"{self._config.delay_s:g}",
            "rate_hz": f"{self._config.rate_hz:g}",
            "seq": self._seq,
            "chunks": self._chunks,
            "refused": self._refused,
            "lease": self._lease,
        }
        for arm, age in ages.items():
            values[f"{arm}_age_s"] = f"{age:.3f}" if np.isfinite(age) else ""
            opening = teleop.samples[arm].opening
            values[f"{arm}_trigger"] = "" if opening is None else f"{opening:.2f}"
        status = DiagnosticStatus(
            level=level, name="teleop", message=reason, hardware_id=",".join(self._arms)
        )
        status.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        return status

    def _trigger_silent(self, arm: str) -> bool:
        """Its topic came once and comes no more: the hand keeps what it was told."""
        return arm in self._triggers and time.monotonic() - self._triggers[arm][1] > TRIGGER_SILENT_S

    def _leader_text(self, arm: str, age: float) -> str:
        if age <= self._config.lost_after_s:
            return "ok, its trigger is silent" if self._trigger_silent(arm) else "ok"
        reader = self._readers.get(arm)
        return (reader.problem if reader else "") or "silent"

    def _diagnose(self) -> None:
        message = DiagnosticArray(status=[self._make_status()])
        message.header.stamp = stamp(self._clock.now())
        self._diagnostics.publish(message)


def main() -> int:
    """Run the node until interrupted; 2 for a wrong configuration."""
    return run("teleop", TeleopNode, (ConfigError, StateError))


if __name__ == "__main__":
    sys.exit(main())
