"""The simulated arms answer franky as real ones do, in health and in trouble."""

import contextlib
import signal
import time

import franky
import numpy as np
import pytest

from simulation.check import violations
from simulation.control import SimulationControl, SimulationError
from simulation.state import SharedState, StateError
from simulation.workcell import HOME
from tests.simulation.running import Running, connect, move, running, start_driver, tracker, wait_for
from vipra_ros.process import reserve_slot

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def simulator():
    slot = reserve_slot()
    with running(slot) as it:
        yield it
    slot.release()


@pytest.fixture(autouse=True)
def _healthy(request):
    """Whatever a failed test leaves behind must not fail the next."""
    yield
    if "simulator" in request.fixturenames:
        control = request.getfixturevalue("simulator").control
        for arm in ("left", "right"):
            control.clear_fault(arm)
        with contextlib.suppress(SimulationError):
            control.record_stop("/dev/null")


def _recovered(simulator, arm: str) -> franky.Robot:
    robot = connect(simulator.hosts[arm])
    robot.recover_from_errors()
    return robot


def _small_motion(robot, by: float) -> None:
    move(robot, np.array(robot.state.q) + by)


def test_both_arms_connect_and_move_to_a_target_within_limits(simulator, tmp_path):
    assert simulator.ready.startswith("ready")
    robots = [_recovered(simulator, arm) for arm in ("left", "right")]
    starts = [np.array(robot.state.q) for robot in robots]
    simulator.control.record_start(60.0)
    for robot, q in zip(robots, starts, strict=True):
        robot.move(franky.JointMotion(q - 0.1), asynchronous=True)
    for robot in robots:
        robot.join_motion()
    saved = simulator.control.record_stop(tmp_path / "clean")
    for robot, q in zip(robots, starts, strict=True):
        np.testing.assert_allclose(robot.state.q, q - 0.1, atol=0.01)
    record = np.load(saved["path"])
    assert saved["samples"] == len(record["t"]) > 100
    np.testing.assert_allclose(np.diff(record["t"]), 0.001, atol=1e-9)
    # Here libfranka's own generator moves: after a late packet it jumps. Our motion is judged in test_arms_*.
    assert violations(record).keys() <= {"acceleration"}
    for robot, q in zip(robots, starts, strict=True):
        move(robot, q)


def test_the_gripper_closes_and_opens(simulator):
    gripper = franky.Gripper(simulator.hosts["right"])
    assert gripper.move(0.02, 0.05)
    assert abs(gripper.width - 0.02) < 0.003
    assert gripper.move(0.08, 0.05)
    assert abs(simulator.control.truth()["arms"]["right"]["width"] - 0.08) < 0.003


def test_an_injected_reflex_reaches_the_client_by_name_and_recovery_clears_it(simulator):
    robot = _recovered(simulator, "left")
    motion = tracker(robot)
    simulator.control.fault("left", "reflex", error="joint_reflex")
    with pytest.raises(franky.ControlException, match="joint_reflex"):
        wait_for(lambda: not robot.is_in_control)
        motion.stop()
    wait_for(lambda: robot.state.robot_mode == franky.RobotMode.Reflex)
    assert robot.has_errors
    assert robot.state.current_errors.joint_reflex
    assert robot.state.last_motion_errors.joint_reflex
    assert not robot.state.current_errors.cartesian_reflex
    with pytest.raises(franky.CommandException, match="Reflex"):  # no motion in this mode
        _small_motion(robot, 0.0)
    assert robot.recover_from_errors()
    wait_for(lambda: robot.state.robot_mode == franky.RobotMode.Idle)
    assert not robot.has_errors
    assert robot.state.last_motion_errors.joint_reflex, "until the next motion"
    _small_motion(robot, -0.02)
    assert not robot.state.last_motion_errors.joint_reflex
    assert simulator.arm("right")["reflex"] is None, "the other arm is not concerned"


@pytest.mark.parametrize(
    "error", ["communication_constraints_violation", "base_acceleration_invalid_reading"]
)
def test_error_flags_sit_where_libfranka_reads_them(simulator, error):
    robot = _recovered(simulator, "left")
    simulator.control.fault("left", "reflex", error=error)
    wait_for(lambda: robot.has_errors)
    named = [n for n in dir(robot.state.current_errors) if getattr(robot.state.current_errors, n) is True]
    assert named == [error] or str(robot.state.current_errors).strip('[]"') == error
    robot.recover_from_errors()


def test_a_second_client_of_an_arm_is_turned_away(simulator):
    robot = _recovered(simulator, "left")
    with pytest.raises(franky.NetworkException):
        connect(simulator.hosts["left"], patience_s=0.0)
    _small_motion(robot, -0.02)


