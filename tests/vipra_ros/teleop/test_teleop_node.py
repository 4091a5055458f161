"""The teleop node against the arms' interface: lease, chunks, clutch, refusals. No arms, no simulator."""

import math
import runpy
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import JointState
from std_msgs.msg import Float32
from std_srvs.srv import Trigger

from config.loading import ConfigError
from tests.vipra_ros.arms_standin import ARMS, ArmsStandIn
from tests.vipra_ros.graph import HOME, Graph, write_robot
from tests.vipra_ros.teleop.dynamixel_emulator import Bus
from vipra_ros import bringup
from vipra_ros.clock import to_stamp
from vipra_ros.nodes.teleop import AGAIN_S, TeleopNode
from vipra_ros.process import wait_for

pytestmark = pytest.mark.live

HOME = np.array(HOME)


class Gello:
    """GELLO's publishers of both arms, stamped by the wall clock as theirs are."""

    def __init__(self, graph: Graph):
        node = graph.node
        self.joints = {arm: HOME.copy() for arm in ARMS}
        self.opening = dict.fromkeys(ARMS, 1.0)
        self.running = True
        self.stamp_offset_s = 0.0
        self._closing = threading.Event()
        self._states = {
            arm: graph.do(lambda a=arm: node.create_publisher(JointState, f"/{a}/gello/joint_states", 10))
            for arm in ARMS
        }
        self._triggers = {
            arm: graph.do(
                lambda a=arm: node.create_publisher(
                    Float32, f"/{a}/gripper/gripper_client/target_gripper_width_percent", 10
                )
            )
            for arm in ARMS
        }
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.wait(0.04):
            if not self.running:
                continue
            for arm in ARMS:
                message = JointState(name=[f"fr3_joint{i}" for i in range(1, 8)])
                sec, nanosec = to_stamp(time.time() + self.stamp_offset_s)
                message.header.stamp.sec, message.header.stamp.nanosec = sec, nanosec
                message.position = self.joints[arm].tolist()
                if self.opening[arm] is not None:
                    self._triggers[arm].publish(Float32(data=self.opening[arm]))
                self._states[arm].publish(message)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()


class Rig:
    def __init__(self, graph: Graph, robot: str, teleop: str = "gello"):
        self.graph, self.arms = graph, ArmsStandIn(context=graph.context)
        graph.spin(self.arms)
        overrides = [
            Parameter("robot", value=robot),
            Parameter("teleop", value=teleop),
            Parameter("jump_rad", value=0.5),
            Parameter("lost_after_s", value=0.5),  # a busy machine keeps samples waiting
        ]
        self.node = TeleopNode(context=graph.context, parameter_overrides=overrides)
        graph.spin(self.node)
        self.gello = Gello(graph) if teleop == "gello" else None
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.statuses = graph.collect(DiagnosticStatus, "/teleop/status", latched)
        self.clients = {
            name: graph.do(lambda n=name: graph.node.create_client(Trigger, f"/teleop/{n}"))
            for name in ("start", "stop", "pause")
        }

    def close(self) -> None:
        if self.gello is not None:
            self.gello.close()
        self.graph.drop(self.node)
        self.graph.drop(self.arms)

    def call(self, name: str) -> tuple[bool, str]:
        client = self.clients[name]
        assert client.wait_for_service(20.0)
        future = self.graph.do(lambda: client.call_async(Trigger.Request()))
        wait_for(future.done, 15, f"answer of {name}", poll_s=0.005)
        return future.result().success, future.result().message

    def start(self) -> None:
        """A coupling that a busy machine may put off: its leaders must be heard first."""
        wait_for(lambda: self.call("start")[0], 20, "coupled")

    def value(self, key: str) -> str:
        return {v.key: v.value for v in self.statuses[-1].values}[key] if self.statuses else ""

    @property
    def reason(self) -> str:
        return self.statuses[-1].message if self.statuses else ""

    def wait_state(self, *states: str) -> None:
        wait_for(lambda: self.value("state") in states, 15, f"{states}, not {self.reason}", poll_s=0.01)

    def wait_at(self, joints: np.ndarray) -> None:
        def there() -> bool:
            return self.arms.chunks and np.abs(self.arms.chunks[-1][1].joints[-1] - joints).max() < 0.005

        wait_for(there, 20, "there")

    def wait_let_go(self, count: int) -> None:
        wait_for(lambda: self.arms.let_go == count and not self.arms.lease.holder, 20, "let go")


