"""A workcell of a test module's own: the real simulator, the real arms node, and a commander that streams
chunks.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from simulation.control import SimulationControl
from tests.vipra_ros.graph import HOME, Graph
from vipra_ros.clock import SimulatedClock, to_stamp
from vipra_ros.process import Child, wait_for
from vipra_ros.robot.commands import joint_names

ARMS = ("left", "right")
HOMES = np.tile(HOME, len(ARMS))
RATE = 22.0
HORIZON = 14
PYTHON = [sys.executable, "-X", "faulthandler"]
# The real node; SIGUSR1 holds the interpreter lock for 0.8 s while franky's own threads go on.
STALLABLE = """
import ctypes, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: ctypes.PyDLL(None).usleep(800_000))
from vipra_ros.nodes.arms import main
sys.exit(main())
"""


class Cell:
    """Simulator and arms node of one ROS domain."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.graph = Graph()
        slot = self.graph.slot
        self.name = f"{slot.name}_arms"
        self.hosts = {arm: slot.host(i + 1) for i, arm in enumerate(ARMS)}
        self.sim = self.arms = self.clock = None
        self.status: dict[str, str] = {}
        self.reason = self.answer = ""
        self.joints: dict[str, JointState] = {}
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        node = self.graph.node
        node.create_subscription(DiagnosticStatus, "/arms/status", self._on_status, latched)
        for arm in ARMS:
            node.create_subscription(
                JointState, f"/{arm}/joint_states", lambda m, a=arm: self.joints.__setitem__(a, m), 10
            )
        self.commands = {a: node.create_publisher(JointTrajectory, f"/{a}/joint_command", 2) for a in ARMS}
        self.services = {
            s: node.create_client(Trigger, f"/arms/{s}")
            for s in ("acquire_lease", "stop", "recover", "home", "open_hands")
        }
        self.control = SimulationControl(self.name, 10.0)

    # --- processes

    def start_simulator(self) -> None:
        hosts = ",".join(f"{arm}={host}" for arm, host in self.hosts.items())
        argv = [*PYTHON, "-m", "simulation.server", "--name", self.name, "--hostnames", hosts]
        self.sim = Child("simulator", argv, self.folder / "simulator.log")
        with contextlib.suppress(PermissionError):  # what other tests do now must not make the arms late
            os.setpriority(os.PRIO_PROCESS, self.sim.pid, -10)
        wait_for(lambda: self.sim.find("^ready"), 60, "simulator", [self.sim], self.sim)
        self.clock = SimulatedClock(self.name, 10.0)

    def start_arms(self, *states: str) -> None:
        """The arms of a killed node are in a reflex, so the next node comes up in FAULT."""
        self.status, self.joints = {}, {}
        parameters = {"robot": "sim_bimanual", "simulation.name": self.name, "run_dir": str(self.folder)}
        parameters |= {f"arms.{arm}.hostname": host for arm, host in self.hosts.items()}
        argv = [*PYTHON, "-c", STALLABLE, "--ros-args"]
        argv += [word for key, value in parameters.items() for word in ("-p", f"{key}:={value}")]
        self.arms = Child("arms", argv, self.folder / "arms.log", self.graph.env())
        self.wait_state(*(states or ("IDLE",)), timeout_s=60)
        for publisher in self.commands.values():
            wait_for(publisher.get_subscription_count, 20, "subscription", [self.arms], self.arms)

    def close(self) -> None:
        for child in (self.arms, self.sim):
            if child is not None:
                child.stop(4.0)
        self.control.close()
        self.graph.__exit__()

    # --- what the node says

    def _on_status(self, message: DiagnosticStatus) -> None:
        self.status = {v.key: v.value for v in message.values}
        self.reason = message.message

    @property
    def state(self) -> str:
        return self.status.get("state", "")

    def wait(self, condition, what: str, timeout_s: float = 20.0):
        children = [c for c in (self.sim, self.arms) if c is not None and c.returncode() is None]
        try:
            return wait_for(condition, timeout_s, what, children, self.arms, poll_s=0.002)
        except Exception as error:
            error.add_note(f"status {self.status} {self.reason} {self.answer}")
            raise

    def wait_state(self, *states: str, timeout_s: float = 20.0) -> None:
        self.wait(lambda: self.state in states, f"state {states}", timeout_s)

    def wait_rejected(self, seq: int, code: str) -> None:
        start = f"{seq} {code} "
        self.wait(lambda: self.status.get("rejected", "").startswith(start), f"rejection {start!r}", 10)

    def measured(self) -> tuple[np.ndarray, np.ndarray]:
        """q, dq [14] of the newest joint states."""
        messages = [self.joints[arm] for arm in ARMS]
        return np.hstack([m.position[:7] for m in messages]), np.hstack([m.velocity[:7] for m in messages])

    def late_s(self) -> float:
        """Time the reference loop has lost so far because this machine was busy: late and skipped ticks."""
        return 0.005 * int(self.status["late_ticks"])

    def faults(self) -> list[dict]:
        return json.loads(self.status["faults"])

    # --- what the node is told

    def call(self, service: str) -> tuple[bool, str]:
        client = self.services[service]
        assert client.wait_for_service(20.0), f"no service {service}"
        future = client.call_async(Trigger.Request())
        self.wait(future.done, f"answer of {service}", 15)
        return future.result().success, future.result().message

    def acquire(self) -> "Commander":
        granted, text = self.call("acquire_lease")
        assert granted, text
        return Commander(self, text)

    def ready(self) -> None:
        """Back to IDLE and at rest from whatever the last test left."""
        for arm in ARMS:
            self.control.clear_fault(arm)
        if self.sim.returncode() is None and (self.arms is None or self.arms.returncode() is not None):
            self.start_arms("IDLE", "FAULT")
        self.wait(lambda: self.joints.keys() == set(ARMS), "joint states")
        if self.status["lease"]:  # a test that failed did not let go
            self.call("stop")
            self.wait_state("STOPPED", "FAULT")
        if self.state in ("STOPPING", "STOPPED", "FAULT", "RECOVERING"):
            self.recover()
        self.wait_state("IDLE", "HOLDING")
        self.wait(lambda: np.abs(self.measured()[1]).max() < 0.02, "rest")
        if np.abs(self.measured()[0] - HOMES).max() > 0.3:
            self.wait(lambda: self.call("home")[0], "home accepted")
            self.wait(lambda: self.state == "IDLE" and "at home" in self.reason, "home", 40)

    def recover(self) -> str:
        """The answer, once it is done: as long as the arms still swing it is refused."""
        self.answer = ""

        def recovered() -> bool:
            done, self.answer = self.call("recover")
            return done

        self.wait(recovered, "recovery")
        return self.answer

    @contextlib.contextmanager
    def record(self):
        """The simulator's 1 kHz record of the block, filled in at its end."""
        record: dict[str, np.ndarray] = {}
        self.control.record_start(120.0)
        try:
            yield record
        finally:
            path = self.control.record_stop(self.folder / "record")["path"]
            with np.load(path) as file:
                record.update({key: file[key] for key in file.files})

    @contextlib.contextmanager
    def cruising(self, speed: float = 0.5, joint: int = 0, **options):
        """Inside, both arms' `joint` moves at `speed` rad/s towards the middle of its range and beyond."""
        with self.acquire().streaming(speed, joint, **options) as commander:
            moving = [joint, joint + 7]
            self.wait(
                lambda: (np.abs(self.measured()[1][moving]) > 0.97 * speed).all(), f"{speed} rad/s", 15.0
            )
            yield commander


