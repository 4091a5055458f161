"""The arms node under normal command: tracking, running out, leases, refusals. Judged on the 1 kHz record."""

import numpy as np
import pytest
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState

from simulation.check import extremes, violations
from tests.vipra_ros.conftest import HOMES, HORIZON, RATE

pytestmark = pytest.mark.live


def test_a_chunk_stream_is_tracked_within_the_quality_limits(cell):
    """Design section 6 on the record, with 0.02 rad steps at chunk boundaries."""
    q0 = cell.measured()[0]

    def path(t):
        q = np.tile(q0, (len(t), 1))
        wave = 0.25 * (1 - np.cos(2 * np.pi * 0.25 * np.maximum(t, 0.0)))
        q[:, [0, 7]] += (-np.sign(q0[0] + 1e-9) * wave)[:, None]
        q[:, [3, 10]] += 0.4 * wave[:, None]
        return q

    commander, faults = cell.acquire(), cell.faults()
    with cell.record() as record, commander.streaming(0.5, path=path, step=0.02):
        cell.clock.sleep_until(commander.start + 0.5)
        starved = cell.status["starved_ticks"]
        cell.clock.sleep_until(commander.start + 6.0)
        assert cell.status["starved_ticks"] == starved
    inside = (record["t"] > commander.start + 0.5) & (record["t"] < record["t"][-1] - 0.3)
    t = record["t"][inside] - commander.start
    measured = record["q"][inside].reshape(-1, 14)
    lags = np.arange(0.0, 0.06, 0.002)
    errors = [np.sqrt(np.mean((measured - path(t - lag) - _steps(t - lag)) ** 2)) for lag in lags]
    assert min(errors) <= 0.01
    assert errors[0] <= 0.01
    assert lags[int(np.argmin(errors))] <= 0.030
    assert violations(record) == {}
    worst = extremes(record)
    assert worst["acceleration_rad_s2"] <= 10.0
    assert worst["torque_step_nm"] <= 1.0
    assert cell.faults() == faults
    commander.let_go()


def _steps(t):
    """What every second chunk is off by, on joint 1 of each arm."""
    steps = np.zeros((len(t), 14))
    steps[:, [0, 7]] = (0.02 * (np.floor(t * RATE / 7) % 2))[:, None]
    return steps


def test_a_stream_that_ends_finishes_its_chunk_then_holds_and_goes_on_later(cell):
    starved = int(cell.status["starved_ticks"])
    with cell.record() as record, cell.cruising(0.3) as commander:
        pass  # the stream ends here, the last chunk does not
    sent = commander.seq - 1
    cell.wait_state("HOLDING")
    assert "out of actions" in cell.reason
    end = commander.start + (7 * sent + HORIZON - 1) / RATE
    assert record["t"][-1] < end
    cell.wait(lambda: np.abs(cell.measured()[1]).max() < 0.02, "rest")
    assert cell.clock.now() > end
    with cell.record() as record:
        seq = commander.hold_chunk()
        cell.wait(lambda: int(cell.status["accepted_seq"]) == seq, "the next chunk")
        cell.wait_state("RUNNING")
        cell.wait_state("HOLDING")
    assert violations(record) == {}
    assert int(cell.status["starved_ticks"]) > starved
    commander.let_go()
    cell.wait_state("IDLE")


def test_the_first_motion_of_a_stream_is_slow_until_the_arms_are_on_it(cell):
    commander = cell.acquire()
    goal = cell.measured()[0]
    goal[[0, 7]] += -0.2 * np.sign(goal[0] + 1e-9)
    with cell.record() as record:
        t0 = cell.clock.now()
        for k in range(30):
            commander.send(np.tile(goal, (HORIZON, 1)), np.ones((HORIZON, 2)), t0 + 7 * k / RATE)
            cell.clock.sleep_until(t0 + 7 * (k + 1) / RATE - 0.05)
            if k == 1:
                assert cell.state == "ALIGNING"
            if cell.state == "RUNNING" and np.abs(cell.measured()[0] - goal).max() < 0.01:
                break
    assert np.abs(cell.measured()[0] - goal).max() < 0.02
    far = np.abs(record["q"][:, :, 0] - goal[[0, 7]]) > 0.06
    assert np.abs(record["dq"][:, :, 0][far]).max() < 0.22  # Nothing is perfect: the arm swings a little
    commander.let_go()


