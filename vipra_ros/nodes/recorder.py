"""Recorder node: demonstrations from the live topics to a LeRobotDataset.

Takes `/front_camera/image_raw`, `/<arm>/joint_states`, `/<arm>/joint_reference`, `/arms/status` and, where it
runs, `/teleop/status`; services `~/start`, `~/stop`, `~/keep`, `~/discard`, `~/undo`, `~/retry`, `~/pause`;
parameters `task` (words, or a file in config/tasks) and `target`, which may change between episodes;
`~/status`. Frames are encoded in a thread of their own, so that no message waits for a disk. Timers run on
the steady clock; stamps are executor time.
"""

import contextlib
import sys
import time
from pathlib import Path

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock as RosClock
from rclpy.clock import ClockType
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from config.embodiment import Embodiment
from config.loading import ConfigError, load
from config.recording import Quality, Recording
from episodes import quality
from episodes.layout import EpisodesError
from simulation.state import StateError
from vipra_ros.clock import make_clock
from vipra_ros.nodes.messages import seconds, stamp
from vipra_ros.nodes.run import run
from vipra_ros.parameters import declare, declare_robot, revise
from vipra_ros.recording import setups
from vipra_ros.recording.raw import RawLog
from vipra_ros.recording.session import Refused, Session, State
from vipra_ros.recording.synchronizer import Synchronizer
from vipra_ros.recording.worker import Worker, open_writer
from vipra_ros.robot.commands import joint_names

POLL_S = 0.01
STATUS_S = 0.2
_SHARED = "another recorder runs in this graph: stop one of the two"


