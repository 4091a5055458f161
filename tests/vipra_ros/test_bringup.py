"""The graph is described once, and what was started is stopped, however the end comes."""

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from config.loading import ConfigError
from vipra_ros import bringup
from vipra_ros.process import wait_for

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
FILES = {"bimanual": "bimanual", "single": "single_arm", "policy_server": "policy_server"}


def names(graph):
    return [process.name for process in graph.processes]


# --- the description


def test_simulated_robot_brings_its_simulator_and_starts_it_first():
    graph = bringup.describe("bimanual", {"robot": "sim_bimanual", "policy": "vipra_tiny_bimanual"})
    assert names(graph) == ["policy_server", "simulator", "camera", "arms", "policy"]
    simulator = graph.processes[1]
    assert [process.name for process in graph.processes if process.first] == ["simulator"]
    assert "left=127.77.0.1,right=127.77.0.2" in simulator.arguments and simulator.ready
    assert sum(a == "--home" for a in simulator.arguments) == 2


def test_hardware_is_the_default_and_needs_no_simulator():
    assert names(bringup.describe("bimanual", {})) == ["camera", "arms", "policy"]
    assert names(bringup.describe("single", {})) == ["camera", "arms", "policy"]


def test_arguments_reach_robot_and_nodes():
    given = {
        "left_ip": "10.0.0.1",
        "right_ip": "10.0.0.2",
        "camera": "file",
        "camera_path": "/tmp/a.mp4",
        "server": "tcp://10.0.0.9:5555",
        "rate": "11",
        "replan_after": "14",
        "task": 'say "hi": {x}',
        "discovery": "SUBNET",
    }
    graph = bringup.describe("bimanual", given)
    robot = graph.robot
    assert (robot.arms["left"].hostname, robot.arms["right"].hostname) == ("10.0.0.1", "10.0.0.2")
    assert (robot.camera.source, robot.camera.path) == ("file", "/tmp/a.mp4")
    assert (robot.policy.server, robot.policy.action_rate_hz) == ("tcp://10.0.0.9:5555", 11.0)
    assert (robot.policy.replan_after, robot.policy.task) == (14, 'say "hi": {x}')
    assert graph.environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "SUBNET"
    assert r'policy.task:="say \"hi\": {x}"' in graph.processes[-1].argv()


@pytest.mark.parametrize(
    ("preset", "cycle_s", "expected"),
    [
        ("3.5hz", 2.0, ("synchronous", 15.0, 7)),
        ("7hz", 2.0, ("synchronous", 15.0, 14)),
        ("22hz", 0.0, ("asynchronous", 22.0, 14)),
    ],
)
def test_a_preset_is_the_papers_protocol_and_other_arguments_go_before_it(preset, cycle_s, expected):
    policy = bringup.describe("bimanual", {"preset": preset}).robot.policy
    assert (policy.mode, policy.action_rate_hz, policy.replan_after) == expected
    assert policy.min_cycle_s == cycle_s
    slower = bringup.describe("bimanual", {"preset": preset, "rate": "5"}).robot.policy
    assert (slower.action_rate_hz, slower.replan_after) == (5.0, expected[2])


def test_single_arm_has_one_address():
    graph = bringup.describe("single", {"robot_ip": "10.0.0.3"})
    assert [arm.hostname for arm in graph.robot.arms.values()] == ["10.0.0.3"]


def test_discovery_stays_on_this_machine_unless_opened():
    for kind in ("bimanual", "single"):
        assert bringup.describe(kind, {}).environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("bimanual", {"robot": "franka_single"}, "vipra up single"),
        ("bimanual", {"robot_ip": "10.0.0.1"}, "unknown argument 'robot_ip'"),
        ("bimanual", {"rate": "23"}, "action_rate_hz"),
        ("bimanual", {"rate": "fast"}, "rate"),
        ("bimanual", {"replan_after": "9"}, "replan_after"),
        ("bimanual", {"camera": "sim"}, "camera source 'sim' needs a simulation"),
        ("bimanual", {"policy": "vipra_7b", "server": "tcp://10.0.0.9:5555"}, "leave `policy` empty"),
        ("single", {"robot": "elsewhere.yaml"}, "no such file"),
        (
            "single",
            {"robot": "franka_bimanual", "robot_ip": "10.0.0.1"},
            "has 2 arm(s): use vipra up bimanual",
        ),
        (
            "teleop",
            {"dataset": "cups", "task": "stack_cups"},
            "stack_cups is for arms right, the robot has left",
        ),
        ("teleop", {"dataset": "cups", "task": "stack_cup"}, "known tasks: "),
    ],
)
def test_wrong_arguments_are_refused_with_the_fix(kind, given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        bringup.describe(kind, given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("workcell: single", "arms left, right, its workcell single right: name another in `workcell`"),
        ("safety: panda", "arm left is a fr3, safety panda is for panda: correct `model` of the arm"),
        ("safety: fr4", "config/safety/fr4.yaml does not exist; known safety: "),
        ("embodiment: nothing", "config/embodiments/nothing.yaml does not exist"),
    ],
)
def test_a_robot_whose_files_do_not_fit_is_refused_before_anything_starts(tmp_path, line, message):
    text = (ROOT / "config/robots/franka_bimanual.yaml").read_text()
    key = line.partition(":")[0]
    (tmp_path / "lab.yaml").write_text(re.sub(rf"^{key}:.*$", line, text, flags=re.MULTILINE))
    with pytest.raises(ConfigError, match=re.escape(message)):
        bringup.describe("bimanual", {"robot": str(tmp_path / "lab.yaml")})


