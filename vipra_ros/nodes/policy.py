"""Policy node: translates between ROS and `Commander`, which asks the policy server and commands the arms.

Takes `/front_camera/image_raw`, `/<arm>/joint_states` and `/arms/status`; gives `/<arm>/joint_command` under
a lease of the arms, `~/chunk` for viewers, `~/status` and `/diagnostics`; services `~/start` and `~/stop`;
parameters `task` and `seed`, which may change while it runs. Timers run on the steady clock and everything
else is counted on the executor clock, so jumps of wall or ROS time change nothing.
"""

import contextlib
import json
import sys
import time

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock as RosClock
from rclpy.clock import ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from rclpy.task import Future
from sensor_msgs.msg import Image, JointState
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from config.embodiment import Embodiment
from config.loading import ConfigError, load
from config.robot import safety_of
from config.workcell import Workcell
from policy_server.keys import KeyFileError
from simulation.state import StateError
from vipra_ros.clock import make_clock
from vipra_ros.commander import ArmsStatus, Commander, State, connect, hands
from vipra_ros.execution.chunk import Chunk
from vipra_ros.execution.planner import Planner
from vipra_ros.nodes.messages import parts, seconds, stamp, trajectory
from vipra_ros.nodes.run import run
from vipra_ros.parameters import declare_robot, declare_run_dir, revise
from vipra_ros.robot.commands import joint_names
from vipra_ros.safety.supervisor import Supervisor

LIVE = {"task": "instruction for the policy", "seed": "noise seed of its next request"}
TICK_S = 0.01
STATUS_S = 0.1
# Wall time:
START_PATIENCE_S = 10.0  # for what ~/start needs to be there; longer than an abandoned lease lives
LEASE_TIMEOUT_S = 2.0  # for the arms to answer
LEASE_RETRY_S = 0.5  # ~/start only: an abandoned lease ends by itself
_LEVELS = {
    State.IDLE: DiagnosticStatus.OK,
    State.RUNNING: DiagnosticStatus.OK,
    State.WAITING: DiagnosticStatus.WARN,
    State.STOPPED: DiagnosticStatus.ERROR,
}


