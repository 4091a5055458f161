"""GELLO's topics -> teleop node -> arms node -> simulated arm: follows, and stops when GELLO is unplugged."""

import threading

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import JointState
from std_msgs.msg import Float32
from std_srvs.srv import Trigger

from tests.vipra_ros.graph import HOME, Graph
from vipra_ros import bringup
from vipra_ros.clock import SimulatedClock
from vipra_ros.nodes.messages import seconds, stamp
from vipra_ros.process import wait_for

pytestmark = pytest.mark.live

SPEED = np.array([0.3, 0.1, -0.2, 0.1, 0.3, 0.1, 0.5])  # rad/s, largest
PERIOD_S = 3.0


class Leader:
    """A GELLO at 25 Hz of simulated time: home plus `offset`, and a slow sine from `swing` on."""

    def __init__(self, graph: Graph, clock: SimulatedClock):
        node = graph.node
        self._states = graph.do(lambda: node.create_publisher(JointState, "/gello/joint_states", 10))
        self._trigger = graph.do(
            lambda: node.create_publisher(Float32, "/gripper/gripper_client/target_gripper_width_percent", 10)
        )
        self._clock = clock
        self.offset, self.swing, self.plugged = np.zeros(7), np.inf, True
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def at(self, t):
        """[..., 7] rad at simulated time `t`."""
        since = np.maximum(np.asarray(t)[..., None] - self.swing, 0.0)
        w = 2 * np.pi / PERIOD_S
        return np.array(HOME) + self.offset + SPEED / w * np.sin(w * since) * np.minimum(since, 1.0)

    def _run(self) -> None:
        due = self._clock.now()
        while not self._closing.is_set():
            due = max(due + 0.04, self._clock.now() - 0.04)
            self._clock.sleep_until(due)
            if not self.plugged:
                continue
            t = self._clock.now()
            message = JointState(name=[f"fr3_joint{i}" for i in range(1, 8)], position=self.at(t).tolist())
            message.header.stamp = stamp(t)
            self._trigger.publish(Float32(data=1.0))
            self._states.publish(message)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()


@pytest.fixture
def live(tmp_path):
    with Graph() as graph:
        slot = graph.slot
        given = {"robot": "sim_single", "teleop": "gello_single", "with_camera": "no"}
        described = bringup.describe(
            "teleop", given, {"simulation.name": slot.name, "arms.right.hostname": slot.host(1)}
        )
        with bringup.running(described, tmp_path, graph.env()):
            clock = SimulatedClock(slot.name, 20.0)
            leader = Leader(graph, clock)
            try:
                yield graph, clock, leader
            finally:
                leader.close()
                clock.close()


def test_follows_a_sine_a_known_time_behind_stops_when_unplugged_and_couples_again(live):
    graph, clock, leader = live
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    statuses = graph.collect(DiagnosticStatus, "/teleop/status", latched)
    arms = graph.collect(DiagnosticStatus, "/arms/status", latched)
    track = graph.collect(JointState, "/right/joint_states", qos_profile_sensor_data)
    client = graph.do(lambda: graph.node.create_client(Trigger, "/teleop/start"))

    def value(messages, key):
        return {v.key: v.value for v in messages[-1].values}[key] if messages else ""

    def start() -> tuple[bool, str]:
        assert client.wait_for_service(30.0)
        future = graph.do(lambda: client.call_async(Trigger.Request()))
        wait_for(future.done, 20, "answer of start", poll_s=0.005)
        return future.result().success, future.result().message

    def wait_state(state):
        said = f"{state}, not {statuses[-1].message if statuses else None}"
        wait_for(lambda: value(statuses, "state") == state, 30, said, poll_s=0.005)

    def measured(since: float):
        wait_for(lambda: track and seconds(track[-1].header.stamp) > since, 30, "joint states")
        rows = [(seconds(m.header.stamp), *m.position[:7], *m.velocity[:7]) for m in list(track)]
        rows = np.array([row for row in rows if row[0] >= since])
        return rows[:, 0], rows[:, 1:8], rows[:, 8:]

    # coupling: not from afar, then slowly
    leader.offset = np.full(7, 0.35)
    wait_for(lambda: value(statuses, "difference_rad") not in ("", "nan"), 60, "leader and arm")
    wait_for(lambda: "limit 0.3" in start()[1], 30, "a refusal")
    leader.offset = np.array([0.2, 0.1, 0, 0, 0, 0, -0.2])
    began = clock.now()
    wait_for(lambda: start()[0], 30, "coupled")
    wait_state("FOLLOWING")
    assert np.abs(measured(began)[2]).max() < 0.25

    # following
    leader.swing = clock.now() + 0.5
    wait_for(lambda: clock.now() > leader.swing + 2.3 * PERIOD_S, 90, "some swings")
    t, q, _ = measured(leader.swing + 1.0)
    lags = np.arange(0.08, 0.3, 0.002)
    errors = [np.sqrt(np.mean((q - leader.at(t - lag)) ** 2)) for lag in lags]
    lag, rms = float(lags[np.argmin(errors)]), float(min(errors))
    print(f"lag {1000 * lag:.0f} ms, RMS error {1000 * rms:.2f} mrad, {value(statuses, 'refused')} refused")
    assert value(statuses, "state") == "FOLLOWING", statuses[-1].message
    assert rms < 0.01 and lag < 0.22

    # unplugged in the middle of a swing
    leader.plugged = False
    unplugged = clock.now()
    wait_state("LOST")
    assert "leader lost: no sample" in statuses[-1].message
    wait_for(lambda: clock.now() > unplugged + 1.5, 30, "the stop")
    t, q, dq = measured(unplugged)
    assert np.abs(dq[t > unplugged + 1.2]).max() < 0.02
    assert np.abs(q[t > unplugged + 0.6] - q[-1]).max() < 0.01
    assert value(arms, "faults") == "[]" and value(arms, "state") in ("IDLE", "HOLDING")

    # plugged in again: nothing moves until the operator couples, near the arm
    leader.plugged = True
    where = q[-1]
    leader.swing, leader.offset = np.inf, where - np.array(HOME) + 0.5
    wait_for(lambda: "rad from its leader" in start()[1], 30, "a refusal")
    leader.offset = where - np.array(HOME) + 0.1
    wait_for(lambda: start()[0], 30, "coupled again")
    wait_state("FOLLOWING")
    wait_for(lambda: np.abs(measured(0.0)[1][-1] - leader.at(0.0)).max() < 0.02, 30, "the arm at its leader")
    assert value(arms, "faults") == "[]"
