"""The earlier picture lies `history_seconds` before the newest by capture stamp, or there is none."""

import numpy as np

from vipra_ros.execution.history import FrameHistory


def picture(value: int) -> np.ndarray:
    return np.full((2, 2, 3), value, np.uint8)


def test_history_picks_by_capture_stamp_not_by_count():
    history = FrameHistory(0.1)
    for number, stamp in enumerate((0.0, 0.02, 0.09, 0.1, 0.2)):
        history.add(picture(number), stamp)
    before, newest, t_obs = history.pair()
    assert (before[0, 0, 0], newest[0, 0, 0], t_obs) == (3, 4, 0.2)


def test_history_refuses_pairs_that_lie_too_close_or_too_far_apart():
    history = FrameHistory(0.1)
    assert history.pair() is None
    history.add(picture(0), 0.0)
    assert history.pair() is None
    history.add(picture(1), 0.04)
    assert history.pair() is None
    history.add(picture(2), 0.07)
    assert history.pair()[2] == 0.07
    history.add(picture(3), 1.0)
    assert history.pair() is None


def test_history_ignores_pictures_that_come_late_and_forgets_old_ones():
    history = FrameHistory(0.1)
    for number in range(100):
        history.add(picture(number), 0.01 * number)
    history.add(picture(200), 0.5)
    before, newest, _ = history.pair()
    assert (before[0, 0, 0], newest[0, 0, 0]) == (89, 99)
    assert len(history._frames) < 30
