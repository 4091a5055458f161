"""Camera node: publishes the front camera's pictures, stamped on the executor clock.

`front_camera/image_raw` (rgb8) and `front_camera/camera_info`, sensor-data QoS; `/diagnostics` once a second;
`/clock` at 100 Hz where time is simulated. A frozen camera is not published: whoever needs pictures sees that
they stop. A lost camera is opened again, at first after half a second, later every eight.
"""

import array
import contextlib
import sys
import threading
import time
from dataclasses import dataclass, field

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock as RosClock
from rclpy.clock import ClockType
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import CameraInfo, Image

from config.loading import ConfigError
from simulation.state import StateError
from vipra_ros.cameras.source import CameraError, EndOfSource, Frame, FreezeDetector, Intrinsics, make_source
from vipra_ros.cameras.transport import room_for_pictures
from vipra_ros.clock import make_clock
from vipra_ros.nodes.messages import stamp as to_time
from vipra_ros.nodes.run import run
from vipra_ros.parameters import declare_robot

FRAME_ID = "front_camera_optical_frame"
GRAB_TIMEOUT_S = 0.2
LOST_AFTER_S = 3.0  # without a picture the camera is opened again
BACKOFF_S = (0.5, 8.0)


@dataclass
class Health:
    """What the capture thread tells the diagnostics."""

    level: bytes = DiagnosticStatus.WARN
    reason: str = "opening"
    published: int = 0
    dropped: int = 0
    withheld: int = 0
    opened: int = 0
    fps: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


