"""The scripted expert is smooth, returns to its cycle and moves only the arms that the task names."""

import numpy as np
import pytest

from simulation.experts import circles

HOME = np.array([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398])
HOMES = {"left": HOME, "right": HOME}


def test_deviations_decay_onto_the_cycle():
    start = {arm: HOME + 0.08 for arm in HOMES}
    joints, _ = circles.rollout(start, HOMES, "move both hands in circles", 150, 15.0)
    phase = circles.nearest_phase({a: joints[a][-1] for a in HOMES}, HOMES, ("left", "right"))
    assert np.abs(joints["left"][-1] - circles.cycle(phase, HOME)).max() < 0.02


def test_the_cycle_closes_after_its_period():
    steps = round(circles.PERIOD_S * 15) + 1
    joints, openings = circles.rollout(HOMES, HOMES, "move both hands in circles", steps, 15.0)
    assert np.abs(joints["right"][-1] - HOME).max() < 0.06
    assert 0.4 < openings["right"].mean() < 0.6


@pytest.mark.parametrize(
    "task, still", [("move the left hand in circles", "right"), ("move the right hand in circles", "left")]
)
def test_an_arm_that_the_task_does_not_name_stays_home(task, still):
    joints, openings = circles.rollout(HOMES, HOMES, task, 60, 15.0)
    assert np.array_equal(joints[still], np.tile(HOME, (60, 1)))
    assert openings[still].all()
    moving = next(arm for arm in HOMES if arm != still)
    assert np.ptp(joints[moving][:, 0]) > 0.2


def test_speed_stays_moderate_at_22_hz_playback():
    joints, _ = circles.rollout(
        {a: HOME + 0.08 for a in HOMES}, HOMES, "move both hands in circles", 150, 15.0
    )
    assert np.abs(np.diff(joints["left"], axis=0)).max() * 22 < 0.8
