"""Every part at once: simulator, camera, arms, policy node and policy server; and losing one at a time."""

import contextlib
import json
import signal
import sys

import pytest

from simulation.control import SimulationControl
from vipra_ros import bringup
from vipra_ros.monitor import CallFailed, Monitor
from vipra_ros.process import Child, free_port, reserve_slot, wait_for

pytestmark = pytest.mark.live


class System:
    """The bimanual graph on addresses of its own; `child(name)` is one of its processes."""

    def __init__(self, folder):
        self.folder = folder
        self.slot = reserve_slot()
        self.address = f"tcp://127.0.0.1:{free_port()}"
        given = {"robot": "sim_bimanual", "server": self.address, "run_dir": str(folder), "rate": 15}
        self.graph = bringup.describe(
            "bimanual",
            given,
            {
                "simulation.name": self.slot.name,
                "arms.left.hostname": self.slot.host(1),
                "arms.right.hostname": self.slot.host(2),
                "policy.camera_timeout_s": 1.0,  # other tests may slow this machine
            },
        )
        self.environment = {"ROS_DOMAIN_ID": str(self.slot.domain)}
        self.children: dict[str, Child] = {}

    def serve(self) -> None:
        argv = [sys.executable, "-m", "tests.vipra_ros.serve_moves", self.address]
        self.children["server"] = Child("server", argv, self.folder / "server.log")

    def start(self, name: str) -> Child:
        process = next(p for p in self.graph.processes if p.name == name)
        env = {**self.graph.environ(process), **self.environment}
        self.children[name] = Child(name, process.argv(), self.folder / f"{name}.log", env)
        return self.children[name]

    def kill(self, name: str) -> None:
        child = self.children.pop(name)
        child.signal(signal.SIGKILL)
        child.stop()

    def close(self) -> None:
        for name in ("policy", "camera", "arms", "server", "simulator"):
            if name in self.children:
                self.children[name].stop()
        self.slot.release()


@pytest.fixture
def system(tmp_path):
    system = System(tmp_path)
    try:
        yield system
    finally:
        system.close()


def test_lost_camera_and_server_hold_the_arms_until_they_return_and_a_stop_needs_recover_and_start(system):
    system.serve()
    simulator = system.start("simulator")
    wait_for(lambda: simulator.find(r"^ready\b"), 60, "simulator", [simulator], simulator)
    for name in ("camera", "arms", "policy"):
        system.start(name)
    control = SimulationControl(system.slot.name)
    with Monitor(system.slot.domain, "LOCALHOST") as monitor:

        def value(node: str, key: str) -> str:
            status = monitor.status(node)
            return status.values.get(key, "") if status else ""

        def until(policy: str, arms: tuple[str, ...], words: str = "") -> None:
            def reached() -> bool:
                said = monitor.status("policy")
                right = value("policy", "state") == policy and value("arms", "state") in arms
                return right and words in said.message

            try:
                wait_for(reached, 60, f"policy {policy} and arms {arms}", list(system.children.values()))
            except Exception as error:
                error.add_note(f"{monitor.status('policy')} {monitor.status('arms')}")
                raise

        def accepted() -> int:
            return int(value("arms", "accepted_seq") or -1)

        def moving() -> None:
            until("RUNNING", ("RUNNING",))
            now = accepted()
            wait_for(lambda: accepted() >= now + 3, 60, "chunks", list(system.children.values()))

        def call(service: str) -> None:
            def done() -> bool:
                with contextlib.suppress(CallFailed):  # it may not have heard yet what we have
                    return bool(monitor.call(service, 30.0))
                return False

            wait_for(done, 60, service)

        wait_for(
            lambda: value("arms", "state") == "IDLE" and monitor.frames_per_second(), 60, "arms and camera"
        )
        call("/policy/start")
        moving()

        system.kill("camera")
        until("WAITING", ("HOLDING",), "camera lost")
        system.start("camera")
        moving()

        system.kill("server")
        until("WAITING", ("HOLDING",), "no policy server")
        system.serve()
        moving()

        monitor.call("/arms/stop", 10.0)
        until("STOPPED", ("STOPPED",), "/arms/recover")
        call("/arms/recover")
        until("STOPPED", ("IDLE",))
        call("/policy/start")
        moving()

        monitor.call("/policy/stop", 10.0)
        until("IDLE", ("IDLE", "HOLDING"))
        assert json.loads(value("arms", "faults")) == []
    control.close()
