"""The hand: hysteresis, latest wish wins, faults shown and never in anybody's way."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.safety import GripperLimits
from vipra_ros.process import wait_for
from vipra_ros.robot.gripper import GripperWorker
from vipra_ros.robot.hands import Hysteresis

pytestmark = pytest.mark.live

LIMITS = GripperLimits()


def test_one_low_action_does_not_close_two_do_and_only_once():
    hand = Hysteresis(LIMITS)
    assert [hand.update(x) for x in (0.9, 0.9, 0.1, 0.9, 0.1, 0.1, 0.1, 0.5, 0.1, 0.66, 0.64, 0.9, 0.9)] == [
        *(None, "open", None, None, None, "close", None, None, None, None, None, None, "open")
    ]


@given(st.lists(st.floats(0.0, 1.0), max_size=60))
def test_wishes_alternate_and_need_two_actions_on_their_side(openings):
    hand = Hysteresis(LIMITS)
    wishes = [hand.update(x) for x in openings]
    sent = [w for w in wishes if w]
    assert all(a != b for a, b in itertools.pairwise(sent))
    for i, wish in enumerate(wishes):
        if wish == "close":
            assert max(openings[i - 1 : i + 1]) < LIMITS.close_below and i >= 1
        if wish == "open":
            assert min(openings[i - 1 : i + 1]) > LIMITS.open_above and i >= 1


def test_after_a_reset_the_same_wish_is_sent_again():
    hand = Hysteresis(LIMITS)
    assert [hand.update(0.0), hand.update(0.0), hand.update(0.0)] == [None, "close", None]
    hand.reset()
    assert [hand.update(0.0), hand.update(0.0)] == [None, "close"]


@pytest.fixture
def worker(simulator):
    worker = GripperWorker("left", simulator.hosts["left"], LIMITS)
    worker.start()
    wait_for(lambda: not worker.fault, 10.0, "connection")
    yield worker
    worker.stop()


def test_the_newest_wish_wins_and_wishing_never_blocks(worker):
    began = time.monotonic()
    for wish in ("open", "close") * 20:
        worker.wish(wish)
    worker.wish("open")
    assert time.monotonic() - began < 0.5  # a motion takes longer
    wait_for(lambda: worker.opening > 0.9 and worker.moving is None, 10.0, "open")
    worker.wish("close")
    wait_for(lambda: worker.moving == "close", 10.0, "closing", poll_s=0.005)
    worker.wish("open")
    worker.wish("close")
    worker.wish("open")
    wait_for(lambda: worker.moving is None and worker.opening > 0.9, 10.0, "closed, then open")
    assert worker.fault == ""


def test_what_a_hand_missed_too_long_ago_or_what_was_dropped_does_not_move_it(simulator):
    """Told while it is not connected: then forgotten, or older than a command may take."""
    for drop in (True, False):
        worker = GripperWorker(
            "left", simulator.hosts["left"], GripperLimits(timeout_s=60.0 if drop else 0.2)
        )
        worker.wish("close")
        if drop:
            worker.forget()
        else:
            time.sleep(0.3)
        worker.start()
        wait_for(lambda worker=worker: not worker.fault, 10.0, "connection")
        time.sleep(0.3)
        assert worker.moving is None and worker.grasped is None and worker.lost() is not drop
        worker.stop()


def test_closing_on_nothing_is_not_a_grasp(worker):
    worker.wish("close")
    wait_for(lambda: worker.opening < 0.05 and worker.moving is None, 10.0, "closed")
    assert worker.grasped is False
    assert worker.fault == ""
    worker.wish("open")
    wait_for(lambda: worker.opening > 0.9, 10.0, "open")
    assert worker.grasped is None


def test_a_lost_hand_is_a_visible_fault_and_comes_back(simulator, worker):
    worker.wish("close")
    wait_for(lambda: worker.moving == "close", 10.0, "closing", poll_s=0.002)
    simulator.sim.stop()
    wait_for(lambda: worker.fault, 10.0, "a fault")
    began = time.monotonic()
    worker.wish("open")
    assert time.monotonic() - began < 0.5  # a motion takes longer
    simulator.start_simulator()
    wait_for(lambda: not worker.fault and worker.opening > 0.9, 20.0, "the hand again, open")
    assert worker.lost() and not worker.lost(), "the close was; whoever still wants it wishes again"


@pytest.mark.parametrize("lost", [False, True])
def test_a_worker_ends_with_its_command_or_when_the_hand_is_gone(simulator, lost):
    worker = GripperWorker("right", simulator.hosts["right"], LIMITS)
    worker.start()
    wait_for(lambda: not worker.fault, 10.0, "connection")
    worker.wish("open" if worker.opening < 0.5 else "close")
    wait_for(lambda: worker.moving, 10.0, "motion", poll_s=0.005)
    if lost:
        simulator.sim.stop()
    assert worker.stop(5.0)
    if lost:
        simulator.start_simulator()