@pytest.fixture
def rig(tmp_path):
    with Graph() as graph:
        rig = Rig(graph, write_robot(tmp_path))
        try:
            wait_for(lambda: rig.value("difference_rad") == "0.000", 20, "leaders and arms")
            yield rig
        finally:
            rig.close()


def test_starting_couples_pausing_lets_go_and_the_hands_follow(rig):
    assert not rig.call("pause")[0]  # nothing to pause
    assert not rig.arms.messages
    rig.start()
    rig.wait_state("FOLLOWING")
    rig.gello.joints = {arm: HOME + 0.05 for arm in ARMS}
    rig.gello.opening["left"] = 0.25
    there = np.tile(HOME + 0.05, 2)
    rig.wait_at(there)
    wait_for(lambda: np.allclose(rig.arms.chunks[-1][1].grippers[-1], [0.25, 1.0]), 20, "hand")
    accepted, chunk = rig.arms.chunks[-1]
    assert chunk.t0 < accepted < chunk.end and chunk.rate_hz == pytest.approx(25.0)
    paused = True, "paused: ~/start or ~/pause couples again"
    assert rig.call("pause") == paused
    assert rig.call("pause") == paused, "a pedal that bounces couples nothing"
    rig.wait_let_go(1)
    rig.wait_state("PAUSED")
    rig.gello.joints = {arm: HOME + 0.4 for arm in ARMS}
    wait_for(lambda: float(rig.value("difference_rad")) > 0.35, 20, "the leader gone")
    time.sleep(AGAIN_S)
    done, text = rig.call("pause")
    assert not done and "rad from its leader, limit 0.3" in text and rig.value("state") == "PAUSED"
    rig.gello.joints = {arm: HOME.copy() for arm in ARMS}
    wait_for(lambda: rig.call("pause")[0], 20, "coupled again")
    rig.wait_state("FOLLOWING")
    assert rig.call("stop")[0]
    rig.wait_let_go(2)
    rig.wait_state("OFF")
    rig.arms.opening = 0.86  # measured: of no interest, only what the hands were told
    told, count = rig.arms.chunks[-1][1].grippers[-1], len(rig.arms.chunks)
    rig.gello.opening["left"] = None
    wait_for(lambda: "left ok, its trigger is silent" in rig.value("leaders"), 20, "a silent trigger")
    assert rig.value("leaders").endswith("right ok")
    rig.gello.opening["left"] = 1.0
    wait_for(lambda: rig.value("left_trigger") == "1.00", 20, "the trigger let go")
    rig.start()
    rig.wait_state("FOLLOWING")
    for _, chunk in rig.arms.chunks[count:]:
        np.testing.assert_array_equal(chunk.grippers, np.tile(told, (len(chunk), 1)))
    assert rig.call("stop")[0]


def test_a_silent_leader_a_jump_and_nan_let_the_arms_go_and_need_a_new_start(rig):
    def spoil(joints=None):
        rig.gello.joints["right"] = joints

    cases = [
        (lambda: setattr(rig.gello, "running", False), "leader lost"),
        (lambda: spoil(HOME + 1.0), "jumped by 1.00 rad"),
        (lambda: spoil(np.full(7, math.nan)), "not finite"),
    ]
    for count, (fault, text) in enumerate(cases, 1):
        rig.start()
        rig.wait_state("FOLLOWING")
        fault()
        rig.wait_state("LOST")
        assert text in rig.reason
        rig.wait_let_go(count)
        rig.gello.running, rig.gello.joints["right"] = True, HOME.copy()
        wait_for(lambda: rig.value("leaders") == "left ok, right ok", 20, "leaders")
        sent = len(rig.arms.messages)
        time.sleep(0.2)
        done, said = rig.call("pause")
        assert not done and said.startswith("lost, ") and said.endswith("~/start couples again")
        assert len(rig.arms.messages) == sent and rig.value("state") == "LOST"


def test_a_wall_clock_that_jumps_moves_nothing(rig):
    rig.start()
    rig.wait_state("FOLLOWING")
    for rig.gello.stamp_offset_s in (3600.0, -7200.0, 0.0):
        time.sleep(0.4)
        assert rig.value("state") == "FOLLOWING", rig.reason
    for _, chunk in rig.arms.chunks:
        np.testing.assert_allclose(chunk.joints, np.tile(HOME, (len(chunk), 2)), atol=1e-6)


