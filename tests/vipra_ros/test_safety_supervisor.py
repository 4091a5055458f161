"""The gate passes what is safe unchanged and turns everything else into a controlled stop with a reason."""

import math

import numpy as np
import pytest

from config.loading import load
from config.safety import Safety
from config.workcell import Workcell
from vipra_ros.execution.chunk import Chunk
from vipra_ros.execution.reference import Reference
from vipra_ros.safety.supervisor import Supervisor

SAFETY = load(Safety, "fr3")
HOME = np.tile([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398], 2)
ARMS = ("left", "right")
TICK = 0.005
WRIST = np.tile([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0], 2)


@pytest.fixture
def gate() -> Supervisor:
    return Supervisor(SAFETY, ARMS, load(Workcell, "bimanual"), HOME, 0.0)


@pytest.fixture
def free() -> Supervisor:
    """Without geometry."""
    return Supervisor(SAFETY, ARMS, None, HOME, 0.0)


def turning(t, speed=0.5):
    """Both wrists, smoothly up to `speed` rad/s within 0.5 s and on."""
    w = math.pi / 0.5
    t = np.asarray(t, dtype=float)
    ramp = np.minimum(t, 0.5)
    dq = 0.5 * speed * (1 - np.cos(w * ramp))
    q = 0.5 * speed * (ramp - np.sin(w * ramp) / w) + speed * np.maximum(t - 0.5, 0.0)
    return HOME + q * WRIST, dq * WRIST


def run(gate, until=0.6, speed=0.5):
    for k in range(1, round(until / TICK) + 1):
        verdict = gate.check(k * TICK, *turning(k * TICK, speed))
        assert verdict.action == "pass" and not verdict.interventions
    return k * TICK, verdict


def stop(gate, t, target=None):
    """Ticks until rest; returns the time from t to |dq| < rest velocity, checking the way down."""
    q0, dq0, _ = gate.state
    fastest, quiet = np.abs(dq0).max(), None
    for k in range(1, 400):
        now = t + k * TICK
        q, dq = target(now) if target else turning(now)
        verdict = gate.check(now, q, dq)
        assert verdict.action in ("hold", "fault")
        assert (np.abs(verdict.dq) <= np.abs(dq0) + 0.01).all(), "never faster"
        assert (np.abs(verdict.dq - dq0) <= gate.limits.acceleration * TICK + 1e-9).all()
        np.testing.assert_allclose(verdict.q - q0, 0.5 * TICK * (verdict.dq + dq0), atol=1e-4)
        q0, dq0 = verdict.q, verdict.dq
        if quiet is None and np.abs(dq0).max() < SAFETY.stop.rest_velocity_rad_s:
            quiet = k * TICK
    assert (dq0 == 0).all()
    assert quiet <= SAFETY.stop.settle_s + fastest / SAFETY.stop.deceleration_rad_s2
    again = gate.check(now + TICK, *turning(now + TICK))
    assert (again.q == q0).all() and (again.dq == 0).all(), "holds still"
    return quiet


def test_chunks_within_limits_pass_bit_for_bit(gate):
    reference = Reference(SAFETY, gate.limits, HOME, 0.0)

    def path(t):
        return turning(np.asarray(t)[:, None] if np.ndim(t) else t, 0.3)[0]

    for k in range(1, 300):
        t = k * TICK
        if k % 60 == 1:
            chunk = Chunk(
                k, t - 0.06, 22.0, path(np.maximum(t - 0.06 + np.arange(14) / 22.0, 0)), np.ones((14, 2))
            )
            assert gate.check_chunk(chunk).action == "pass"
            reference.add(chunk, t)
        sample = reference.sample(t)
        verdict = gate.check(t, sample.q, sample.dq, measured=sample.q - 0.01)
        assert verdict.action == "pass" and verdict.interventions == {} and verdict.reason == ""
        assert verdict.q is sample.q and verdict.dq is sample.dq


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "dq"])
def test_a_target_that_is_not_finite_is_a_fault_and_never_comes_out(gate, bad, where):
    t, _ = run(gate)
    q, dq = turning(t + TICK)
    (q if where == "q" else dq)[3] = bad
    verdict = gate.check(t + TICK, q, dq)
    assert (verdict.action, verdict.code) == ("fault", "non_finite")
    assert np.isfinite(verdict.q).all() and np.isfinite(verdict.dq).all()
    stop(gate, t + TICK)