class CameraNode(Node):
    """See the module."""

    def __init__(self, **options):
        self._resources = contextlib.ExitStack()  # first: a half-made node is destroyed as well
        super().__init__("camera", **options)
        robot = declare_robot(self, ["camera", "simulation"])
        self._camera = robot.camera
        self._executor_clock = make_clock(robot)
        self._resources.callback(self._executor_clock.close)
        self._source = make_source(robot, self._executor_clock)
        self._freeze = FreezeDetector(robot.camera.freeze_timeout_s)
        self._images = self.create_publisher(Image, "front_camera/image_raw", qos_profile_sensor_data)
        self._infos = self.create_publisher(CameraInfo, "front_camera/camera_info", qos_profile_sensor_data)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        steady = RosClock(clock_type=ClockType.STEADY_TIME)  # timers that no clock jump moves
        self.create_timer(1.0, self._diagnose, clock=steady)
        if robot.clock == "simulated":
            self._clocks = self.create_publisher(ClockMessage, "/clock", qos_profile_sensor_data)
            self.create_timer(0.01, self._publish_clock, clock=steady)
        self._image = self._empty_image()
        self._pixels = memoryview(self._image.data)
        self._info = CameraInfo()
        self._health = Health()
        self._counted = (0, time.monotonic())
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._capture, name="capture", daemon=True)
        self._thread.start()
        self._resources.callback(self._end_capture)

    def destroy_node(self) -> None:
        """Stops capturing first: the capture thread publishes."""
        self._resources.close()
        super().destroy_node()

    def _end_capture(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=10.0)

    def _empty_image(self) -> Image:
        """One message for all pictures: filled in place, a picture is copied once before it is serialised."""
        image = Image(width=self._camera.width, height=self._camera.height, encoding="rgb8", is_bigendian=0)
        image.header.frame_id = FRAME_ID
        image.step = 3 * image.width
        image.data = array.array("B", bytes(image.step * image.height))
        return image

    # --- Capture thread

    def _capture(self) -> None:
        backoff_s = BACKOFF_S[0]
        while not self._stopping.is_set():
            published = self._health.published
            try:
                self._open()
                self._stream()
            except EndOfSource as end:
                self._report(DiagnosticStatus.ERROR, str(end))
                return
            except CameraError as error:
                self._report(DiagnosticStatus.ERROR, str(error))
            except Exception as error:
                if not self.context.ok():  # interrupted: nothing can be published any more
                    return
                self._report(DiagnosticStatus.ERROR, f"internal error, capture ended: {error!r}")
                raise
            finally:
                self._source.close()
            backoff_s = (
                BACKOFF_S[0] if self._health.published > published else min(2 * backoff_s, BACKOFF_S[1])
            )
            self._stopping.wait(backoff_s)

    def _open(self) -> None:
        lens = self._source.open()
        self._info = self._camera_info(lens)
        self._freeze.reset()
        self._health.opened += 1

    def _stream(self) -> None:
        newest_s = -float("inf")
        seen = time.monotonic()
        while not self._stopping.is_set():
            frame = self._source.grab(GRAB_TIMEOUT_S)
            if frame is None:
                if time.monotonic() - seen > LOST_AFTER_S:
                    raise CameraError(f"no picture for {LOST_AFTER_S:g} s; opening the camera again")
                continue
            seen = time.monotonic()
            self._health.dropped += frame.dropped
            if frame.stamp_s <= newest_s:  # the same capture again
                self._health.withheld += 1
            elif self._source.noisy and self._freeze.frozen(frame):
                self._health.withheld += 1
                limit = f"{self._camera.freeze_timeout_s:g} s"
                self._report(
                    DiagnosticStatus.ERROR, f"frozen: the same picture for over {limit}, not published"
                )
            else:
                newest_s = frame.stamp_s
                self._publish(frame)
                self._report(DiagnosticStatus.OK, "streaming")

    def _publish(self, frame: Frame) -> None:
        self._image.header.stamp = self._info.header.stamp = to_time(frame.stamp_s)
        self._pixels[:] = frame.rgb.reshape(-1).data
        self._images.publish(self._image)
        self._infos.publish(self._info)
        self._health.published += 1

    def _camera_info(self, lens: Intrinsics | None) -> CameraInfo:
        """Rectified pinhole; all-zero K means uncalibrated (sensor_msgs/CameraInfo)."""
        info = CameraInfo(width=self._camera.width, height=self._camera.height)
        info.header.frame_id = FRAME_ID
        if lens is not None:
            info.distortion_model = "plumb_bob"
            info.d = [0.0] * 5
            info.k = [lens.fx, 0.0, lens.cx, 0.0, lens.fy, lens.cy, 0.0, 0.0, 1.0]
            info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
            info.p = [lens.fx, 0.0, lens.cx, 0.0, 0.0, lens.fy, lens.cy, 0.0, 0.0, 0.0, 1.0, 0.0]
        return info

    def _report(self, level: bytes, reason: str) -> None:
        with self._health.lock:
            changed = reason != self._health.reason
            self._health.level, self._health.reason = level, reason
        if changed:
            if level == DiagnosticStatus.OK:
                self.get_logger().info(reason)
            else:
                self.get_logger().error(reason)
            self._send_diagnostics()

    # --- Timers

    def _diagnose(self) -> None:
        (count, since), now = self._counted, time.monotonic()
        self._counted = (self._health.published, now)
        self._health.fps = (self._health.published - count) / max(now - since, 1e-3)
        self._send_diagnostics()

    def _send_diagnostics(self) -> None:
        health = self._health
        with health.lock:
            level, reason = health.level, health.reason
        if (
            level == DiagnosticStatus.OK
            and health.fps < 0.7 * self._camera.rate_hz
            and health.published > 100
        ):
            level = DiagnosticStatus.WARN
            reason = f"slow: {health.fps:.1f} of {self._camera.rate_hz:g} pictures a second"
        status = DiagnosticStatus(level=level, name="front_camera", message=reason)
        status.hardware_id = self._camera.source
        values = {
            "fps": f"{health.fps:.1f}",
            "published": health.published,
            "dropped": health.dropped,
            "withheld": health.withheld,
            "opened": health.opened,
        }
        status.values = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
        message = DiagnosticArray(status=[status])
        message.header.stamp = to_time(self._executor_clock.now())
        self._diagnostics.publish(message)

    def _publish_clock(self) -> None:
        self._clocks.publish(ClockMessage(clock=to_time(self._executor_clock.now())))


def _make() -> CameraNode:
    with room_for_pictures():
        return CameraNode()


def main() -> int:
    """Run the node until interrupted; 2 for a wrong configuration."""
    return run("camera", _make, (ConfigError, CameraError, StateError))


if __name__ == "__main__":
    sys.exit(main())
