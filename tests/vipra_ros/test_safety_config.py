"""config/safety: what the limits promise, and what the schema refuses."""

import copy

import numpy as np
import pytest
import yaml

from config.loading import ConfigError, find, load, parse
from config.safety import Safety
from vipra_ros.safety.limits import JointLimits

MODELS = ("fr3", "panda")


def data(model: str) -> dict:
    return copy.deepcopy(yaml.safe_load(find("safety", model).read_text()))


@pytest.mark.parametrize("model", MODELS)
def test_every_value_names_its_source(model):
    for line in find("safety", model).read_text().splitlines():
        value = line.split("#")[0].partition(":")[2]
        if any(character.isdigit() for character in value):
            assert any(tag in line for tag in ("[doc]", "[sheet]", "[ours]")), line


@pytest.mark.parametrize("model", MODELS)
def test_soft_limits_lie_inside_hard_ones(model):
    limits = JointLimits.of(load(Safety, model), 2)
    assert limits.size == 14
    np.testing.assert_allclose(limits.soft_min - limits.hard_min, 0.1)
    np.testing.assert_allclose(limits.hard_max - limits.soft_max, 0.1)
    assert (limits.velocity < limits.hard_velocity).all()
    assert (limits.reference_jerk <= 0.5 * limits.jerk).all()


def test_fr3_envelope_is_the_published_one():
    limits = JointLimits.of(load(Safety, "fr3"), 1)
    q = np.array([2.5, 1.6, 2.7, -0.4, 2.7, 4.3, 2.9])
    _, up = limits.published.bounds(q)
    published = [  # libfranka, include/franka/rate_limiting.h
        -0.30 + np.sqrt(12.0 * (2.75010 - q[0])),
        -0.20 + np.sqrt(5.17 * (1.79180 - q[1])),
        -0.20 + np.sqrt(7.00 * (2.90650 - q[2])),
        -0.30 + np.sqrt(8.00 * (-0.1458 - q[3])),
        -0.35 + np.sqrt(34.0 * (2.81010 - q[4])),
        -0.35 + np.sqrt(11.0 * (4.52050 - q[5])),
        -0.35 + np.sqrt(34.0 * (3.01960 - q[6])),
    ]
    np.testing.assert_allclose(up, published)


@pytest.mark.parametrize("model", MODELS)
def test_commanded_velocity_is_always_below_the_published_bound(model):
    limits = JointLimits.of(load(Safety, model), 1)
    for u in np.linspace(0.0, 1.0, 101):
        q = limits.soft_min + u * (limits.soft_max - limits.soft_min)
        low, high = limits.velocity_bounds(q)
        hard_low, hard_high = limits.published.bounds(q)
        assert (high <= hard_high + 1e-12).all() and (low >= hard_low - 1e-12).all()
        assert (high >= 0).all() and (low <= 0).all()
    assert (limits.velocity_bounds(limits.soft_max)[1] == 0).all()
    assert (limits.velocity_bounds(limits.soft_min)[0] == 0).all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d["joints"].update(soft_margin_rad=-0.1), "soft_margin_rad"),
        (lambda d: d["joints"]["position_max_rad"].__setitem__(3, -3.0), "no travel"),
        (lambda d: d["joints"]["velocity_envelope"]["upper_rad"].__setitem__(0, 2.0), "velocity envelope"),
        (lambda d: d["joints"]["velocity_envelope"].update(share=1.0), "over the limit"),
        (lambda d: d["joints"]["velocity_rad_s"].pop(), "velocity_rad_s has 6 values, the arm has 7"),
        (lambda d: d["joints"]["acceleration_rad_s2"].__setitem__(0, float("nan")), "acceleration_rad_s2"),
        (lambda d: d["stop"].update(deceleration_rad_s2=50.0), "stop.deceleration_rad_s2"),
        (lambda d: d["start"].update(aligned_error_rad=0.4), "aligned_error_rad"),
        (lambda d: d["gripper"].update(close_below=0.9), "close_below"),
        (lambda d: d["contact"]["contact_torque_nm"].__setitem__(0, 99.0), "contact thresholds"),
        (lambda d: d.update(stopp={}), "unknown key"),
    ],
)
def test_contradicting_limits_are_refused(change, word):
    wrong = data("fr3")
    change(wrong)
    with pytest.raises(ConfigError, match=word):
        parse(Safety, wrong, "fr3.yaml")
