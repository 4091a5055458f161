"""Evaluation node: an operator's trials on a running graph, by services instead of keys.

Services `~/start`, `~/success`, `~/partial`, `~/fail`, `~/abort`, `~/keep`, `~/note`, `~/undo`,
`~/open_hands`, `~/halt` and `~/leave` are the keys of `vipra evaluate --operator`; `~/status` tells what is
to be done now. Parameters as that command's options, and `note`, which may change while it runs: the text
that `~/note` adds. The trials themselves, their files and their report are `vipra_ros.evaluation`'s.
"""

import contextlib
import queue
import sys
import threading
from pathlib import Path
from typing import Literal

import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from pydantic import Field
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.signals import SignalHandlerOptions
from std_srvs.srv import Trigger

from config.loading import ConfigError, Strict, load
from config.task import Task
from vipra_ros.evaluate import keys_of, limit_of
from vipra_ros.evaluation.ledger import EvaluationError
from vipra_ros.evaluation.live import run
from vipra_ros.parameters import declare
from vipra_ros.process import ProcessError, die_with_parent

KEYS = {
    **{"start": "\n", "keep": "k", "success": "s", "partial": "p", "fail": "f", "abort": "a"},
    **{"note": "n", "undo": "u", "open_hands": "o", "halt": " ", "leave": "q"},
}


class Parameters(Strict):
    """As the options of `vipra evaluate`."""

    task: str = Field("stack_cups", description="file in config/tasks, or its path")
    policy: str = Field("policy", description="name of the policy in the report")
    seeds: str = Field("0:24", description="trials A:B, A to B - 1, or a file of them")
    split: Literal["seen", "unseen", "both"] = "seen"
    robot: str = Field("", description="file in config/robots; empty: franka_ and the task's workcell")
    time_limit_s: float = Field(0.0, ge=0, description="of a trial; 0: the task's")
    out: str = Field("", description="folder of the report; an evaluation there goes on")
    note: str = Field("", description="what ~/note adds; may change while it runs")


class EvaluationNode(Node):
    """Services in, keys out (`pressed`); what the operator is told goes to `~/status` and the log."""

    def __init__(self, **options):
        super().__init__("evaluation", **options)
        self.given = declare(self, Parameters(), writable=("note",))
        self._keys: queue.Queue[str] = queue.Queue()
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._status = self.create_publisher(DiagnosticStatus, "~/status", latched)
        for name, key in KEYS.items():
            self.create_service(
                Trigger, f"~/{name}", lambda _, r, name=name, key=key: self._press(r, name, key)
            )

    def _press(self, response: Trigger.Response, name: str, key: str) -> Trigger.Response:
        self._keys.put(key)
        response.success, response.message = True, f"{name}: taken; ~/status tells what came of it"
        return response

    def pressed(self):
        """Keys as they come, "" while none does."""
        while rclpy.ok(context=self.context):
            try:
                yield self._keys.get(timeout=0.05)
            except queue.Empty:
                yield ""

    def note(self) -> str:
        return self.get_parameter("note").value

    def tell(self, text: str) -> None:
        self._status.publish(DiagnosticStatus(level=DiagnosticStatus.OK, name="evaluation", message=text))
        self.get_logger().info(text)


def main() -> int:
    """Until every trial is scored and left; 2 for a wrong configuration."""
    die_with_parent()
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    executor, node = SingleThreadedExecutor(), None

    def spin() -> None:
        with contextlib.suppress(ExternalShutdownException):
            executor.spin()

    try:
        node = EvaluationNode()
        executor.add_node(node)
        threading.Thread(target=spin, name="services", daemon=True).start()
        given = node.given
        if not given.out:
            raise ConfigError("parameter out is empty: name a folder (out:=runs/robot)")
        task = load(Task, given.task)
        return run(
            task,
            given.policy,
            given.robot or f"franka_{task.workcell}",
            keys_of(given.seeds, given.split),
            limit_of(task, given.time_limit_s or None),
            Path(given.out),
            node.pressed(),
            node.tell,
            node.note,
        )
    except (ConfigError, EvaluationError, ProcessError, OSError) as error:
        print(f"evaluation: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        executor.shutdown(timeout_sec=2.0)
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