def test_user_stop_aborts_refuses_recovery_and_ends_with_its_release(simulator):
    robot = _recovered(simulator, "right")
    motion = tracker(robot)
    simulator.control.fault("right", "user_stop")
    with pytest.raises(franky.ControlException, match="User Stop"):
        wait_for(lambda: not robot.is_in_control)
        motion.stop()
    wait_for(lambda: robot.state.robot_mode == franky.RobotMode.UserStopped)
    with pytest.raises(franky.CommandException):
        robot.recover_from_errors()
    simulator.control.clear_fault("right")
    wait_for(lambda: robot.state.robot_mode == franky.RobotMode.Idle)
    _small_motion(robot, -0.02)


def test_a_silent_robot_freezes_its_time_and_its_arm_stops(simulator):
    robot = _recovered(simulator, "left")
    motion = tracker(robot)
    before = robot.state.time.to_sec()
    wait_for(lambda: robot.state.time.to_sec() > before)
    simulator.control.fault("left", "silent")

    def frozen() -> bool:  # once what is on its way has arrived
        since = robot.state.time.to_sec()
        time.sleep(0.2)
        return robot.state.time.to_sec() == since

    wait_for(frozen)
    wait_for(lambda: simulator.arm("left")["reflex"] == "communication_constraints_violation")
    with pytest.raises(franky.NetworkException):  # libfranka gives up after a second
        wait_for(lambda: not robot.is_in_control)
        motion.stop()
    del robot, motion
    simulator.control.clear_fault("left")
    robot = _recovered(simulator, "left")
    assert not robot.has_errors
    _small_motion(robot, -0.02)


def test_a_frozen_state_keeps_its_time_running_but_not_its_joints(simulator):
    robot = _recovered(simulator, "left")
    simulator.control.fault("left", "freeze_state")
    t = robot.state.time.to_sec()
    wait_for(lambda: robot.state.time.to_sec() > t + 0.05)  # sent after the fault
    q = np.array(robot.state.q)
    wait_for(lambda: robot.state.time.to_sec() > t + 0.15)
    np.testing.assert_array_equal(robot.state.q, q)
    simulator.control.clear_fault("left")


def test_total_packet_loss_aborts_a_motion_by_the_communication_rule(simulator):
    robot = _recovered(simulator, "right")
    motion = tracker(robot)
    simulator.control.fault("right", "loss", fraction=1.0)
    wait_for(lambda: simulator.arm("right")["mode"] == "reflex")
    assert simulator.arm("right")["reflex"] == "communication_constraints_violation"
    simulator.control.clear_fault("right")
    with pytest.raises(franky.ControlException, match="communication_constraints_violation"):
        wait_for(lambda: not robot.is_in_control)
        motion.stop()
    assert robot.recover_from_errors()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_a_client_that_falls_silent_in_motion_stops_the_arm_in_a_controlled_way(simulator, number, tmp_path):
    robot = _recovered(simulator, "left")
    move(robot, HOME)
    del robot
    driver = start_driver(simulator.hosts["left"])
    state = simulator.state()
    simulator.control.record_start(30.0)
    driver.send_signal(number)
    try:
        wait_for(lambda: simulator.arm("left")["mode"] == "reflex", what="the watchdog")
        wait_for(lambda: np.abs(state.snapshot().dq[0]).max() < 1e-3, what="standstill")
        saved = simulator.control.record_stop(tmp_path / "stop")
        record = np.load(saved["path"])
        assert violations(record) == {}
        speed = record["dq"][:, 0, 0]
        assert abs(speed[:5]).min() > 0.4, "the arm was to be in motion"
        # From the last command on: 20 packets at speed, then braking. No bounce: the speed never turns round.
        assert speed.min() > -0.02
        tripped = int(np.argmax(record["mode"][:, 0] == 4))
        travelled = abs(record["q"][-1, 0, 0] - record["q"][tripped - 25, 0, 0])
        assert travelled < 0.05, f"{travelled} rad from the last packets on, at {speed[tripped]} rad/s"
        assert simulator.arm("left")["reflex"] == "communication_constraints_violation"
    finally:
        driver.kill()
        driver.wait()
        state.close()
    robot = wait_for(lambda: _recovered(simulator, "left"))
    assert not robot.has_errors
    move(robot, HOME)


def test_a_collision_raises_a_reflex_by_itself():
    """An arm driven down into the table is stopped by the contact, not by the floor of the simulation."""
    slot = reserve_slot()
    with running(slot, "single") as simulator:
        robot = connect(simulator.hosts["right"])
        move(robot, [1.0, 0.25, 0.0, -2.2, 0.0, 2.45, 0.785])  # beside the objects
        with pytest.raises(franky.ControlException, match="reflex"):
            move(robot, [1.0, 0.75, 0.0, -2.2, 0.0, 2.95, 0.785])
        status = simulator.arm("right")
        assert status["reflex"] in ("cartesian_reflex", "joint_reflex")
        assert any("table" in pair for pair in status["touched"]), status
    slot.release()