def test_a_start_too_far_away_is_refused_and_nothing_moves(cell):
    commander = cell.acquire()
    before = cell.measured()[0]
    seq = commander.hold_chunk(offset=-0.5 * np.sign(before[0] + 1e-9))
    cell.wait_rejected(seq, "start")
    assert cell.state in ("IDLE", "HOLDING")
    assert np.abs(cell.measured()[0] - before).max() < 0.005
    commander.let_go()


def test_only_the_holder_of_the_lease_commands(cell):
    commander = cell.acquire()
    granted, why = cell.call("acquire_lease")
    assert not granted and "another commander" in why
    seq = commander.hold_chunk(tag="0badcafe:" + commander.lease.split(":")[1] + ":0")
    cell.wait_rejected(0, "lease")
    commander.seq = seq + 1
    seq = commander.hold_chunk()
    cell.wait(lambda: int(cell.status["accepted_seq"]) == seq, "acceptance")
    commander.let_go()
    cell.wait(lambda: cell.status["lease"] == "", "release")
    cell.acquire().let_go()


def test_a_silent_commander_loses_the_lease(cell):
    commander = cell.acquire()
    commander.hold_chunk()
    cell.wait(lambda: cell.call("acquire_lease")[0], "lease after silence", 60.0)
    cell.wait(lambda: commander.lease.split(":")[0] != cell.status["lease"], "new holder")
    cell.call("stop")


@pytest.mark.parametrize(
    "change, code", [("epoch", "epoch"), ("expired", "expired"), ("stale", "stale"), ("tag", "tag")]
)
def test_late_or_foreign_commands_are_refused_while_the_motion_goes_on(cell, change, code):
    with cell.cruising(0.3) as commander:
        q, (lease, epoch) = cell.measured()[0], commander.lease.split(":")
        joints, hands, now = np.tile(q, (HORIZON, 1)), np.ones((HORIZON, 2)), cell.clock.now()
        other = type(commander)(cell, commander.lease)
        other.seq = 1000
        match change:
            case "epoch":
                seq = other.send(joints, hands, now, tag=f"{lease}:{int(epoch) + 7}:1000")
            case "expired":
                seq = other.send(joints, hands, now - 3.0)
            case "stale":
                other.seq = 0
                seq = other.send(joints, hands, now)
            case "tag":
                other.send(joints, hands, now, tag="nonsense")
                seq = -1
        cell.wait_rejected(seq, code)
        assert cell.state == "RUNNING"
    commander.let_go()


@pytest.mark.parametrize(
    "change, code", [("nan", "non_finite"), ("names", "names"), ("shape", "shape"), ("jump", "jump")]
)
def test_a_holder_that_sends_nonsense_is_stopped_and_can_recover(cell, change, code):
    with cell.record() as record, cell.cruising(0.5) as commander:
        joints = np.tile(cell.measured()[0], (HORIZON, 1))
        names, arms = {}, ("left", "right")
        if change == "nan":
            joints[3, 9] = np.nan
        elif change == "names":
            names = {
                "right": (*tuple(f"right_fr3_joint{i}" for i in (2, 1, 3, 4, 5, 6, 7)), "right_fr3_gripper")
            }
        elif change == "shape":
            names, arms = {}, ("left",)
            joints = joints[:1]
        elif change == "jump":
            joints[:, 7] += 0.4
        sent_at = cell.clock.now()
        commander.send(joints, np.ones((len(joints), 2)), sent_at, names=names, arms=arms, skip=100)
        cell.wait_state("FAULT")
        cell.wait(lambda: np.abs(cell.measured()[1]).max() < 0.02, "rest")
    assert cell.status["code"] == code
    assert cell.faults()[-1]["code"] == code
    assert violations(record) == {}
    assert cell.call("acquire_lease")[0] is False
    assert cell.recover() == "recovered; acquire a new lease"
    with cell.cruising(0.3) as commander:
        assert cell.state == "RUNNING"
    commander.let_go()


def test_a_stop_latches_until_recover(cell):
    with cell.record() as record, cell.cruising(0.5) as commander:
        assert cell.call("stop")[0]
        cell.wait_state("STOPPED")
        seq = commander.hold_chunk()
        cell.wait_rejected(seq, "latched")
    assert violations(record) == {}
    assert not cell.call("home")[0]
    cell.recover()
    cell.wait_state("IDLE")


