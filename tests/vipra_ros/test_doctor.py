"""The doctor finds what is missing and says how to mend it."""

import socket

from config.loading import root
from vipra_ros import doctor
from vipra_ros.process import free_port


def by_name(checks):
    return {check.name: check for check in checks}


def test_this_machine_can_run_the_simulated_robot():
    found = by_name(doctor.checks("sim_bimanual", "", "robot"))
    assert {name: c.found for name, c in found.items() if c.state == "fix"} == {}
    assert {"ROS 2", "DDS", "franky", "rendering", "shared memory", "ports", "disk"} <= set(found)
    assert "libfranka 0." in found["franky"].found


def test_hardware_asks_for_more_than_simulation():
    names = set(by_name(doctor.checks("franka_single", "", "robot")))
    assert {"real-time kernel", "real-time limits", "right arm", "ZED SDK", "workcell"} <= names
    assert not names & {"rendering", "simulator"}


def test_server_needs_no_robot_software():
    names = set(by_name(doctor.checks("sim_bimanual", "", "server")))
    assert {"torch", "GPU", "policy"} <= names
    assert not names & {"ROS 2", "franky", "rendering"}


def test_unknown_robot_is_one_thing_to_fix(capsys):
    assert doctor.run("no_such_robot", role="robot") == 1
    shown = capsys.readouterr().out
    assert "no_such_robot" in shown and "sim_bimanual" in shown and "1 to fix" in shown


def test_the_workcell_that_is_read_is_named(tmp_path):
    """A copied robot goes on naming the shipped workcell until its file is named with its ending."""
    config = root() / "config"
    copied = (config / "robots" / "franka_bimanual.yaml").read_text()
    (tmp_path / "bimanual.yaml").write_text((config / "workcells" / "bimanual.yaml").read_text())
    robot = tmp_path / "my_robot.yaml"
    robot.write_text(copied)
    check = doctor.workcell(doctor.load(doctor.Robot, str(robot)))
    assert check.state == "note" and check.found == f"{config}/workcells/bimanual.yaml, as shipped"
    assert "workcell: bimanual.yaml" in check.fix
    robot.write_text(copied.replace("workcell: bimanual ", "workcell: bimanual.yaml "))
    check = doctor.workcell(doctor.load(doctor.Robot, str(robot)))
    assert (check.state, check.found) == ("ok", str(tmp_path / "bimanual.yaml"))


def test_every_fix_says_what_to_do():
    for check in (
        doctor.package("X", "none", "no_such_module", "robot"),
        doctor.reachable("left arm", "127.99.255.254", free_port("127.99.255.254"), "switch it on"),
    ):
        assert check.state == "fix" and check.found and check.fix


def test_broken_renderer_is_named_with_its_packages(monkeypatch):
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "99")
    check = doctor.rendering(doctor.load(doctor.Robot, "sim_single"))
    assert check.state == "fix" and "libegl1" in check.fix


def test_full_disk_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "DISK_GB", 1e9)
    assert doctor.disk(tmp_path).state == "fix"


def test_running_simulator_is_noticed(slot):
    robot = doctor.load(doctor.Robot, "sim_single")
    arm = robot.arms["right"].model_copy(update={"hostname": slot.host(1)})
    robot = robot.model_copy(update={"arms": {"right": arm}})
    assert doctor.fci_ports(robot).state == "ok"
    with socket.create_server((slot.host(1), doctor.FCI_PORT)):
        assert doctor.fci_ports(robot).state == "note"


def test_something_that_is_no_policy_server_is_told_from_nobody(slot):
    robot = doctor.load(doctor.Robot, "sim_bimanual")
    address = f"tcp://{slot.host(1)}:5555"
    assert doctor.policy_server(address, robot).state == "note"
    with socket.create_server((slot.host(1), 5555)):
        assert doctor.policy_server(address, robot).state == "fix"