class Commander:
    """The holder of a lease."""

    def __init__(self, cell: Cell, lease: str):
        self.cell, self.lease, self.seq = cell, lease, 0
        self._sending = threading.Lock()  # a stream's thread, and the test

    def send(self, joints, grippers, t0: float, rate: float = RATE, **change) -> int:
        """One chunk, `joints` [H, 14] rad, `grippers` [H, 2]. `change` spoils it: tag, names, arms, skip."""
        with self._sending:
            seq = self.seq + change.get("skip", 0)
            self.seq = seq + 1
        sec, nanosec = to_stamp(t0)
        for i, arm in enumerate(ARMS):
            if arm not in change.get("arms", ARMS):
                continue
            message = JointTrajectory(joint_names=change.get("names", {}).get(arm, joint_names(arm)))
            message.header.frame_id = change.get("tag", f"{self.lease}:{seq}")
            message.header.stamp = Time(sec=sec, nanosec=nanosec)
            for k, row in enumerate(joints):
                sec_k, nanosec_k = to_stamp(k / rate)
                values = [*map(float, row[7 * i : 7 * i + 7]), float(grippers[k][i])]
                point = JointTrajectoryPoint(positions=values)
                point.time_from_start = Duration(sec=sec_k, nanosec=nanosec_k)
                message.points.append(point)
            self.cell.commands[arm].publish(message)
        return seq

    def let_go(self) -> None:
        for arm in ARMS:
            message = JointTrajectory()
            message.header.frame_id = f"{self.lease}:{self.seq}"
            self.cell.commands[arm].publish(message)
        self.seq += 1

    def hold_chunk(self, offset: float = 0.0, **change) -> int:
        """A chunk that stays where the arms are (plus `offset` rad on joint 1 of each)."""
        joints = np.tile(self.cell.measured()[0], (HORIZON, 1))
        joints[:, [0, 7]] += offset
        return self.send(joints, np.ones((HORIZON, 2)), self.cell.clock.now() + 0.05, **change)

    @contextlib.contextmanager
    def streaming(self, speed: float, joint: int = 0, step: float = 0.0, path=None, gripper=None):
        """Inside, chunks of 14 go out every 7 actions, along `path(t)` [n] -> [n, 14] rad from rest.

        Default path: both arms' `joint` up to `speed` rad/s in 0.4 s. `step`: rad by which every second chunk
        is off. `gripper(t)` [n] -> [n, 2] opening, default open.
        """
        q0 = self.cell.measured()[0]
        moving = [joint, joint + 7]
        speed = -speed * np.sign(q0[joint]) if abs(q0[joint]) > 0.01 else speed

        def ramp(t):
            q = np.tile(q0, (len(t), 1))
            t, rise = np.maximum(t, 0.0), 0.4
            up = np.where(t < rise, t / 2 - rise / (2 * np.pi) * np.sin(np.pi * t / rise), t - rise / 2)
            q[:, moving] += speed * up[:, None]
            return q

        path = path or ramp
        gripper = gripper or (lambda t: np.ones((len(t), 2)))
        clock, stopping = self.cell.clock, threading.Event()
        start = clock.now() + 0.1
        self.start = start

        def run():
            k = 0
            while not stopping.is_set():
                t = (7 * k + np.arange(HORIZON)) / RATE
                joints = path(t)
                joints[:, moving] += step * (k % 2)
                self.send(joints, gripper(t), start + t[0])
                k += 1
                while clock.now() < start + 7 * k / RATE - 0.1 and not stopping.wait(0.005):
                    pass

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stopping.set()
            thread.join(5.0)


@pytest.fixture(scope="module")
def running_cell(tmp_path_factory):
    cell = Cell(tmp_path_factory.mktemp("cell"))
    try:
        cell.start_simulator()
        cell.start_arms()
        yield cell
    finally:
        cell.close()


@pytest.fixture
def cell(running_cell):
    """The module's workcell, idle and at rest."""
    running_cell.ready()
    yield running_cell
    if running_cell.arms.returncode() is None:
        running_cell.arms.signal(signal.SIGCONT)
    running_cell.sim.signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def simulator(tmp_path_factory):
    """A simulator of the module's own, nobody connected to its arms."""
    cell = Cell(tmp_path_factory.mktemp("simulator"))
    try:
        cell.start_simulator()
        yield cell
    finally:
        cell.close()
