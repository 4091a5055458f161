"""The arms' interface without arms: leases, status, joint states and references; records what is commanded.

Commands are read by the real `robot.commands`, so what is accepted here is what the arms node would accept.
"""

import time

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from tests.vipra_ros.graph import HOME
from vipra_ros.clock import to_stamp
from vipra_ros.execution.chunk import Chunk, Rejected
from vipra_ros.robot.commands import Assembler, Lease, Tag, check_part, joint_names

ARMS = ("left", "right")


class ArmsStandIn(Node):
    """`chunks` were accepted, `let_go` counts; `fail`, `refuse` and `silent` make it behave badly."""

    def __init__(self, **options):
        super().__init__("arms", **options)
        self.chunks: list[tuple[float, Chunk]] = []  # (accepted at, chunk)
        self.messages: list[JointTrajectory] = []
        self.let_go = 0
        self.lease = Lease(timeout_s=5.0)
        self.state, self.reason, self.rejected = "IDLE", "holding", ""
        self.refuse: tuple[str, str] | None = None  # refuse every chunk with this code and message
        self.silent = False
        self.opening = 1.0  # of the hands, measured
        self._accepted = -1
        self._assembler = Assembler(ARMS)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._status = self.create_publisher(DiagnosticStatus, "~/status", latched)
        self._joints = {
            (arm, topic): self.create_publisher(JointState, f"/{arm}/{topic}", 10)
            for arm in ARMS
            for topic in ("joint_states", "joint_reference")
        }
        for arm in ARMS:
            topic = f"/{arm}/joint_command"
            self.create_subscription(JointTrajectory, topic, lambda m, arm=arm: self._command(arm, m), 10)
        self.create_service(Trigger, "~/acquire_lease", self._acquire)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(0.02, self._publish_joints, clock=steady)
        self.create_timer(0.05, self.publish_status, clock=steady)

    def fail(self, reason: str) -> None:
        self.state, self.reason = "FAULT", reason
        self.lease.release()
        self.publish_status()

    def recover(self) -> None:
        self.state, self.reason = "IDLE", "holding"
        self.lease.next_epoch()
        self.publish_status()

    def _acquire(self, _, response: Trigger.Response) -> Trigger.Response:
        try:
            if self.state == "FAULT":
                raise Rejected("latched", self.reason)
            response.message, response.success = self.lease.acquire(time.monotonic()), True
            self._accepted = -1
        except Rejected as error:
            response.message, response.success = f"{error.code}: {error}", False
        self.publish_status()
        return response

    def _command(self, arm: str, message: JointTrajectory) -> None:
        self.messages.append(message)
        try:
            tag = Tag.parse(message.header.frame_id)
            stamp = message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec
            times = [p.time_from_start.sec + 1e-9 * p.time_from_start.nanosec for p in message.points]
            rows = [p.positions for p in message.points]
            part = check_part(arm, True, tag, message.joint_names, stamp, times, rows)
            whole = self._assembler.feed(arm, part)
            if whole is None:
                return
            if isinstance(whole, Chunk) and self.refuse:
                raise Rejected(*self.refuse)
            now = time.monotonic()
            self.lease.check(tag, now)
            if isinstance(whole, Chunk):
                if whole.end <= now:
                    raise Rejected("expired", "over")
                self.chunks.append((now, whole))
                self.lease.feed(tag.seq, max(now, whole.end))
                self._accepted, self.state, self.reason = tag.seq, "RUNNING", "running"
            else:
                self.let_go += 1
                self.lease.release()
                self.state, self.reason = "IDLE", "holding"
        except Rejected as error:
            self.rejected = f"{tag.seq} {error.code} {error}"
        self.publish_status()

    def _publish_joints(self) -> None:
        if self.silent:
            return
        measured = [self.opening] * len(ARMS)
        told = self.chunks[-1][1].grippers[-1].tolist() if self.chunks else measured
        for (arm, topic), publisher in self._joints.items():
            message = JointState(name=list(joint_names(arm)))
            message.header.stamp = _now()
            openings = measured if topic == "joint_states" else told
            message.position = [*HOME, openings[ARMS.index(arm)]]
            message.velocity = message.effort = [0.0] * 8
            publisher.publish(message)

    def publish_status(self) -> None:
        if self.silent:
            return
        values = {
            "state": self.state,
            "lease": self.lease.holder,
            "epoch": self.lease.epoch,
            "accepted_seq": self._accepted,
            "rejected": self.rejected,
            "time_s": f"{time.monotonic():.3f}",
        }
        status = DiagnosticStatus(name="arms", message=self.reason)
        status.values = [KeyValue(key=k, value=str(v)) for k, v in values.items()]
        self._status.publish(status)


def _now() -> Time:
    sec, nanosec = to_stamp(time.monotonic())
    return Time(sec=sec, nanosec=nanosec)
