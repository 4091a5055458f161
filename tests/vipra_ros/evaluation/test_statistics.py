"""Intervals and the paired test agree with scipy and published values; smoothness with the analyses' own."""

import numpy as np
import pytest
from scipy.stats import beta, binomtest

from config.safety import GripperLimits
from training.analysis import smoothness as analysis
from vipra_ros.evaluation import motion
from vipra_ros.evaluation.statistics import clopper_pearson, mcnemar


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("trials", [1, 7, 24, 50, 200])
def test_intervals_are_clopper_and_pearsons(trials, confidence):
    tail = (1 - confidence) / 2
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        low, high = clopper_pearson(successes, trials, confidence)
        expected_low = beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
        expected_high = beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
        assert low == pytest.approx(expected_low, abs=1e-9)
        assert high == pytest.approx(expected_high, abs=1e-9)


def test_published_intervals():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20, Clopper-Pearson
    assert clopper_pearson(81, 263) == pytest.approx((0.2527, 0.3676), abs=5e-5)
    assert clopper_pearson(0, 20) == pytest.approx((0.0, 0.1684), abs=5e-5)
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="4 successes in 3"):
        clopper_pearson(4, 3)


def test_the_paired_test_is_the_exact_binomial_one():
    for only_a, only_b in [(0, 0), (0, 5), (1, 9), (12, 12), (30, 7), (100, 60)]:
        pairs = only_a + only_b
        expected = binomtest(only_a, pairs, 0.5).pvalue if pairs else 1.0
        assert mcnemar(only_a, only_b) == pytest.approx(expected)
        assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a)
    assert mcnemar(0, 6) == pytest.approx(2 / 64)


def test_smoothness_is_that_of_the_analyses():
    t = np.arange(60) / 15
    reach = np.clip(t / 4, 0, 1)[:, None]
    smooth = (reach**3 * (10 - 15 * reach + 6 * reach**2)) * np.linspace(0.2, 1.0, 7)
    rough = smooth + 0.02 * np.random.default_rng(0).normal(size=smooth.shape)
    found = {}
    for name, joints in (("smooth", smooth), ("rough", rough)):
        whole = analysis.measure([joints], 15.0, np.full(7, np.inf))
        found[name] = motion.spectral_arc_length(joints, 15.0), motion.jerk_rms(joints, 15.0)
        assert found[name][0] == pytest.approx(whole["spectral_arc_length"])
        by_joint = np.array(whole["jerk_rms_by_dimension"])
        assert found[name][1] == pytest.approx(np.sqrt((by_joint**2).mean()))
    assert found["rough"][0] < found["smooth"][0] and found["rough"][1] > found["smooth"][1]
    assert motion.jerk_rms(smooth[:5], 15.0) is None
    assert motion.spectral_arc_length(np.zeros((40, 7)), 15.0) is None


def test_a_hand_that_closes_again_retries():
    hand = GripperLimits(close_below=0.35, open_above=0.65)
    once = np.repeat([1.0, 0.5, 0.0, 0.5, 0.0, 1.0], 5)  # half open is neither
    thrice = np.repeat([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], 5)  # the closed hand it began with closed nothing
    assert motion.retries(once[:, None], hand) == 0
    assert motion.retries(thrice[:, None], hand) == 1
    assert motion.retries(np.stack([thrice, once, 1.0 - thrice], axis=1), hand) == 3
    assert motion.retries(np.ones((9, 1)), hand) == 0 and motion.retries(np.zeros((9, 0)), hand) is None
