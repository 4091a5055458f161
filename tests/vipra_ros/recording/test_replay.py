"""A replay against the arms' interface: from how far away, in which chunks, and what ends it. No arms."""

import numpy as np
import pytest

from config.embodiment import Embodiment
from config.loading import load
from config.robot import Robot
from tests.vipra_ros.arms_standin import ARMS, ArmsStandIn
from tests.vipra_ros.graph import HOME, Graph, write_robot
from vipra_ros.process import ProcessError, wait_for
from vipra_ros.recording import replay
from vipra_ros.recording.replay import Replayer

pytestmark = pytest.mark.live

RATE_HZ = 30.0
# 0.04 rad from home and back: as far as the arms that never move are off
PATH = 0.04 * np.sin(np.linspace(0, np.pi, 41))
ACTIONS = np.tile([*HOME, 1.0], (len(PATH), len(ARMS)))
ACTIONS[:, 8] += PATH


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    """Two arms at home, and the robot that they are."""
    robot = load(Robot, write_robot(tmp_path_factory.mktemp("robot")))
    with Graph() as graph, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_DOMAIN_ID", str(graph.slot.domain))
        yield graph, graph.spin(ArmsStandIn(context=graph.context)), robot


@pytest.fixture
def arms(rig):
    graph, arms, _ = rig
    yield arms
    arms.silent, arms.refuse = False, None
    wait_for(lambda: not arms.lease.holder, 10, "let go")
    graph.do(arms.recover)
    arms.chunks.clear()


def play(rig, actions=ACTIONS, progress=lambda _: None):
    with Replayer(rig[2], load(Embodiment, rig[2].embodiment)) as replayer:
        return replayer.run(actions, RATE_HZ, progress)


def test_arms_that_are_elsewhere_are_not_moved(rig, arms):
    with pytest.raises(ProcessError, match=r"0\.31 rad from the episode's first action"):
        play(rig, ACTIONS + 0.31)
    assert not arms.messages and not arms.lease.holder


def test_every_action_is_commanded_and_judged(rig, arms):
    let_go = arms.let_go
    done = play(rig)
    wait_for(lambda: arms.let_go == let_go + 1, 10, "let go")
    assert done.seconds == pytest.approx(40 / RATE_HZ) and done.error_max_rad == pytest.approx(0.04)
    assert done.error_rms_rad == pytest.approx(np.sqrt((PATH**2).mean() / 14))
    begin_s = arms.chunks[-1][1].t0 - 35 / RATE_HZ  # the last chunk begins with action 35
    commanded = {}
    for _, chunk in arms.chunks:
        first = round((chunk.t0 - begin_s) * RATE_HZ)
        commanded |= {first + k: row[7] for k, row in enumerate(chunk.joints)}
    np.testing.assert_array_equal([commanded[i] for i in range(41)], HOME[0] + PATH)


def test_each_arm_plays_its_own_actions_in_whatever_order_the_robots_file_has_them(rig, arms):
    graph, _, robot = rig
    turned = robot.model_copy(update={"arms": dict(reversed(robot.arms.items()))})
    assert tuple(turned.arms) == ARMS[::-1]
    moved = []
    play((graph, arms, turned))
    for _, chunk in arms.chunks:
        moved += [np.ptp(chunk.joints[:, 7 * arm : 7 * arm + 7], axis=0).max() for arm in (0, 1)]
    assert max(moved[::2]) == 0.0 and max(moved[1::2]) > 0.01, "ACTIONS move the right arm alone"


@pytest.mark.parametrize(
    ("trouble", "text"),
    [
        (lambda arms: arms.fail("reflex of the left arm"), "the arms stopped: FAULT: reflex of the left arm"),
        (lambda arms: setattr(arms, "refuse", ("rough", "too rough")), r"refused chunk \d+ rough too rough"),
        (lambda arms: setattr(arms, "silent", True), r"the arms have been silent for 0\.\d s"),
        (lambda arms: arms.lease.release(), "the arms gave the lease to another commander"),
    ],
    ids=["fault", "refusal", "silence", "lease"],
)
def test_arms_that_stop_or_are_lost_end_it(rig, arms, monkeypatch, trouble, text):
    monkeypatch.setattr(replay, "ARMS_SILENT_S", 0.5)
    with pytest.raises(ProcessError, match=text):
        play(rig, progress=lambda _: rig[0].do(lambda: trouble(arms)))
