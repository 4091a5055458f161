"""A policy node among stand-in arms and pictures of the test's own, its real server in another process."""

import array
import itertools
import json
import sys
import threading
import time
from pathlib import Path

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_srvs.srv import Trigger

from tests.vipra_ros.arms_standin import ArmsStandIn
from tests.vipra_ros.graph import Graph, write_robot
from vipra_ros.clock import to_stamp
from vipra_ros.nodes.policy import PolicyNode
from vipra_ros.process import Child, free_port, wait_for

PERIOD_S = 1 / 30


class Pictures:
    """A camera: a grey picture every 33 ms, one level of 5 brighter each time, while `on`."""

    def __init__(self, graph: Graph, offset_s: float):
        self._publisher = graph.do(
            lambda: graph.node.create_publisher(Image, "/front_camera/image_raw", qos_profile_sensor_data)
        )
        self.on, self.offset_s = True, offset_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        for number in itertools.count():
            due += PERIOD_S
            if self._end.wait(max(0.0, due - time.monotonic())):
                return
            if self.on:
                image = Image(width=80, height=60, step=240, encoding="rgb8")
                image.data = array.array("B", bytes([5 * (number % 50)]) * (240 * 60))
                sec, nanosec = to_stamp(due + self.offset_s)
                image.header.stamp = Time(sec=sec, nanosec=nanosec)
                self._publisher.publish(image)

    def close(self) -> None:
        self._end.set()
        self._thread.join()


class Scene:
    """Graph, stand-in arms, pictures and a policy server; `start_node` adds the policy node."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.graph = Graph()
        self.arms = self.graph.spin(ArmsStandIn(context=self.graph.context))
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.statuses: list[DiagnosticStatus] = self.graph.collect(
            DiagnosticStatus,
            "/policy/status",
            QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL),
        )
        self.server: Child | None = None
        self.pictures: Pictures | None = None
        self.clients: dict[str, object] = {}

    def serve(self, delay_s: float = 0.0, robot: str = "franka_bimanual", *keys: str) -> Child:
        argv = [sys.executable, "-m", "tests.vipra_ros.serve_moves", self.address, str(delay_s), robot, *keys]
        self.server = Child("server", argv, self.folder / "server.log")
        wait_for(lambda: self.server.find(r"^ready\b"), 30, "server", [self.server], self.server)
        return self.server

    def film(self, offset_s: float = 0.0) -> Pictures:
        self.pictures = Pictures(self.graph, offset_s)
        return self.pictures

    def robot(self, **policy) -> str:
        return write_robot(self.folder, policy={"task": "stack", "server": self.address, **policy})

    def start_node(self, *more: Parameter, **policy) -> PolicyNode:
        given = {"robot": self.robot(**policy), "run_dir": str(self.folder / "run")}
        overrides = [*(Parameter(name, value=value) for name, value in given.items()), *more]
        return self.graph.spin(PolicyNode(context=self.graph.context, parameter_overrides=overrides))

    def fail_arms(self, reason: str) -> None:
        self.graph.do(lambda: self.arms.fail(reason))

    def recover_arms(self) -> None:
        self.graph.do(self.arms.recover)

    def call(self, service: str, timeout_s: float = 30.0) -> tuple[bool, str]:
        if service not in self.clients:
            self.clients[service] = self.graph.do(lambda: self.graph.node.create_client(Trigger, service))
        client = self.clients[service]
        assert client.wait_for_service(30.0)
        future = client.call_async(Trigger.Request())
        wait_for(future.done, timeout_s, service)
        return future.result().success, future.result().message

    def running(self, chunks: int = 1) -> None:
        """Start, and wait for so many chunks."""
        assert self.call("/policy/start") == (True, "running: stack")
        self.more(chunks)

    def more(self, chunks: int = 2) -> None:
        before = len(self.arms.chunks)
        wait_for(lambda: len(self.arms.chunks) >= before + chunks, 30, f"{chunks} chunks")

    def refused(self, words: str) -> str:
        """Start until it is refused for this reason (others may be true for a moment); the whole answer."""
        answers = []

        def said() -> bool:
            answers.append(self.call("/policy/start"))
            return not answers[-1][0] and words in answers[-1][1]

        wait_for(said, 20, f"{words!r}, not {answers}")
        return answers[-1][1]

    def wait_let_go(self) -> None:
        wait_for(lambda: self.arms.let_go == 1, 20, "letting go")

    def value(self, key: str) -> str:
        return next((v.value for v in self.statuses[-1].values if v.key == key), "") if self.statuses else ""

    def until(self, state: str, words: str = "", timeout_s: float = 30.0) -> None:
        seen = lambda: self.value("state") == state and words in self.statuses[-1].message  # noqa: E731
        try:
            wait_for(seen, timeout_s, f"{state} {words}")
        except Exception as error:
            last = self.statuses[-1].message if self.statuses else "no status"
            raise AssertionError(f"{error}; last: {self.value('state')}: {last}") from error

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "run" / "policy.jsonl").read_text().splitlines()]

    def close(self) -> None:
        if self.pictures:
            self.pictures.close()
        self.graph.__exit__()
        if self.server:
            self.server.stop()