def test_without_watchdog_a_violation_on_purpose_is_flagged_by_the_checker_and_a_request_ends_it(tmp_path):
    slot = reserve_slot()
    with running(slot, "single", ["--no-watchdog"]) as simulator:
        robot = connect(simulator.hosts["right"])
        motion = tracker(robot)
        q = np.array(robot.state.q)
        simulator.control.record_start(30.0)
        q[0] += 0.5  # a step: what no client may send
        motion.set_target(q)
        state = simulator.state()
        wait_for(lambda: abs(state.snapshot().q[0, 0] - q[0]) < 0.05)
        state.close()
        saved = simulator.control.record_stop(tmp_path / "violation")
        found = violations(np.load(saved["path"]))
        assert found["acceleration"]["right_joint1"] > 10
        assert "position" not in found
        motion.stop()
        simulator.control.shutdown()
        assert simulator.process.wait(20) == 0
    slot.release()


def test_reset_places_objects_by_seed_and_refuses_while_an_arm_moves(simulator):
    control = simulator.control

    def poses(seed):
        control.reset(seed)
        return {name: o["position"][:2] for name, o in control.truth()["objects"].items()}

    first, second = poses(1), poses(2)
    assert set(first) == {"red_cup", "blue_cup", "green_cup", "bowl"}
    again = poses(1)
    for name in first:
        assert np.linalg.norm(np.subtract(first[name], again[name])) < 1e-4
        assert np.linalg.norm(np.subtract(first[name], second[name])) > 1e-3
    t = control.status()["time_s"]
    control.reset(3)
    assert control.status()["time_s"] >= t, "simulated time never goes back"
    motion = tracker(_recovered(simulator, "left"))
    try:
        wait_for(lambda: simulator.arm("left")["mode"] == "move", what="the motion")
        with pytest.raises(SimulationError, match="moving"):
            control.reset(1)
    finally:
        motion.stop()


def test_bad_requests_are_refused_with_a_reason_and_harm_nothing(simulator):
    control = simulator.control
    for call, reason in (
        (lambda: control.fault("middle", "reflex"), "unknown arm"),
        (lambda: control.fault("left", "gremlin"), "unknown fault"),
        (lambda: control.fault("left", "reflex", error="tired"), "unknown error"),
        (lambda: control.fault("left", "loss", fraction=7.0), "fraction"),
        (lambda: control.record_stop("/tmp/never"), "no record"),
        (lambda: control.record_start(-1.0), "max_duration_s"),
        (lambda: control._call("dance"), "a request is"),
        (lambda: control._call("reset", colour="red"), "colour"),
    ):
        with pytest.raises(SimulationError, match=reason):
            call()
    assert control.status()["arms"]["left"]["mode"] in ("idle", "reflex")


def test_two_simulators_do_not_hear_each_other_and_a_taken_address_or_name_is_one_line(simulator, slot):
    same_host = Running(slot, "single", name=slot.name)
    same_host.control.fault("right", "reflex", error="power_limit_violation")
    assert same_host.arm("right")["reflex"] == "power_limit_violation"
    assert simulator.arm("right")["reflex"] != "power_limit_violation"
    other = Running(slot, "single", name=f"{slot.name}-b")
    status, errors = other.end()
    assert status == 1
    assert len(errors.strip().splitlines()) == 1 and slot.host(1) in errors and "--hostnames" in errors
    same_name = Running(slot, "single", name=simulator.name, first_host=7)
    status, errors = same_name.end()
    assert status == 1
    assert len(errors.strip().splitlines()) == 1 and "already running" in errors
    assert same_host.end()[0] == 0
    assert simulator.control.status()["arms"]["left"]["mode"] in ("idle", "reflex"), "the first one runs on"


def _says_goodbye(slot) -> None:
    simulator = Running(slot, "single")
    assert simulator.ready.startswith("ready")
    state = simulator.state()
    assert not state.stopped()
    control_file = simulator.control._name
    status, errors = simulator.end()
    assert (status, errors) == (0, "")
    assert state.stopped()
    state.close()
    with pytest.raises(StateError, match="no simulator"):
        SharedState.attach(slot.name, 0.05)
    with pytest.raises(SimulationError, match="is it running"):
        SimulationControl(control_file, 0.2).status()


def test_a_killed_simulator_is_noticed_its_name_is_free_and_sigterm_leaves_nothing_behind(slot):
    first = Running(slot, "single")
    state = first.state()
    first.process.kill()
    first.end()
    wait_for(state.stopped)
    with pytest.raises(StateError, match="no simulator"):
        SharedState.attach(slot.name, 0.05)
    state.close()
    _says_goodbye(slot)
