"""The envelope filter holds its limits against anything, and leaves what is within them alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.loading import load
from config.safety import Safety
from vipra_ros.safety.envelope import KINDS, Envelope
from vipra_ros.safety.limits import JointLimits

LIMITS = {model: JointLimits.of(load(Safety, model), 1) for model in ("fr3", "panda")}
EPS = 1e-9

wild = st.one_of(
    st.floats(-4, 4),
    st.floats(-1e3, 1e3),
    st.sampled_from([0.0, 1e300, -1e300, 5e-324]),
)
joints = st.lists(wild, min_size=7, max_size=7).map(np.array)
ticks = st.lists(
    st.tuples(joints, joints, st.sampled_from([0.001, 0.004, 0.005, 0.0051, 0.01, 0.02])), max_size=25
)


def assert_within(limits: JointLimits, before, q, dq, dt):
    low, high = limits.velocity_bounds(q)
    assert (q >= limits.soft_min - EPS).all() and (q <= limits.soft_max + EPS).all()
    assert (dq <= high + EPS).all() and (dq >= low - EPS).all()
    assert (np.abs(dq - before[1]) <= limits.acceleration * dt + EPS).all()
    moved = q - before[0] - 0.5 * dt * (before[1] + dq)  # positions agree with velocities
    assert (np.abs(moved) <= limits.acceleration * dt * dt / 4 + EPS).all()


@pytest.mark.parametrize("model", LIMITS)
@given(start=st.lists(st.floats(0, 1), min_size=7, max_size=7).map(np.array), ticks=ticks)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_input_gets_out_of_limits(model, start, ticks):
    limits = LIMITS[model]
    envelope = Envelope(limits, limits.soft_min + start * (limits.soft_max - limits.soft_min))
    with np.errstate(over="ignore"):
        for q, dq, dt in ticks:
            before = envelope.q, envelope.dq
            q, dq, kinds = envelope.filter(q, dq, dt)
            assert_within(limits, before, q, dq, dt)
            assert set(kinds) <= set(KINDS)


@pytest.mark.parametrize("model", LIMITS)
@pytest.mark.parametrize("end", [-1.0, 1.0])
@pytest.mark.parametrize("dt", [0.001, 0.005, 0.02])
def test_full_speed_into_the_end_of_travel_stops_before_it(model, end, dt):
    limits = LIMITS[model]
    envelope = Envelope(limits, 0.5 * (limits.soft_min + limits.soft_max))
    fastest = 0.0
    for _ in range(round(4 / dt)):
        before = envelope.q, envelope.dq
        target = envelope.q + end * limits.hard_velocity * dt
        q, dq, _ = envelope.filter(target, end * limits.hard_velocity, dt)
        assert_within(limits, before, q, dq, dt)
        fastest = max(fastest, np.abs(dq / limits.velocity).max())
    assert fastest == pytest.approx(1.0), "the limit is used, not just kept"
    edge = limits.soft_max if end > 0 else limits.soft_min
    np.testing.assert_allclose(q, edge, atol=0.01)


@pytest.mark.parametrize("model", LIMITS)
def test_motion_within_limits_passes_bit_for_bit(model):
    limits = LIMITS[model]
    middle, span = 0.5 * (limits.soft_min + limits.soft_max), 0.5 * (limits.soft_max - limits.soft_min)
    amplitude = np.minimum(0.5 * span, 0.4)
    envelope = Envelope(limits, middle - amplitude)
    w = 2.0
    for k in range(1, 2000):
        t = 0.005 * k
        q = middle - amplitude * np.cos(w * t)
        dq = amplitude * w * np.sin(w * t)
        out, velocity, kinds = envelope.filter(q, dq, 0.005)
        assert kinds == {} and out is q and velocity is dq


@pytest.mark.parametrize("model", LIMITS)
def test_after_a_step_the_output_arrives_and_then_passes_bit_for_bit_again(model):
    limits = LIMITS[model]
    start = 0.5 * (limits.soft_min + limits.soft_max)
    target = start + np.array([0.3, -0.3, 0.2, 0.3, -0.5, 0.4, 1.0])
    envelope, rest, counts = Envelope(limits, start), np.zeros(7), {}
    for _ in range(600):
        q, dq, kinds = envelope.filter(target, rest, 0.005)
        for kind, n in kinds.items():
            counts[kind] = counts.get(kind, 0) + n
    assert (q == target).all() and (dq == 0).all() and kinds == {}
    assert counts["step"] > 0


def test_each_kind_of_excess_is_counted_as_itself():
    limits = LIMITS["fr3"]
    middle, dt, none = 0.5 * (limits.soft_min + limits.soft_max), 0.005, np.zeros(7)
    one = np.eye(7)[0]

    def kinds(q, dq, start_dq=none):
        envelope = Envelope(limits, middle)
        envelope.reset(middle, start_dq)
        return envelope.filter(q, dq, dt)[2]

    assert kinds(limits.soft_max + one, none) == {"position": 1, "step": 6}
    assert kinds(middle + 2.6 * dt * one, 2.6 * one, 2.3 * one)["velocity"] == 1
    assert kinds(middle + 0.5 * dt * 0.06 * one, 0.06 * one) == {"acceleration": 1}
    assert kinds(middle + 0.01 * one, none) == {"step": 1}
    assert kinds(middle, none) == {}


def test_a_joint_outside_its_soft_limit_may_rest_or_return_but_not_go_further():
    limits = LIMITS["fr3"]
    start = limits.soft_max.copy()
    start[0] += 0.05
    envelope, rest = Envelope(limits, start), np.zeros(7)
    q, _, kinds = envelope.filter(start, rest, 0.005)
    assert (q == start).all() and kinds == {}
    outwards = start + 0.01
    for _ in range(100):
        q, _, _ = envelope.filter(outwards, rest, 0.005)
        assert (q <= start + EPS).all()
    for _ in range(400):
        q, _, _ = envelope.filter(start - 0.2, rest, 0.005)
    np.testing.assert_allclose(q, start - 0.2, atol=1e-6)
    for _ in range(400):
        q, _, _ = envelope.filter(start, rest, 0.005)
    assert q[0] <= limits.soft_max[0] + EPS, "once inside, the soft limit holds"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_error_and_changes_nothing(bad):
    limits = LIMITS["fr3"]
    envelope = Envelope(limits, 0.5 * (limits.soft_min + limits.soft_max))
    q = envelope.q.copy()
    for target, velocity in ((np.full(7, bad), np.zeros(7)), (q, np.full(7, bad))):
        with pytest.raises(ValueError, match="finite"):
            envelope.filter(target, velocity, 0.005)
    assert (envelope.q == q).all()