def test_files_that_a_robot_names_are_found_beside_it_wherever_one_stands(tmp_path):
    text = (ROOT / "config/robots/franka_bimanual.yaml").read_text()
    lines = re.sub("^workcell:.*$", "workcell: our_cell.yaml", text, flags=re.MULTILINE)
    (tmp_path / "lab.yaml").write_text(lines)
    with pytest.raises(ConfigError, match=re.escape("our_cell.yaml: no such file")):
        bringup.describe("bimanual", {"robot": str(tmp_path / "lab.yaml")})
    (tmp_path / "our_cell.yaml").write_text((ROOT / "config/workcells/bimanual.yaml").read_text())
    graph = bringup.describe("bimanual", {"robot": str(tmp_path / "lab.yaml")})
    assert graph.robot.workcell == str(tmp_path / "our_cell.yaml")


# --- launch files


@pytest.mark.parametrize("kind", FILES)
def test_launch_file_renders_the_same_graph_without_launch(kind):
    """Loading the file needs no `launch`; what it would declare is documented, with defaults that work."""
    loaded = runpy.run_path(str(ROOT / "launch" / f"{FILES[kind]}.launch.py"))
    assert callable(loaded["generate_launch_description"])
    declared = bringup.launch_arguments(kind)
    assert [row[0] for row in declared] == list(bringup.ARGUMENTS[kind])
    assert all(description for _, _, description, _ in declared)
    assert all(choices is None or default in choices for _, default, _, choices in declared)
    assert names(bringup.describe(kind, {name: default for name, default, *_ in declared}))


@pytest.mark.parametrize("kind", FILES)
def test_launch_file_loads_with_launch(kind):
    pytest.importorskip(
        "launch.launch_description", reason="launch is not on PyPI: comes with a ROS 2 installation"
    )
    from launch import LaunchContext
    from launch.actions import OpaqueFunction

    loaded = runpy.run_path(str(ROOT / "launch" / f"{FILES[kind]}.launch.py"))
    entities = loaded["generate_launch_description"]().entities
    context = LaunchContext()
    for entity in entities[:-1]:
        entity.visit(context)
    assert isinstance(entities[-1], OpaqueFunction)
    assert entities[-1].visit(context)


# --- the processes


def processes_with(marker):
    """Pids whose environment holds `marker`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture
def up(slot, tmp_path):
    """`vipra up single` on a simulated arm, ready."""
    marker = f"VIPRA_TEST_{uuid.uuid4().hex}"
    robot = (ROOT / "config/robots/sim_single.yaml").read_text()
    robot = robot.replace("simulation: {}", f"simulation: {{name: {slot.name}}}")
    (tmp_path / "robot.yaml").write_text(robot)
    settings = [
        f"robot:={tmp_path / 'robot.yaml'}",
        f"robot_ip:={slot.host(1)}",
        f"server:=tcp://{slot.host(3)}:5555",
        f"run_dir:={tmp_path / 'run'}",
    ]
    log = tmp_path / "up.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vipra_ros.cli", "up", "single", *settings],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "ROS_DOMAIN_ID": str(slot.domain), marker: "1"},
        )
    try:
        wait_for(lambda: "ready:" in log.read_text() or process.poll() is not None, 90, "vipra up ready")
        assert process.poll() is None, log.read_text()
        yield process, marker, log
    finally:
        for pid in processes_with(marker):
            with contextlib.suppress(ProcessLookupError):  # it was ending
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(up, end):
    process, marker, log = up
    wait_for(lambda: len(processes_with(marker)) == 5, 20, "vipra, simulator, camera, arms, policy")
    process.send_signal(end)
    status = process.wait(30)
    wait_for(lambda: not processes_with(marker), 15, "all processes gone")
    if end != signal.SIGKILL:
        assert status == 0, log.read_text()


def test_one_dead_process_stops_all_with_the_reason(up):
    process, marker, log = up
    (camera,) = (
        pid
        for pid in processes_with(marker)
        if b"vipra_ros.nodes.camera" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(camera, signal.SIGKILL)
    assert process.wait(30) == 1
    assert "camera ended by itself (signal SIGKILL)" in log.read_text()
    wait_for(lambda: not processes_with(marker), 15, "all processes gone")
