"""The evaluation node's services are the operator's keys; the launch file loads without `launch`."""

import runpy
from pathlib import Path

from rclpy.parameter import Parameter
from std_srvs.srv import Trigger

from tests.vipra_ros.graph import Graph
from vipra_ros.nodes.evaluation import KEYS, PARAMETERS, EvaluationNode
from vipra_ros.process import wait_for

ROOT = Path(__file__).parents[3]


def test_services_are_keys_in_the_order_they_were_called():
    with Graph() as graph:
        overrides = [Parameter("seeds", value="3:5")]
        node = EvaluationNode(context=graph.context, parameter_overrides=overrides)
        graph.spin(node)
        assert node.given == PARAMETERS | {"seeds": "3:5"}
        pressed = node.pressed()
        assert next(pressed) == ""
        for name in ("start", "success", "keep", "halt"):
            service = f"/evaluation/{name}"
            client = graph.do(lambda service=service: graph.node.create_client(Trigger, service))
            assert client.wait_for_service(20.0)
            future = client.call_async(Trigger.Request())
            wait_for(future.done, 20.0, name)
            assert future.result().success
        assert [next(pressed) for _ in range(4)] == ["\n", "s", "k", " "]
        assert sorted(KEYS.values()) == sorted("spfakuq \n")  # none has two meanings


def test_the_launch_file_offers_every_parameter():
    loaded = runpy.run_path(str(ROOT / "launch" / "evaluate.launch.py"))
    assert loaded["ARGUMENTS"].keys() == PARAMETERS.keys() and callable(loaded["generate_launch_description"])