class RecorderNode(Node):
    """See the module."""

    def __init__(self, **options):
        self._resources = contextlib.ExitStack()  # first: a half-made node is destroyed as well
        super().__init__("recorder", **options)
        robot = declare_robot(self, ["camera", "simulation"])
        self._config = declare(self, Recording(), writable=("task", "target"))
        if not self._config.dataset:
            raise ConfigError(
                "recorder: parameter dataset is empty: name a folder (dataset:=recordings/cups)"
            )
        embodiment = load(Embodiment, robot.embodiment)
        rate_hz = self._config.rate_hz or embodiment.rate_hz
        if rate_hz != int(rate_hz):
            raise ConfigError(f"recorder: {rate_hz:g} frames per second: datasets need a whole number")
        hands = {arm: robot.arms[arm].gripper for arm in embodiment.by_arm}
        self._names = {arm: list(joint_names(arm, hand)) for arm, hand in hands.items()}
        if not embodiment.stateful:
            raise ConfigError(
                f"recorder: embodiment {embodiment.name} has end-effector steps, and arms are recorded "
                "as joints: choose one with absolute_joints, such as franka_single"
            )
        if tuple(name for names in self._names.values() for name in names) != embodiment.names:
            raise ConfigError(f"embodiment {embodiment.name}: its dimensions are not the robot's, arm by arm")
        self._robot = robot
        asked = setups.read(self._config, robot)
        root = Path(self._config.dataset).expanduser().resolve()
        size = robot.camera.height, robot.camera.width
        writer = open_writer(root, embodiment.names, embodiment.name, int(rate_hz), size, self._config.crf)
        self._worker = Worker(writer, Quality(), self._config.queue_frames)
        self._resources.callback(self._worker.close)
        self._executor_clock = make_clock(robot)
        self._resources.callback(self._executor_clock.close)
        self._synchronizer = Synchronizer(rate_hz, robot.camera.rate_hz, hands)
        self._session = Session(self._config, asked, self._synchronizer, self._worker, root)
        self._root = root
        self._raw: RawLog | None = None
        self._told = ""
        self.add_on_set_parameters_callback(self._on_parameters)

        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        images = QoSProfile(depth=8, reliability=ReliabilityPolicy.BEST_EFFORT)
        samples = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        self._status = self.create_publisher(DiagnosticStatus, "~/status", latched)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_subscription(Image, "/front_camera/image_raw", self._on_image, images)
        for node, heard in (("arms", self._session.on_arms), ("teleop", self._session.on_teleop)):
            self.create_subscription(
                DiagnosticStatus,
                f"/{node}/status",
                lambda message, heard=heard: heard(_state(message), message.message),
                latched,
            )
        for arm in hands:
            for topic, add in (
                ("joint_states", self._synchronizer.add_state),
                ("joint_reference", self._synchronizer.add_action),
            ):
                self.create_subscription(
                    JointState,
                    f"/{arm}/{topic}",
                    lambda message, arm=arm, add=add: self._on_joints(arm, message, add),
                    samples,
                )
        if self._config.raw:
            self._log_raw(tuple(hands), samples)
        session = self._session
        for verb, action in {
            "start": self._start,
            "stop": session.stop,
            "keep": session.keep,
            "discard": session.discard,
            "undo": session.undo,
            "retry": lambda: session.retry(self._executor_clock.now()),
            "pause": session.pause,
        }.items():
            self.create_service(Trigger, f"~/{verb}", lambda _, r, action=action: self._answer(r, action))
        steady = RosClock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(POLL_S, self._poll, clock=steady)
        self.create_timer(STATUS_S, self._publish_status, clock=steady)
        self.create_timer(1.0, self._diagnose, clock=steady)
        self.get_logger().info(f"{root}: {self._worker.episodes} of {self._config.target} episodes")

    def destroy_node(self) -> None:
        """Drops an episode that was not kept, and lets the dataset go."""
        self._resources.close()
        super().destroy_node()

    def _log_raw(self, arms: tuple[str, ...], qos: QoSProfile) -> None:
        """Everything but the pictures also goes to `raw/<time>.mcap`, from start to end."""
        topics = {"/arms/status": DiagnosticStatus, "/front_camera/camera_info": CameraInfo}
        for arm in arms:
            topics |= {f"/{arm}/joint_{kind}": JointState for kind in ("states", "reference")}
            topics[f"/{arm}/joint_command"] = JointTrajectory
        path = self._root / "raw" / f"{time.strftime('%Y%m%d-%H%M%S')}.mcap"
        log = self._raw = RawLog(path, topics, self._config.reserve_mb)
        self._resources.callback(log.close)
        for topic, kind in topics.items():
            best_effort = qos_profile_sensor_data if kind is CameraInfo else qos
            self.create_subscription(
                kind,
                topic,
                lambda data, topic=topic: log.add(topic, data, self._executor_clock.now()),
                best_effort,
                raw=True,
            )

    # --- ROS to session

    def _on_image(self, message: Image) -> None:
        camera = self._robot.camera
        if (message.encoding, message.width, message.height) != ("rgb8", camera.width, camera.height):
            self.get_logger().error(
                f"pictures are {message.encoding} {message.width}x{message.height}, "
                f"expected rgb8 {camera.width}x{camera.height}: they are not recorded",
                throttle_duration_sec=5.0,
            )
            return
        if message.step != 3 * message.width or len(message.data) != message.step * message.height:
            self.get_logger().error(
                f"pictures have rows of {message.step} bytes and {len(message.data)} bytes in all, expected "
                f"{3 * message.width} and no padding: they are not recorded",
                throttle_duration_sec=5.0,
            )
            return
        rgb = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)
        self._synchronizer.add_picture(rgb, seconds(message.header.stamp))

    def _on_joints(self, arm: str, message: JointState, add) -> None:
        names = self._names[arm]
        if message.name != names or len(message.position) != len(names):
            self.get_logger().error(
                f"{arm}: joint states name {', '.join(message.name)}, expected {', '.join(names)}",
                throttle_duration_sec=5.0,
            )
            return
        add(arm, seconds(message.header.stamp), np.array(message.position))

    def _on_parameters(self, parameters: list) -> SetParametersResult:
        try:
            changed = [p for p in parameters if p.name in ("task", "target")]
            config = revise(self._config, "", changed)
            asked = setups.read(config, self._robot)
            if config.task != self._config.task:
                self._session.change_task(asked)
        except (ConfigError, Refused) as error:
            return SetParametersResult(successful=False, reason=str(error))
        self._config, self._session.target = config, config.target
        return SetParametersResult(successful=True)

    def _answer(self, response: Trigger.Response, action) -> Trigger.Response:
        try:
            response.message = action()
            response.success = True
        except Refused as error:
            response.success, response.message = False, str(error)
        self._publish_status()
        return response

    def _start(self) -> str:
        if self._shared():
            raise Refused(_SHARED)
        return self._session.start(self._executor_clock.now())

    def _shared(self) -> bool:
        """Whether another recorder hears every request too."""
        return self.count_publishers(self._status.topic_name) > 1

    # --- session to ROS

    def _poll(self) -> None:
        session = self._session
        session.poll(self._executor_clock.now())
        text = f"{session.state.value}: {session.message}"
        if text != self._told:
            self._told = text
            self.get_logger().info(text)
            self._publish_status()

    def _publish_status(self) -> None:
        self._status.publish(self._make_status())

    def _make_status(self) -> DiagnosticStatus:
        session, worker = self._session, self._worker
        warnings = session.warnings(self._executor_clock.now())
        if self._raw and self._raw.ended:
            warnings.append(self._raw.ended)
        if self._shared():
            warnings.append(_SHARED)
        length, findings = session.last
        values = {
            "state": session.state.value,
            "message": session.message,
            "count": worker.episodes,
            "target": session.target,
            "task": session.setup.instruction,
            "set_up": "\n".join(session.setup.lines),
            "dataset": self._root,
            "frames": session.frames,
            "length_s": f"{session.length_s:.2f}",
            "repeated": session.repeated,
            "last_length_s": f"{length:.2f}",
            "last_findings": quality.summary(findings),
            "flagged": str(bool(session.flags) and session.state is State.PENDING).lower(),
            "warnings": "; ".join(warnings),
            "sync_p99_ms": f"{session.sync_p99_ms():.2f}",
            "waiting": worker.waiting,
        }
        level = DiagnosticStatus.WARN if warnings else DiagnosticStatus.OK
        message = "; ".join((session.message, *warnings))
        status = DiagnosticStatus(level=level, name="recorder", message=message, hardware_id=str(self._root))
        status.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        return status

    def _diagnose(self) -> None:
        message = DiagnosticArray(status=[self._make_status()])
        message.header.stamp = stamp(self._executor_clock.now())
        self._diagnostics.publish(message)


def _state(message: DiagnosticStatus) -> str:
    return next((v.value for v in message.values if v.key == "state"), "")


def main() -> int:
    """Run the node until interrupted; 2 for a wrong configuration or a dataset that cannot be used."""
    return run("recorder", RecorderNode, (ConfigError, EpisodesError, StateError, OSError))


if __name__ == "__main__":
    sys.exit(main())
