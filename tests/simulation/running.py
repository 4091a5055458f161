"""Starting a real simulator process for a test, and moving its arms with franky."""

import contextlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import franky
import numpy as np

from simulation.control import SimulationControl
from simulation.state import SharedState


class Running:
    """A simulator process with its control client."""

    def __init__(
        self, slot, workcell: str = "bimanual", arguments=(), name: str | None = None, first_host: int = 1
    ):
        arms = ("left", "right") if workcell == "bimanual" else ("right",)
        self.name = name or slot.name
        self.hosts = {arm: slot.host(first_host + k) for k, arm in enumerate(arms)}
        hostnames = ",".join(f"{arm}={host}" for arm, host in self.hosts.items())
        command = [sys.executable, "-m", "simulation.server", "--workcell", workcell, "--name", self.name]
        self.process = subprocess.Popen(
            [*command, "--hostnames", hostnames, "--die-with-parent", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with contextlib.suppress(PermissionError):  # what this process does must not make the arms late
            os.setpriority(os.PRIO_PROCESS, self.process.pid, -10)
        self.ready = self.process.stdout.readline()
        self.control = SimulationControl(self.name)

    def state(self) -> SharedState:
        return SharedState.attach(self.name, 5.0)

    def arm(self, name: str) -> dict:
        return self.control.status()["arms"][name]

    def end(self) -> tuple[int, str]:
        """Stop it; (exit status, what it wrote to stderr)."""
        self.control.close()
        if self.process.poll() is None:
            self.process.terminate()
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


@contextmanager
def running(slot, *arguments, **keywords):
    simulator = Running(slot, *arguments, **keywords)
    try:
        yield simulator
    finally:
        simulator.end()


def connect(host: str, patience_s: float = 5.0) -> franky.Robot:
    """A connection; tried again while the arm may not have noticed yet that its last client is gone."""
    give_up = time.monotonic() + patience_s
    while True:
        try:
            robot = franky.Robot(host, realtime_config=franky.RealtimeConfig.Ignore)
        except franky.NetworkException:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)
        else:
            robot.relative_dynamics_factor = 0.2
            return robot


def move(robot: franky.Robot, q, attempts: int = 5) -> None:
    """Go to `q`, rad [7]; again where a busy machine starved the client and broke the rule of 20 packets."""
    for attempt in range(attempts):
        try:
            return robot.move(franky.JointMotion(q))
        except franky.ControlException as error:
            if "communication_constraints_violation" not in str(error) or attempt == attempts - 1:
                raise
            robot.recover_from_errors()


def tracker(robot: franky.Robot) -> franky.JointImpedanceTracker:
    """Holding the arm: what is injected from now on meets a motion that has begun."""
    motion = franky.JointImpedanceTracker(robot, stiffness=np.full(7, 600.0), damping=np.full(7, 49.0))
    wait_for(lambda: robot.is_in_control and robot.state.robot_mode == franky.RobotMode.Move)
    return motion


def wait_for(condition, timeout_s: float = 10.0, what: str = "the condition"):
    """The condition's first true value; fails after `timeout_s` of wall time."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true in {timeout_s} s"
        time.sleep(0.01)


# A client of its own that drives joint 1 of one arm at 0.5 rad/s for up to 1.6 s, to be stopped by force. It
# prints `moving` once the arm has got there.
DRIVER = """
import sys, time
import numpy as np
from tests.simulation.running import connect, tracker
robot = connect(sys.argv[1])
q0 = np.array(robot.state.q)
with_feed_forward = tracker(robot)
start = time.monotonic()
said = False
while (t := time.monotonic() - start) < 2.0:
    speed = 0.5 * min(1.0, t / 0.4)
    q, dq = q0.copy(), np.zeros(7)
    q[0] += 0.5 * (t * t / 0.8 if t < 0.4 else t - 0.2)
    dq[0] = speed
    with_feed_forward.set_target(q, dq)
    if t > 0.7 and not said:
        print("moving", flush=True)
        said = True
    time.sleep(0.004)
"""


def start_driver(host: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", DRIVER, host], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "moving\n"
    return process