class PolicyNode(Node):
    """See the module."""

    def __init__(self, **options):
        self._resources = contextlib.ExitStack()  # first: a half-made node is destroyed as well
        super().__init__("policy", **options)
        robot = declare_robot(self, ["policy", "camera", "simulation"])
        run_dir = declare_run_dir(self)
        given = []
        for name, text in LIVE.items():
            about = ParameterDescriptor(description=f"{text}; may change while it runs")
            value = self.declare_parameter(name, getattr(robot.policy, name), about).value
            given.append(rclpy.Parameter(name, value=value))
        self._config = revise(robot.policy, "", given)
        self.add_on_set_parameters_callback(self._on_parameters)

        embodiment, safety = load(Embodiment, robot.embodiment), safety_of(robot)
        self._embodiment = embodiment
        rows = dimensions_by_arm(embodiment, tuple(robot.arms))
        arms = tuple(rows)
        if embodiment.stateful:
            self._names = {arm: [embodiment.names[n] for n in numbers] for arm, numbers in rows.items()}
        else:  # what the arms are sent, and say of themselves, are joints all the same
            self._names = {arm: list(joint_names(arm, len(rows[arm]) > 6)) for arm in arms}
        self._hand = hands(embodiment, arms, 7)
        home = np.concatenate([robot.arms[name].home_rad for name in arms])
        self._executor_clock = make_clock(robot)
        self._resources.callback(self._executor_clock.close)
        try:
            gate = Supervisor(safety, arms, load(Workcell, robot.workcell), home, self._executor_clock.now())
            frame_s = 1.0 / robot.camera.rate_hz
            planner = Planner(self._config, embodiment.horizon, frame_s, safety.chunk_lead_s)
        except ValueError as error:
            raise ConfigError(f"{self.get_parameter('robot').value}: {error}") from error
        try:
            self._client = connect(self._config, embodiment)
        except ValueError as error:
            raise ConfigError(f"policy.server: {error}") from error
        self._resources.callback(self._client.close)
        log = run_dir / "policy.jsonl" if run_dir else None
        self._log = self._resources.enter_context(log.open("w")) if log else None
        self._commander = Commander(
            self._config,
            embodiment,
            arms,
            self._client,
            planner,
            gate,
            self._executor_clock,
            self._send,
            self._record,
        )
        self._told: tuple | None = None
        self._told_rate: str | None = None
        self._started: Future | None = None  # ~/start waits for it
        self._start_deadline = 0.0
        self._lease_call: tuple[Future, float] | None = None
        self._lease_retry, self._lease_refusal = 0.0, ""

        command = QoSProfile(depth=2, reliability=ReliabilityPolicy.RELIABLE)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._commands = {
            name: self.create_publisher(JointTrajectory, f"/{name}/joint_command", command) for name in arms
        }
        self._chunks = self.create_publisher(JointTrajectory, "~/chunk", 10)
        self._status = self.create_publisher(DiagnosticStatus, "~/status", latched)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._lease_client = self.create_client(Trigger, "/arms/acquire_lease")
        # A group of its own: in the node's, the waiting coroutine would hold off every other callback.
        self.create_service(Trigger, "~/start", self._on_start, callback_group=ReentrantCallbackGroup())
        self.create_service(Trigger, "~/stop", self._on_stop)
        images = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        self.create_subscription(Image, "/front_camera/image_raw", self._on_image, images)
        self.create_subscription(DiagnosticStatus, "/arms/status", self._on_arms, latched)
        for name in arms:
            self.create_subscription(
                JointState,
                f"/{name}/joint_states",
                lambda message, name=name: self._on_joints(name, message),
                qos_profile_sensor_data,
            )
        self._resources.callback(self._let_go)
        steady = RosClock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(TICK_S, self._tick, clock=steady)
        self.create_timer(STATUS_S, self._publish_status, clock=steady)
        self.create_timer(1.0, self._diagnose, clock=steady)

    def destroy_node(self) -> None:
        """Lets the arms go first, where ROS still runs."""
        self._resources.close()
        super().destroy_node()

    def _let_go(self) -> None:
        if self.context.ok() and self._commander.active:
            self._commander.stop("the policy node ends")

    # --- ROS to commander

    def _on_image(self, message: Image) -> None:
        size = 3 * message.width * message.height
        if (
            message.encoding != "rgb8"
            or message.step != 3 * message.width
            or not size == len(message.data) > 0
        ):
            self.get_logger().error(
                f"pictures are {message.encoding}, {message.width}x{message.height}, step {message.step}, "
                f"{len(message.data)} bytes: rgb8 without padding is needed",
                throttle_duration_sec=5.0,
            )
            return
        rgb = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)
        self._commander.on_picture(rgb, seconds(message.header.stamp))

    def _on_joints(self, arm: str, message: JointState) -> None:
        names = self._names[arm]
        if message.name != names or len(message.position) != len(names):
            self.get_logger().error(
                f"{arm}: joint states name {', '.join(message.name)}, expected {', '.join(names)}",
                throttle_duration_sec=5.0,
            )
            return
        self._commander.on_joints(arm, seconds(message.header.stamp), np.array(message.position))

    def _on_arms(self, message: DiagnosticStatus) -> None:
        try:
            status = ArmsStatus.of(message.message, {v.key: v.value for v in message.values})
        except (KeyError, ValueError) as error:
            self.get_logger().error(
                f"/arms/status is not the arms node's: {error}", throttle_duration_sec=5.0
            )
            return
        self._commander.on_arms(status)

    def _on_parameters(self, parameters: list) -> SetParametersResult:
        try:
            self._config = revise(self._config, "", [p for p in parameters if p.name in LIVE])
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self._commander.task = self._config.task
        if any(p.name == "seed" for p in parameters):  # which refused chunks have moved on, otherwise
            self._commander.seed = self._config.seed
        return SetParametersResult(successful=True)

    async def _on_start(self, _, response: Trigger.Response) -> Trigger.Response:
        if self._commander.state is State.RUNNING:
            response.success, response.message = True, "already running"
            return response
        if self._started is None:
            self._started = Future(executor=self.executor)
            self._start_deadline = time.monotonic() + START_PATIENCE_S
            self._lease_retry, self._lease_refusal = 0.0, ""
            self._commander.start()
        response.success, response.message = await self._started
        return response

    def _on_stop(self, _, response: Trigger.Response) -> Trigger.Response:
        response.success = True
        if self._commander.active:
            self._commander.stop()
            response.message = "stopped; the arms decelerate and hold"
        else:  # keeps the reason why it is not running
            response.message = f"not running: {self._commander.reason}"
        return response

    # --- Commander to ROS

    def _tick(self) -> None:
        commander = self._commander
        commander.tick()
        self._pursue_lease()
        self._answer_start()
        if (commander.state, commander.reason) != self._told:
            self._publish_status()

    def _pursue_lease(self) -> None:
        """Ask the arms while the commander wants a lease; one call at a time, given up after a while."""
        if self._lease_call is not None:
            future, deadline = self._lease_call
            if future.done():
                self._lease_call = None
                self._on_lease(future.result())
            elif time.monotonic() > deadline:
                self._lease_call = None
                self._lease_client.remove_pending_request(future)
                self._commander.refused("no answer from /arms/acquire_lease")
        elif (
            self._commander.wants_lease
            and time.monotonic() >= self._lease_retry
            and self._lease_client.service_is_ready()
        ):
            future = self._lease_client.call_async(Trigger.Request())
            self._lease_call = future, time.monotonic() + LEASE_TIMEOUT_S

    def _on_lease(self, answer: Trigger.Response) -> None:
        if answer.success and self._commander.wants_lease:
            self._commander.granted(answer.message)
        elif answer.success:  # stopped meanwhile: give it back
            self._command(f"{answer.message}:0", None)
        elif self._started is not None and answer.message.startswith("lease:"):  # taken, perhaps abandoned
            self._lease_retry = time.monotonic() + LEASE_RETRY_S
            self._lease_refusal = answer.message
        elif self._commander.wants_lease:
            self._commander.refused(answer.message)

    def _answer_start(self) -> None:
        """End a waiting ~/start: running, stopped for a reason, or out of patience."""
        if self._started is None:
            return
        commander = self._commander
        if commander.state is State.WAITING and time.monotonic() > self._start_deadline:
            why = self._lease_refusal if commander.wants_lease and self._lease_refusal else commander.reason
            commander.stop(f"not started: {why}", State.STOPPED)
        if commander.state is not State.WAITING:
            running = commander.state is State.RUNNING
            started, self._started = self._started, None
            started.set_result((running, f"running: {commander.task}" if running else commander.reason))

    def _send(self, seq: int, chunk: Chunk | None) -> None:
        self._command(f"{self._commander.lease}:{seq}", chunk)
        if chunk is not None:
            names = [name for arm in self._names.values() for name in arm]
            positions = np.empty((len(chunk), len(names)))
            positions[:, ~self._hand], positions[:, self._hand] = chunk.joints, chunk.grippers
            self._chunks.publish(trajectory(str(seq), chunk, names, positions))

    def _command(self, tag: str, chunk: Chunk | None) -> None:
        """Both arms' parts of one chunk, or of letting go."""
        for arm, message in parts(tag, chunk, self._names).items():
            self._commands[arm].publish(message)

    def _record(self, line: dict) -> None:
        if line["outcome"] not in ("sent", "cancelled"):
            text = f"request {line['seq']}: {line['outcome']}: {line['message']}"
            self.get_logger().warning(text, throttle_duration_sec=1.0)
        if self._log is not None:
            try:
                self._log.write(json.dumps(line) + "\n")
                self._log.flush()
            except OSError as error:  # a full disk is no reason to lose the arms
                self.get_logger().error(f"{self._log.name}: {error}: requests are no longer logged")
                self._log = None

    def _publish_status(self) -> None:
        commander, planner = self._commander, self._commander.planner
        told = commander.state, commander.reason
        if told != self._told:
            self._tell(f"{commander.state.value}: {commander.reason}", commander.state is State.STOPPED)
            self._told = told
        if planner.announcement != self._told_rate:
            self._told_rate = planner.announcement
            self._tell(planner.announcement or f"running at {planner.rate_hz:g} Hz again", False)
        self._status.publish(self._make_status())

    def _tell(self, text: str, bad: bool) -> None:
        if bad:
            self.get_logger().error(text)
        else:
            self.get_logger().info(text)

    def _make_status(self) -> DiagnosticStatus:
        commander, planner = self._commander, self._commander.planner
        level, reason = _LEVELS[commander.state], commander.reason
        if commander.failing:
            level = DiagnosticStatus.WARN
        elif commander.state is State.RUNNING and planner.announcement:
            level, reason = DiagnosticStatus.WARN, planner.announcement
        latency, counts, metadata = planner.latency(), commander.counts, self._client.metadata
        age_s = None if commander.chunk_t_obs is None else self._executor_clock.now() - commander.chunk_t_obs
        values = {
            "state": commander.state.value,
            "task": commander.task,
            "server": self._client.address,
            "model": metadata.model if metadata else "",
            "checkpoint": metadata.checkpoint if metadata else "",
            "mode": self._config.mode,
            "anchor": self._config.anchor,
            "replan_after": self._config.replan_after,
            "min_cycle_s": f"{self._config.min_cycle_s:g}",
            "rate_hz": f"{planner.rate_hz:g}",
            "action_rate_hz": f"{self._config.action_rate_hz:g}",
            "gap_free_rate_hz": f"{planner.gap_free_rate_hz:g}",
            "latency_ms_p50": f"{latency.p50:.1f}",
            "latency_ms_p95": f"{latency.p95:.1f}",
            "latency_ms_p99": f"{latency.p99:.1f}",
            "chunk_age_s": "" if age_s is None else f"{age_s:.3f}",
            "seq": commander.commanded,
            "requests": counts.requests,
            "prefetches": counts.prefetches,
            "chunks": counts.chunks,
            "failures": counts.failures,
            "refused": counts.refused,
            "lease": commander.lease or "",
        }
        status = DiagnosticStatus(
            level=level, name="policy", message=reason, hardware_id=self._client.address
        )
        status.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        return status

    def _diagnose(self) -> None:
        message = DiagnosticArray(status=[self._make_status()])
        message.header.stamp = stamp(self._executor_clock.now())
        self._diagnostics.publish(message)


def dimensions_by_arm(embodiment: Embodiment, arms: tuple[str, ...]) -> dict[str, list[int]]:
    """Arm -> its dimensions' numbers, in the order of the action vector.

    Raises ConfigError unless the embodiment's arms are these, each with seven joints (or end-effector steps),
    then at most a gripper.
    """
    rows = embodiment.by_arm
    if set(rows) != set(arms):
        raise ConfigError(
            f"embodiment {embodiment.name} is for {', '.join(rows)}; the robot has {', '.join(arms)}"
        )
    for arm, numbers in rows.items():
        kinds = [embodiment.dimensions[n].kind for n in numbers]
        if embodiment.stateful and kinds not in (["joint"] * 7, ["joint"] * 7 + ["gripper"]):
            raise ConfigError(
                f"embodiment {embodiment.name}: {arm} needs seven joints, then at most one gripper"
            )
    return rows


def main() -> int:
    """Run the node until interrupted; 2 for a wrong configuration."""
    return run("policy", PolicyNode, (ConfigError, KeyFileError, StateError))


if __name__ == "__main__":
    sys.exit(main())
