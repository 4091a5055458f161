"""The arms' reference loop, tick by tick over arms that follow exactly."""

from types import SimpleNamespace

import numpy as np
import pytest

from config.loading import ConfigError, load
from config.robot import Control
from config.safety import Safety
from tests.vipra_ros.stepped import TICK_S, KinematicArm, KinematicHand, Stepped
from vipra_ros.execution.chunk import Chunk, Rejected
from vipra_ros.robot.commands import Tag
from vipra_ros.robot.executor import State

SAFETY = load(Safety, "fr3")
HOME = np.array([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398])
RATE = 15.0


class Bench:
    """One arm and its hand, 0.4 rad from home."""

    def __init__(self):
        self.t, self.seq = 100.0, 0
        clock = SimpleNamespace(now=lambda: self.t)
        away = HOME + np.array([0.4, 0, 0, 0, 0, 0, 0])
        self.arm, self.hand = KinematicArm(away), KinematicHand()
        arms, hands, homes = {"right": self.arm}, {"right": self.hand}, {"right": HOME}
        self.executor = Stepped(arms, hands, homes, clock, Control(), SAFETY, None)
        self.executor.start()
        self.executor._reseed_at(away, self.t)
        self.sent = []

    def tick(self, seconds: float = TICK_S) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.executor._tick(self.t, 0.0, TICK_S)
            self.sent.append(self.arm.dq.copy())
            self.t += TICK_S

    def submit(self, velocity: float | None, opening: float = 1.0) -> None:
        """A second of joint 1 at `velocity` rad/s from where it is; None: let go."""
        chunk, tag = None, Tag.parse(f"{self.lease}:{self.seq}")
        if velocity is not None:
            steps = np.arange(1, 16)[:, None] * np.array([velocity / RATE, 0, 0, 0, 0, 0, 0])
            joints = self.arm.q + steps
            chunk = Chunk(self.seq, self.t + 1 / RATE, RATE, joints, np.full((15, 1), opening))
        self.seq += 1
        self.executor.submit(tag, chunk)

    def lead(self) -> None:
        self.lease, self.seq = self.executor.acquire_lease(), 0


@pytest.fixture
def bench():
    return Bench()


def test_home_is_refused_until_the_arms_rest(bench):
    """Else the path home would begin at rest while the arm is still told to move."""
    bench.lead()
    bench.submit(0.8)
    bench.tick(0.7)
    assert abs(bench.arm.dq[0]) > 0.6 and bench.executor.state is State.RUNNING
    bench.submit(None)
    bench.tick()
    assert bench.executor.state is State.HOLDING and abs(bench.arm.dq[0]) > 0.5
    refused = 0
    while True:
        try:
            bench.executor.home()
            break
        except Rejected as error:
            assert error.code == "moving"
            refused += 1
            bench.tick()
    assert refused > 5 and not bench.arm.dq.any()
    bench.tick(8.0)
    assert bench.executor.state is State.IDLE and np.abs(bench.arm.q - HOME).max() < 1e-3
    steps = np.abs(np.diff(bench.sent, axis=0)).max() / TICK_S
    assert steps < SAFETY.joints.acceleration_rad_s2[0], "rad/s2 of what was sent"


def test_arms_stop_aligning_with_the_last_chunk_of_a_commander_that_falls_silent(bench):
    bench.lead()
    far = bench.arm.q + 0.25 + np.arange(1, 16)[:, None] * 0.1  # and going on
    tag = Tag.parse(f"{bench.lease}:0")
    bench.executor.submit(tag, Chunk(0, bench.t + 1 / RATE, RATE, far - 0.1, np.ones((15, 1))))
    bench.tick(0.9)
    assert bench.executor.state is State.ALIGNING and bench.arm.dq.any()
    bench.tick(0.3)
    assert (bench.executor.state, bench.executor.code) == (State.HOLDING, "starved")
    assert not bench.arm.dq.any()


def test_a_lease_ends_with_its_time_and_what_its_holder_sends_later_moves_nothing(bench):
    bench.lead()
    bench.submit(0.0)
    bench.tick(1.2)
    assert bench.executor.lease.holder
    bench.tick(5.1)
    assert not bench.executor.lease.holder
    bench.submit(0.1)
    bench.tick(0.5)
    assert "does not hold the arms" in bench.executor.rejected and not bench.arm.dq.any()


def test_home_that_was_granted_does_not_begin_for_arms_that_have_a_commander_by_then(bench):
    bench.executor.home()
    bench.lead()
    bench.tick(0.5)
    assert bench.executor.state is State.IDLE and not bench.arm.dq.any()


def test_a_home_that_commands_may_not_reach_is_refused():
    home = HOME.copy()
    home[5] = SAFETY.joints.position_min_rad[5] + 0.02
    with pytest.raises(
        ConfigError, match=r"right: home_rad of joint 6 is 0\.565 rad, commands stay within 0\.644 to"
    ):
        Stepped({"right": KinematicArm(HOME)}, {}, {"right": home}, None, Control(), SAFETY, None)


def test_what_a_hand_was_told_and_has_not_begun_ends_with_its_commander(bench):
    forgotten = []
    bench.hand.forget = lambda: forgotten.append(bench.executor.state)
    bench.lead()
    bench.submit(0.0, opening=0.0)
    bench.tick(0.4)
    assert not forgotten
    bench.submit(None)
    bench.tick()
    assert forgotten == [State.RUNNING]
    bench.tick(0.5)
    bench.executor.stop()
    bench.tick()
    assert len(forgotten) == 2


def test_home_that_was_granted_does_not_begin_while_a_person_pushes_the_arm(bench):
    bench.executor.home()
    bench.arm.dq = np.full(7, 0.3)
    bench.executor._tick(bench.t, 0.0, TICK_S)
    assert bench.executor.state is State.IDLE


def test_a_hands_command_that_the_connection_lost_is_given_again_by_the_next_actions(bench):
    wishes = []
    bench.hand.wish = wishes.append
    bench.lead()
    bench.submit(0.0, opening=0.0)
    bench.tick(0.4)
    assert wishes == ["close"]
    bench.hand.lost = iter([True, *[False] * 1000]).__next__
    bench.tick(0.4)
    assert wishes == ["close", "close"]
    bench.submit(None)
    bench.tick(1.0)
    bench.hand.lost = iter([True, *[False] * 1000]).__next__
    bench.tick(1.0)
    assert wishes == ["close", "close"], "nobody commands"


def test_hands_open_for_idle_arms_and_for_nobody_who_commands(bench):
    bench.lead()
    bench.submit(0.0, opening=0.0)
    bench.tick(0.4)
    assert bench.hand.opening == 0.0
    with pytest.raises(Rejected, match="hands open while the arms are idle; state RUNNING"):
        bench.executor.open_hands()
    bench.submit(None)
    bench.tick(1.0)
    bench.executor.open_hands()
    bench.lead()  # before it was done
    bench.tick()
    assert bench.hand.opening == 0.0, "the hand is the new commander's"
    bench.submit(None)
    bench.tick()
    bench.executor.open_hands()
    bench.tick()
    assert bench.hand.opening == 1.0
    bench.lead()
    bench.submit(0.0, opening=0.0)
    bench.tick(0.4)
    assert bench.hand.opening == 0.0, "what was commanded before it opened is forgotten"
