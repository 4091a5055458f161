"""Watches a running graph from outside: statuses, frame rate, service calls. Imports ROS."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.exceptions import InvalidHandle
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_srvs.srv import Trigger

from vipra_ros.process import ProcessError

NODES = ("arms", "policy", "teleop", "recorder")
FRONT_CAMERA = "/front_camera"


class CallFailed(ProcessError):
    """A service is absent, late, or answered no; the message is one line."""


@dataclass(frozen=True)
class Status:
    """The newest DiagnosticStatus of a node."""

    level: int  # 0 ok, 1 warning, 2 error, 3 stale
    message: str
    values: dict[str, str] = field(default_factory=dict)
    heard_s: float = field(default_factory=time.monotonic)

    def number(self, key: str) -> float | None:
        """Value of `key` as a number, None when it is absent or none."""
        try:
            return float(self.values[key])
        except (KeyError, ValueError):
            return None


class Monitor:
    """Subscribes in a thread of its own. Close it, or use it as a context manager."""

    def __init__(self, domain: int | None = None, discovery: str | None = None):
        if discovery:
            os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = discovery
        self._context = rclpy.Context()
        # args: ours are not ROS's, and may look like its remappings
        rclpy.init(
            args=[],
            context=self._context,
            domain_id=domain,
            signal_handler_options=SignalHandlerOptions.NO,
        )
        self._node = rclpy.create_node(f"vipra_monitor_{os.getpid()}", context=self._context)
        self._status: dict[str, Status] = {}
        self._frames: list[float] = []  # capture stamps of the last second or so
        self._clients: dict[str, object] = {}
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        for name in NODES:
            self._node.create_subscription(
                DiagnosticStatus, f"/{name}/status", lambda m, n=name: self._on_status(n, m), latched
            )
        self._node.create_subscription(
            CameraInfo, f"{FRONT_CAMERA}/camera_info", self._on_info, qos_profile_sensor_data
        )
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._spin, name="vipra-monitor", daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        # the second: a slow callback, of pictures say, that ends after `close`
        with contextlib.suppress(ExternalShutdownException, InvalidHandle):
            self._executor.spin()

    def _on_status(self, name: str, message: DiagnosticStatus) -> None:
        level = message.level[0] if isinstance(message.level, bytes) else int(message.level)
        self._status[name] = Status(level, message.message, {v.key: v.value for v in message.values})

    def _on_info(self, message: CameraInfo) -> None:
        stamp = message.header.stamp
        self._frames = [*self._frames[-30:], stamp.sec + stamp.nanosec * 1e-9]

    def status(self, name: str) -> Status | None:
        """Newest status of node `name` ("arms", "policy"); None before the first."""
        return self._status.get(name)

    def frames_per_second(self) -> float | None:
        """Rate of the front camera by capture stamp; None before two frames."""
        stamps = self._frames
        span = stamps[-1] - stamps[0] if len(stamps) > 1 else 0.0
        return (len(stamps) - 1) / span if span > 0 else None

    def newest_frame_s(self) -> float:
        """Capture stamp of the newest picture; -inf before the first."""
        return self._frames[-1] if self._frames else -float("inf")

    def watch_status(self, name: str, callback: Callable[[DiagnosticStatus], None]) -> None:
        """Call `callback` with every status of node `name`, in the monitor's thread."""
        self._node.create_subscription(DiagnosticStatus, f"/{name}/status", callback, 10)

    def watch_images(self, callback: Callable[[Image], None]) -> None:
        """Call `callback` with every front camera image, in the monitor's thread."""
        self._node.create_subscription(Image, f"{FRONT_CAMERA}/image_raw", callback, qos_profile_sensor_data)

    def watch_joints(
        self, arm: str, callback: Callable[[JointState], None], topic: str = "joint_states"
    ) -> None:
        """Call `callback` with every joint state of `arm` (or `joint_reference`), in the monitor's thread."""
        self._node.create_subscription(JointState, f"/{arm}/{topic}", callback, qos_profile_sensor_data)

    def call(self, service: str, timeout_s: float = 10.0) -> str:
        """Call a Trigger service and return its message. Raises CallFailed."""
        answer = self._request(Trigger, service, Trigger.Request(), timeout_s)
        if not answer.success:
            raise CallFailed(f"{service}: {answer.message}")
        return answer.message

    def set_task(self, task: str, timeout_s: float = 5.0, node: str = "policy") -> None:
        """Give `node` (policy or recorder) its instruction. Raises CallFailed."""
        value = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=task)
        self._set(node, "task", value, timeout_s)

    def set_seed(self, seed: int, timeout_s: float = 5.0) -> None:
        """Give the policy node the noise seed of its next request. Raises CallFailed."""
        value = ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=seed)
        self._set("policy", "seed", value, timeout_s)

    def _set(self, node: str, name: str, value: ParameterValue, timeout_s: float) -> None:
        request = SetParameters.Request(parameters=[Parameter(name=name, value=value)])
        service = f"/{node}/set_parameters"
        (result,) = self._request(SetParameters, service, request, timeout_s).results
        if not result.successful:
            raise CallFailed(f"{service}: {name}: {result.reason}")

    def _request(self, kind: type, service: str, request, timeout_s: float):
        client = self._clients.get(service)
        if client is None:
            client = self._clients[service] = self._node.create_client(kind, service)
        deadline = time.monotonic() + timeout_s
        if not client.wait_for_service(timeout_s):
            raise CallFailed(
                f"{service}: nobody offers it within {timeout_s:g} s: is the robot up (vipra up)?"
            )
        future = client.call_async(request)
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        if not done.wait(max(0.0, deadline - time.monotonic())):
            raise CallFailed(f"{service}: no answer within {timeout_s:g} s")
        return future.result()

    def close(self) -> None:
        self._executor.shutdown(timeout_sec=2.0)
        self._thread.join(2.0)
        self._node.destroy_node()
        self._context.try_shutdown()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        self.close()
