"""The evaluation node's services are the operator's keys; the launch file loads without `launch`."""

import runpy
from pathlib import Path

import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from std_srvs.srv import Trigger

from tests.vipra_ros.graph import Graph, write_robot
from vipra_ros.evaluation.rig import played
from vipra_ros.monitor import Status
from vipra_ros.nodes.evaluation import KEYS, EvaluationNode, Parameters
from vipra_ros.nodes.policy import PolicyNode
from vipra_ros.process import free_port, wait_for

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[3]


def test_services_are_keys_in_the_order_they_were_called():
    with Graph() as graph:
        overrides = [Parameter("seeds", value="3:5"), Parameter("time_limit_s", value=30)]
        node = EvaluationNode(context=graph.context, parameter_overrides=overrides)
        graph.spin(node)
        assert node.given == Parameters(seeds="3:5", time_limit_s=30.0)
        assert node.note() == ""
        node.set_parameters([Parameter("note", value="slipped")])
        assert node.note() == "slipped"
        pressed = node.pressed()
        assert next(pressed) == ""
        for name in ("start", "success", "note", "keep", "halt"):
            service = f"/evaluation/{name}"
            client = graph.do(lambda service=service: graph.node.create_client(Trigger, service))
            assert client.wait_for_service(20.0)
            future = client.call_async(Trigger.Request())
            wait_for(future.done, 20.0, name)
            assert future.result().success
        assert [next(pressed) for _ in range(5)] == ["\n", "s", "n", "k", " "]
        assert sorted(KEYS.values()) == sorted("spfaknouq \n")  # none has two meanings


def test_the_policy_node_tells_how_it_plays(tmp_path):
    told = {"mode": "synchronous", "anchor": "append", "action_rate_hz": 3.5}
    told |= {"replan_after": 14, "min_cycle_s": 2.0}
    robot = write_robot(tmp_path, policy={"server": f"tcp://127.0.0.1:{free_port()}", **told})
    with Graph() as graph:
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        statuses = graph.collect(DiagnosticStatus, "/policy/status", latched)
        graph.spin(PolicyNode(context=graph.context, parameter_overrides=[Parameter("robot", value=robot)]))
        wait_for(lambda: statuses, 20.0, "a status")
        status = Status(0, "", {value.key: value.value for value in statuses[0].values})
    assert played(status) == told | {"model": "", "checkpoint": ""}


def test_the_launch_file_offers_every_parameter():
    loaded = runpy.run_path(str(ROOT / "launch" / "evaluate.launch.py"))
    assert loaded["ARGUMENTS"].keys() == Parameters.model_fields.keys() - {"note"}
    assert callable(loaded["generate_launch_description"])
