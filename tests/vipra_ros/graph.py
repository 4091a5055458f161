"""A ROS graph of a test's own: its own domain, its nodes spun by one background executor."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import rclpy
import yaml
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node

from vipra_ros.process import reserve_slot, wait_for

HOME = [0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398]


class Graph:
    """`node` is the test's own; `spin` adds others. Close it, or use it as a context manager."""

    def __init__(self):
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        self.slot = reserve_slot()
        self.context = Context()
        rclpy.init(args=[], context=self.context, domain_id=self.slot.domain)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.node = Node("test", context=self.context)
        self.executor.add_node(self.node)
        self._nodes = [self.node]
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self.executor.spin()

    def do(self, work: Callable):
        """Run `work` in the executor's thread and return what it returns.

        Nodes, clients and subscriptions that another thread adds while the executor waits can leave it
        waiting for ever.
        """
        task = self.executor.create_task(work)
        wait_for(task.done, 30.0, "the executor", poll_s=0.002)
        return task.result()

    def spin(self, node: Node) -> Node:
        self._nodes.append(node)
        self.do(lambda: self.executor.add_node(node))
        return node

    def drop(self, node: Node) -> None:
        self._nodes.remove(node)
        self.do(lambda: self.executor.remove_node(node))
        node.destroy_node()

    def env(self) -> dict[str, str]:
        """Environment of a child process in this graph."""
        return {"ROS_DOMAIN_ID": str(self.slot.domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}

    def collect(self, kind: type, topic: str, qos) -> list:
        """A list that grows with each message on `topic`."""
        messages: list = []
        self.do(lambda: self.node.create_subscription(kind, topic, messages.append, qos))
        return messages

    def __enter__(self) -> "Graph":
        return self

    def __exit__(self, *_) -> None:
        self.executor.shutdown(timeout_sec=5.0)
        self._thread.join(timeout=5.0)
        for node in reversed(self._nodes):
            node.destroy_node()
        self.context.try_shutdown()
        self.slot.release()


def write_robot(folder: Path, **sections) -> str:
    """A robot file without simulator: two arms of the bimanual embodiment; `sections` replace or add."""
    arms = {
        side: {"hostname": f"127.99.0.{i + 1}", "home_rad": HOME} for i, side in enumerate(("left", "right"))
    }
    robot = {
        "embodiment": "franka_bimanual",
        "workcell": "bimanual",
        "safety": "fr3",
        "clock": "monotonic",
        "arms": arms,
        "camera": {"source": "file", "path": "none.mp4", "width": 64, "height": 48, "rate_hz": 30},
        **sections,
    }
    path = folder / "robot.yaml"
    path.write_text(yaml.safe_dump(robot))
    return str(path)
