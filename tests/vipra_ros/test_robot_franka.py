"""One arm through franky against the simulator: streaming, the dead-man, faults and the way back."""

import time

import numpy as np
import pytest

from config.loading import load
from config.robot import Robot
from config.safety import Safety
from simulation.check import extremes, violations
from vipra_ros.process import wait_for
from vipra_ros.robot.franka import ArmFault, FrankaArm

pytestmark = pytest.mark.live

CONFIG = load(Robot, "sim_bimanual")
PERIOD = 0.005


@pytest.fixture
def arm(simulator):
    arm = FrankaArm(
        "left",
        CONFIG.arms["left"].model_copy(update={"hostname": simulator.hosts["left"]}),
        CONFIG.control,
        load(Safety, "fr3"),
        realtime=False,
    )
    arm.connect(10.0)
    arm.recover()
    yield arm
    arm.shutdown()


def stream(simulator, arm, seconds: float, speed: float) -> None:
    """Joint 1 along a raised-cosine start up to `speed` rad/s, 200 Hz, for simulated `seconds`."""
    q0, start, rise = arm.start(), simulator.clock.now(), 0.4
    speed = -speed if q0[0] > 0 else speed
    for k in range(round(seconds / PERIOD)):
        simulator.clock.sleep_until(start + k * PERIOD)
        t = simulator.clock.now() - start
        q, dq = q0.copy(), np.zeros(7)
        s = min(t / rise, 1.0)
        q[0] += speed * (t / 2 - rise / (2 * np.pi) * np.sin(np.pi * s) + max(t - rise, 0.0) / 2)
        dq[0] = speed * (1 - np.cos(np.pi * s)) / 2
        arm.set_target(q, dq, simulator.clock.now())


def test_re_arming_the_dead_man_is_not_felt(simulator, arm):
    """25 fresh motions a second: the commanded torque never steps by more than 1 Nm in 1 ms (1000 Nm/s)."""
    with simulator.record() as record:
        stream(simulator, arm, 2.0, 0.4)
    assert extremes(record)["torque_step_nm"] <= 1.0
    assert violations(record) == {}
    assert np.abs(record["dq"][:, 0, 0]).max() > 0.35


def test_an_arm_nobody_streams_to_stops_by_itself_and_can_start_again(simulator, arm):
    with simulator.record() as record:
        stream(simulator, arm, 0.8, 0.5)
        left_at = simulator.clock.now()
        simulator.clock.sleep_until(left_at + 0.8)
    assert not np.abs(record["dq"][-1, 0]).max() > 0.02
    begin = record["t"].searchsorted(left_at)
    assert np.abs(record["q"][-1, 0, 0] - record["q"][begin, 0, 0]) <= 0.05
    assert violations(record) == {}
    with pytest.raises(ArmFault) as caught:
        arm.set_target(arm.read().q, np.zeros(7), simulator.clock.now())
    assert caught.value.code == "deadman"
    assert not arm.streaming
    arm.recover()
    arm.start()
    assert arm.streaming


def test_a_reflex_is_typed_named_and_cleared_by_recover(simulator, arm):
    q = arm.start()
    arm.set_target(q, np.zeros(7), simulator.clock.now())
    simulator.control.fault("left", "reflex", error="joint_reflex")
    with pytest.raises(ArmFault) as caught:
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            arm.set_target(q, np.zeros(7), simulator.clock.now())
            time.sleep(PERIOD)
    assert caught.value.code == "reflex" and "joint_reflex" in str(caught.value)
    arm.recover()
    assert arm.read().fault is None
    arm.start()


def test_a_user_stop_cannot_be_recovered_from_before_it_is_released(simulator, arm):
    simulator.control.fault("left", "user_stop")
    wait_for(lambda: arm.read().fault, 10, "the user stop")
    with pytest.raises(ArmFault) as caught:
        arm.start()
    assert caught.value.code == "user_stop"
    with pytest.raises(ArmFault) as caught:
        arm.recover()
    assert caught.value.code == "user_stop"
    simulator.control.clear_fault("left")
    arm.recover()
    arm.start()


def test_franky_is_told_the_arms_own_limits(arm):
    """The wheel's defaults are Panda's; an FR3 has 10 rad/s2 and 5000 rad/s3 on every joint."""
    assert (arm._robot.joint_acceleration_limit.get() <= 10.0).all()
    assert (arm._robot.joint_jerk_limit.get() <= 5000.0).all()


def test_no_arm_is_a_typed_error_after_the_time_out_and_not_a_wait():
    nobody = CONFIG.arms["left"].model_copy(update={"hostname": "127.75.250.1"})
    arm = FrankaArm("left", nobody, CONFIG.control, load(Safety, "fr3"), realtime=False)
    began = time.monotonic()
    with pytest.raises(ArmFault) as caught:
        arm.connect(0.3)
    assert caught.value.code == "connection" and "127.75.250.1" in str(caught.value)
    assert time.monotonic() - began < 5.0
    arm.shutdown()


def test_a_lost_simulator_is_a_fault_and_recover_reconnects(simulator, arm):
    arm.start()
    simulator.sim.stop()
    deadline = time.monotonic() + 10.0
    with pytest.raises(ArmFault) as caught:
        while time.monotonic() < deadline:
            arm.set_target(arm.read().q, np.zeros(7), time.monotonic())
            time.sleep(PERIOD)
    assert caught.value.code == "connection"
    began = time.monotonic()
    with pytest.raises(ArmFault):
        arm.recover(timeout_s=0.5)
    assert time.monotonic() - began < 5.0
    simulator.start_simulator()
    arm.recover()
    arm.start()


def test_shutdown_is_quick_when_the_simulator_is_gone(simulator, arm):
    arm.start()
    simulator.sim.stop()
    began = time.monotonic()
    arm.shutdown()
    assert time.monotonic() - began < 3.0
    simulator.start_simulator()