def test_a_target_of_the_wrong_size_is_a_fault(free):
    t, _ = run(free)
    assert free.check(t + TICK, HOME[:7], np.zeros(7)).code == "size"
    stop(free, t + TICK)


def test_a_hold_from_elsewhere_starts_at_once_and_keeps_the_first_reason(free):
    t, _ = run(free, speed=1.5)
    free.hold("peer", "right arm silent for 61 ms", "fault")
    free.hold("operator", "stop pressed")
    verdict = free.check(t + TICK, *turning(t + TICK, 1.5))
    assert (verdict.action, verdict.code, verdict.reason) == ("fault", "peer", "right arm silent for 61 ms")
    assert np.abs(verdict.dq).max() < 1.5, "decelerates in the first tick"
    assert free.held == "right arm silent for 61 ms"
    stop(free, t + TICK)


def test_nothing_passes_until_reset(free):
    t, _ = run(free)
    free.hold("operator", "stop pressed")
    stop(free, t)
    q = free.state[0]
    free.reset(q, 10.0)
    assert free.held is None
    assert free.check(10.0 + TICK, q, np.zeros(14)).action == "pass"


def test_a_late_tick_is_a_fault_and_a_slow_one_catches_up_within_limits(free):
    t, _ = run(free)
    late = t + 0.06
    verdict = free.check(late, *turning(late))
    assert verdict.action == "pass" and verdict.interventions, "does not jump to now"
    assert np.abs(verdict.q - turning(t)[0]).max() < 0.5 * 0.025
    for k in range(1, 60):
        verdict = free.check(late + k * TICK, *turning(late + k * TICK))
    assert not verdict.interventions and (verdict.q == turning(late + k * TICK)[0]).all()
    gone = late + k * TICK + 0.2
    assert free.check(gone, *turning(gone)).code == "late"
    stop(free, gone)


def test_time_that_goes_back_is_a_fault(free):
    t, _ = run(free)
    assert free.check(t - 0.1, *turning(t)).code == "clock"
    stop(free, t)


def test_a_lasting_tracking_error_holds_and_a_short_one_does_not(free):
    off = np.zeros(14)
    off[9] = 0.11
    t, _ = run(free)
    for k in range(1, 9):  # 40 ms
        q, dq = turning(t + k * TICK)
        assert free.check(t + k * TICK, q, dq, measured=q - off).action == "pass"
    q, dq = turning(t + 9 * TICK)
    assert free.check(t + 9 * TICK, q, dq, measured=q).action == "pass"
    t += 9 * TICK
    actions = []
    for k in range(1, 14):
        q, dq = turning(t + k * TICK)
        actions.append(free.check(t + k * TICK, q, dq, measured=free.state[0] - off))
    codes = [v.code for v in actions]
    assert codes.index("tracking") * TICK == pytest.approx(SAFETY.tracking.duration_s)
    assert "right joint 3" in actions[-1].reason


def test_a_measurement_that_is_not_finite_is_a_fault(free):
    t, _ = run(free)
    q, dq = turning(t + TICK)
    assert free.check(t + TICK, q, dq, measured=np.full(14, np.nan)).code == "state"


def test_arms_driven_towards_each_other_stop_before_they_meet(gate):
    def towards(t, speed=0.4):
        w = math.pi / 0.5
        ramp = min(t, 0.5)
        dq = 0.5 * speed * (1 - math.cos(w * ramp))
        q = 0.5 * speed * (ramp - math.sin(w * ramp) / w) + speed * max(t - 0.5, 0.0)
        turn = np.zeros(14)
        turn[0], turn[7] = -1.0, 1.0
        return HOME + q * turn, dq * turn

    nearest = math.inf
    for k in range(1, 800):
        verdict = gate.check(k * TICK, *towards(k * TICK))
        if k % 4 == 0:
            nearest = min(nearest, gate.geometry.distances(verdict.q)["arms"][0])
    assert verdict.action == "hold" and verdict.code == "arm_collision"
    assert "left" in verdict.reason and "right" in verdict.reason
    assert (verdict.dq == 0).all()
    assert 0.02 < nearest < 0.06, "stops near the 3 cm it may come close to"