def test_ros_time_jumps_move_nothing(cell):
    """Motion runs on the executor clock: /clock, here leaping by hours, is for other tools."""
    clocks = cell.graph.node.create_publisher(Clock, "/clock", 10)
    with cell.record() as record, cell.cruising(0.3) as commander:
        for second in (0, 10_000, 5):
            message = Clock()
            message.clock.sec = second
            clocks.publish(message)
            cell.clock.sleep_until(cell.clock.now() + 0.1)
        assert cell.state == "RUNNING"
    assert violations(record) == {}
    moving = record["dq"][:, :, 0][-200:]
    assert np.abs(moving).min() > 0.25
    commander.let_go()


def test_home_waits_for_arms_that_still_brake(cell):
    with cell.record() as record:
        with cell.cruising(1.0) as commander:
            pass
        commander.let_go()
        answers = [cell.call("home")]
        while not answers[-1][0]:
            answers.append(cell.call("home"))
        cell.wait(lambda: cell.state == "IDLE" and "home" in cell.reason, "home", 40)
    assert violations(record) == {}
    assert {why.partition(":")[0] for granted, why in answers if not granted} <= {"busy", "moving"}


def test_home_brings_both_arms_home(cell):
    granted, why = cell.call("home")
    assert granted, why
    with cell.record() as record:
        cell.wait(lambda: cell.state == "IDLE" and "home" in cell.reason, "home", 40)
    assert np.abs(cell.measured()[0] - HOMES).max() < 0.01
    assert violations(record) == {}


def test_the_hands_follow_the_chunks_with_hysteresis(cell):
    def hands(t):
        opening = np.ones((len(t), 2))
        opening[:, 0] = np.where(t > 0.3, 0.1, 0.9)
        opening[:, 1] = np.where(
            (t * RATE).round() % 4 == 3, 0.1, 0.5
        )  # one low action at a time: never closes
        return opening

    with cell.acquire().streaming(0.0, gripper=hands) as commander:
        cell.wait(lambda: cell.joints["left"].position[7] < 0.1, "the left hand closed")
        assert cell.joints["right"].position[7] > 0.4
        assert cell.call("open_hands") == (False, "busy: hands open while the arms are idle; state RUNNING")
    commander.let_go()
    cell.wait_state("IDLE")
    with cell.acquire().streaming(0.0) as commander:
        cell.wait(lambda: cell.joints["left"].position[7] > 0.9, "the left hand open")
    commander.let_go()


def test_idle_hands_open_where_they_are(cell):
    with cell.acquire().streaming(0.0, gripper=lambda t: np.zeros((len(t), 2))) as commander:
        cell.wait(lambda: max(j.position[7] for j in cell.joints.values()) < 0.1, "both hands closed")
    commander.let_go()
    cell.wait_state("IDLE")
    before = cell.measured()[0]
    with cell.record() as record:
        assert cell.call("open_hands")[0]
        cell.wait(lambda: min(j.position[7] for j in cell.joints.values()) > 0.9, "both hands open")
    assert violations(record) == {} and np.abs(cell.measured()[0] - before).max() < 0.01
    with cell.acquire().streaming(0.0, gripper=lambda t: np.zeros((len(t), 2))) as commander:
        cell.wait(lambda: max(j.position[7] for j in cell.joints.values()) < 0.1, "both hands closed again")
    commander.let_go()


def test_after_a_recovery_a_hand_is_told_where_it_is_not_where_it_was_sent(cell):
    told = []
    cell.graph.node.create_subscription(
        JointState, "/right/joint_reference", lambda message: told.append(message.position[7]), 10
    )
    with cell.acquire().streaming(0.0, gripper=lambda t: np.full((len(t), 2), 0.5)):
        cell.wait(lambda: told and told[-1] == 0.5, "the hand's opening as commanded")
        assert cell.call("stop")[0]
        cell.wait_state("STOPPED")
    cell.recover()
    at = cell.joints["right"].position[7]
    assert abs(at - 0.5) > 0.1, "half open is neither a wish to open nor one to close"
    cell.wait(lambda: abs(told[-1] - at) < 0.05, "the hand's opening as measured")