def test_faults_and_refusals_of_the_arms_end_it_with_their_reason(rig):
    rig.start()
    rig.wait_state("FOLLOWING")
    rig.arms.refuse = ("holding", "left hand 0.001 m from the table")
    rig.wait_state("LOST")
    assert "left hand 0.001 m from the table" in rig.reason
    rig.arms.refuse = None
    rig.wait_let_go(1)
    rig.start()
    rig.wait_state("FOLLOWING")
    rig.graph.do(lambda: rig.arms.fail("reflex of the left arm"))
    rig.wait_state("LOST")
    assert "reflex of the left arm; /arms/recover, then ~/start" in rig.reason
    done, text = rig.call("start")
    assert not done and "reflex of the left arm" in text
    rig.graph.do(rig.arms.recover)
    rig.start()
    rig.wait_state("FOLLOWING")


def test_another_holder_keeps_the_arms(rig):
    rig.graph.do(lambda: rig.arms.lease.acquire(time.monotonic() + 30.0))
    wait_for(lambda: "another commander holds the lease" in rig.call("start")[1], 20, "the refusal")
    assert rig.value("state") == "OFF" and not rig.arms.chunks


def test_servos_lead_and_an_unplugged_port_lets_go_with_its_reason(tmp_path):
    """The direct driver: emulated servos, the real SDK, the node."""
    offsets = [0.0, 1.571, 3.142, 3.142, 3.142, 4.712, 0.0]
    signs = [1, -1, 1, -1, 1, 1, 1]
    turn = 4096 / (2 * math.pi)

    def counts(joints):
        angles = [*(np.array(signs) * joints + np.array(offsets)), 2.6]
        return {n + 1: round(angle * turn) for n, angle in enumerate(angles)}

    leaders = {
        arm: {"dynamixel": {"port": str(tmp_path / arm), "offsets_rad": offsets, "signs": signs}}
        for arm in ARMS
    }
    teleop = {"source": "dynamixel", "leaders": leaders, "lost_after_s": 0.5}
    (tmp_path / "teleop.yaml").write_text(yaml.safe_dump(teleop))
    with (
        Bus(tmp_path / "left", counts(HOME)),
        Bus(tmp_path / "right", counts(HOME)) as right,
        Graph() as graph,
    ):
        rig = Rig(graph, write_robot(tmp_path), str(tmp_path / "teleop.yaml"))
        rig.start()
        rig.wait_state("FOLLOWING")
        right.counts = counts(HOME + 0.1)
        there = np.hstack([HOME, HOME + 0.1])
        rig.wait_at(there)
        right.unplug()
        rig.wait_state("LOST")
        rig.wait_let_go(1)
        assert "right leader lost" in rig.reason
        wait_for(lambda: "no such device" in rig.call("start")[1], 20, "the cause")
        right.counts = counts(HOME)
        right.plug()
        rig.start()
        rig.wait_state("FOLLOWING")
        rig.close()


def test_a_robot_without_its_leader_is_refused(tmp_path):
    with Graph() as graph:
        overrides = [
            Parameter("robot", value=write_robot(tmp_path)),
            Parameter("teleop", value="gello_single"),
        ]
        with pytest.raises(ConfigError, match="no leader for the left arm"):
            TeleopNode(context=graph.context, parameter_overrides=overrides)


# --- bring-up


def test_the_graph_has_leaders_in_place_of_a_policy():
    def names(given):
        return [p.name for p in bringup.describe("teleop", given).processes]

    assert names({}) == ["camera", "arms", "teleop"]
    assert names({"robot": "sim_bimanual"}) == ["simulator", "camera", "arms", "teleop"]
    single = {"robot": "sim_single", "teleop": "gello_single", "with_camera": "no"}
    assert names(single) == ["simulator", "arms", "teleop"]
    argv = bringup.describe("teleop", single).processes[-1].argv()
    assert 'teleop:="gello_single"' in argv and 'robot:="sim_single"' in argv
    with pytest.raises(ConfigError, match="gello_single has no leader for the left arm"):
        names({"teleop": "gello_single"})
    with pytest.raises(ConfigError, match="unknown argument 'server'"):
        names({"server": "tcp://127.0.0.1:5555"})


def test_launch_file_declares_what_the_graph_takes():
    path = Path(__file__).parents[3] / "launch" / "teleop.launch.py"
    assert callable(runpy.run_path(str(path))["generate_launch_description"])
    declared = bringup.launch_arguments("teleop")
    assert all(description for _, _, description, _ in declared)
    assert bringup.describe("teleop", {name: default for name, default, *_ in declared}).processes