def test_chunks_that_must_not_be_sent_are_named(gate):
    def verdict(joints):
        return gate.check_chunk(Chunk(1, 0.0, 22.0, joints, np.ones((len(joints), 2))))

    still = np.tile(HOME, (14, 1))
    assert verdict(still).action == "pass"
    far = still.copy()
    far[5, 10] = 0.1
    assert (
        verdict(far).code == "position"
        and "action 5" in verdict(far).reason
        and "right joint 4" in verdict(far).reason
    )
    fast = still.copy()
    fast[7:, 6] += 0.5
    assert verdict(fast).code == "velocity" and "left joint 7" in verdict(fast).reason
    meeting = still + np.linspace(0, 0.75, 14)[:, None] * np.r_[-1.0, np.zeros(6), 1.0, np.zeros(6)]
    assert verdict(meeting).code in ("arm_collision", "workspace", "speed")
    assert verdict(still[:, :7]).code == "size"
    assert verdict(still).action == "pass", "checking a chunk changes nothing"


def test_starts_outside_the_hard_limits_are_refused(free):
    q = HOME.copy()
    assert free.check_start(q) is None
    q[3] = 0.0
    assert "left joint 4" in free.check_start(q)
    with pytest.raises(ValueError, match="left joint 4"):
        free.reset(q, 1.0)
    assert "finite" in free.check_start(np.full(14, np.nan))
    assert "14" in free.check_start(HOME[:7])


def test_a_stop_near_the_end_of_travel_brakes_as_hard_as_needed(free):
    limits = free.limits
    q = HOME.copy()
    q[4] = limits.soft_max[4] - 1.0
    free.reset(q, 0.0)
    for k in range(1, 2000):  # as fast as allowed towards the soft limit of joint 5
        target = free.state[0].copy()
        target[4] += 0.05
        velocity = np.zeros(14)
        velocity[4] = 5.0
        verdict = free.check(k * TICK, target, velocity)
        if limits.soft_max[4] - verdict.q[4] < 0.1:
            break
    assert verdict.dq[4] > 0.5
    free.hold("operator", "stop pressed")
    for n in range(1, 100):
        verdict = free.check((k + n) * TICK, target, velocity)
        assert verdict.q[4] <= limits.soft_max[4] + 1e-9
    assert (verdict.dq == 0).all()


def test_the_panda_has_the_same_gate_with_its_own_numbers():
    panda = Supervisor(load(Safety, "panda"), ARMS, load(Workcell, "bimanual"), HOME, 0.0)
    run(panda)
    assert panda.limits.velocity[0] < 2.175


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_reference_of_a_noisy_policy_passes_the_gate_untouched(gate, noise):
    """Smoothing and joins leave nothing for the gate to correct, late ticks included."""
    rng = np.random.default_rng(0)
    reference, next_at, passed = Reference(SAFETY, gate.limits, HOME, 0.0), 0.0, 0
    for k in range(1, 1200):
        t = k * TICK + (rng.random() < 0.02) * 0.004 * rng.random()
        if t >= next_at:
            due = np.maximum(t - 0.06 + np.arange(14) / 22.0, 0.0)
            path = (
                HOME + 0.2 * (1 - np.cos(1.5 * due))[:, None] * WRIST + noise * rng.standard_normal((14, 14))
            )
            chunk = Chunk(k, t - 0.06, 22.0, path, np.ones((14, 2)))
            assert gate.check_chunk(chunk).action == "pass"
            reference.add(chunk, t)
            next_at = t + 7 / 22
        sample = reference.sample(t)
        verdict = gate.check(t, sample.q, sample.dq, measured=sample.q)
        assert verdict.action == "pass", verdict.reason
        passed += verdict.q is sample.q and not verdict.interventions
    assert passed == 1199
