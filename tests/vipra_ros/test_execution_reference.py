"""The reference follows chunks on time, smoothly, and stops smoothly when there is nothing more to follow."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruckig import ControlInterface, InputParameter, Result, Ruckig, Synchronization, Trajectory

from config.embodiment import Embodiment
from config.loading import load
from config.safety import Safety
from vipra_ros.execution.chunk import Chunk, Rejected
from vipra_ros.execution.reference import Reference, _Profile
from vipra_ros.safety.limits import JointLimits

SAFETY = load(Safety, "fr3")
LIMITS = JointLimits.of(SAFETY, 2)
HOME = np.tile([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398], 2)
RATE, H, TICK = 22.0, 14, 0.005


def move(t):
    """A 0.5 rad move of every joint and back, 4 s a cycle. [..., 14]"""
    return HOME + 0.25 * (1 - np.cos(math.tau * np.maximum(np.asarray(t), 0.0) / 4.0))[..., None] * np.ones(
        14
    )


def chunk(seq, t0, rate=RATE, n=H, path=move, offset=0.0, opening=1.0):
    return Chunk(seq, t0, rate, path(t0 + np.arange(n) / rate) + offset, np.full((n, 2), opening))


def still(q):
    return lambda t: np.broadcast_to(q, (*np.shape(t), 14))


def play(reference, start, end):
    """Samples at every tick in [start, end)."""
    ticks = np.arange(round(start / TICK), round(end / TICK)) * TICK
    return ticks, [reference.sample(t) for t in ticks]


def command(reference, seq, start, end, path):
    """The same, under a commander that sends chunks of `path` three times a second, from `seq` on."""
    samples = []
    for k, t in enumerate(np.arange(start, end - 1e-9, 0.3)):
        reference.add(chunk(seq + k, t, path=path), t)
        samples += play(reference, t, min(t + 0.3, end))[1]
    return samples


def derivatives(samples):
    """Largest |acceleration| and |jerk| as differences of what the arms are told."""
    dq = np.array([s.dq for s in samples])
    ddq = np.array([s.ddq for s in samples])
    by_difference = np.abs(np.diff(dq, axis=0)).max() / TICK
    return max(by_difference, np.abs(ddq).max()), np.abs(np.diff(ddq, axis=0)).max() / TICK


@pytest.mark.parametrize(("anchor", "replan_after"), [("observation", 7), ("append", 14)])
def test_steps_of_two_hundredths_at_chunk_boundaries_stay_far_below_the_limits(anchor, replan_after):
    reference, samples, next_at, seq, joins = Reference(SAFETY, LIMITS, HOME, 0.0), [], 0.0, 0, []
    for t in np.arange(2000) * TICK:
        if t >= next_at:
            seq += 1
            t0 = (
                reference.end_time if anchor == "append" and seq > 1 else t - 0.06 * (anchor == "observation")
            )
            new = chunk(seq, t0, offset=0.01 * (-1) ** seq * (seq > 1))
            joins.append(reference.add(new, t))
            next_at = new.end - 0.2 if anchor == "append" else t + replan_after / RATE
        samples.append(reference.sample(t))
    acceleration, jerk = derivatives(samples)
    assert max(j.size_rad for j in joins) > 0.015, "the boundaries do step"
    assert acceleration <= 10.0
    assert jerk <= 2500.0
    assert acceleration < 4.0 and jerk < 300.0, "measured 2.5 rad/s2 and 130 rad/s3"
    assert not any(s.starved for s in samples)
    assert all(j.smoothed_rad == 0.0 for j in joins)
    error = np.array([s.q for s in samples]) - move(np.arange(2000) * TICK)
    assert np.abs(error).max() < 0.02


def test_every_action_is_met_when_it_is_due():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    late = 0.1
    one = chunk(1, 1.0 - late, path=lambda t: HOME + 0.1 * np.sin(np.asarray(t) - 0.9)[..., None])
    info = reference.add(one, 1.0)
    assert info.first_index == math.ceil(late * RATE) == 3
    for i in range(info.first_index, H):
        due = one.t0 + i / RATE
        sample = reference.sample(due)
        assert (sample.seq, sample.index) == (1, i)
        if due > info.at + info.duration_s:
            np.testing.assert_allclose(sample.q, one.joints[i], atol=1e-12)
    assert reference.sample(one.end - 1e-3).index == H - 1


def test_velocity_is_the_derivative_of_position():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    reference.add(chunk(1, 0.0), 0.0)
    _, first = play(reference, 0.0, 0.3)
    reference.add(chunk(2, 0.25, offset=0.015), 0.3)
    _, second = play(reference, 0.3, 1.5)
    q = np.array([s.q for s in first + second])
    dq = np.array([s.dq for s in first + second])
    np.testing.assert_allclose(np.diff(q, axis=0) / TICK, 0.5 * (dq[1:] + dq[:-1]), atol=2e-3)


def test_a_join_lasts_as_long_as_its_size_needs():
    for size in (0.001, 0.02, 0.1, 0.149):
        reference = Reference(SAFETY, LIMITS, HOME, 0.0)
        reference.add(chunk(1, 0.0, path=still(HOME)), 0.0)
        reference.sample(0.1)
        info = reference.add(chunk(2, 0.1, path=still(HOME + size)), 0.1)
        a, v = 0.5 * LIMITS.acceleration[0], 0.5 * LIMITS.velocity[0]
        assert info.size_rad == pytest.approx(size)
        assert info.duration_s == pytest.approx(max(0.25, math.sqrt(5.8 * size / a), 1.9 * size / v))
        _, samples = play(reference, 0.1, 0.1 + 13 / RATE)
        acceleration, jerk = derivatives(samples)
        assert acceleration <= a * 1.01 and jerk <= 2500
        after = reference.sample(0.1 + info.duration_s)
        np.testing.assert_allclose(after.q, HOME + size, atol=1e-12)


def test_an_appended_chunk_continues_without_a_seam():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    one = chunk(1, 0.0)
    reference.add(one, 0.0)
    _, first = play(reference, 0.0, 0.3)
    info = reference.add(chunk(2, one.end), 0.3)
    assert info.at == pytest.approx(one.end - 1 / RATE)
    assert info.size_rad < 0.01
    _, second = play(reference, 0.3, 2 * one.end - 0.1)
    samples = first + second
    assert [s.seq for s in samples] == sorted(s.seq for s in samples)
    assert not any(s.starved for s in samples)
    acceleration, jerk = derivatives(samples)
    assert acceleration < 3.0 and jerk < 300.0


def test_when_chunks_run_out_the_arms_decelerate_and_hold():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    one = chunk(1, 0.0)
    reference.add(one, 0.0)
    ticks, samples = play(reference, 0.0, 2.0)
    acceleration, jerk = derivatives(samples)
    assert acceleration <= 5.01 and jerk <= 1001
    starved = np.array([s.starved for s in samples])
    assert (starved == (ticks >= one.end - 1e-9)).all()
    last = samples[-1]
    assert last.done and (last.dq == 0).all() and (last.ddq == 0).all()
    assert reference.at_rest(2.0)
    assert (samples[-50].q == last.q).all()
    later = reference.add(chunk(2, 2.0, path=lambda t: last.q + move(np.asarray(t) - 2.0) - HOME), 2.0)
    assert later.size_rad < 1e-9 and not later.aligning
    assert not reference.sample(2.0).starved


@pytest.mark.parametrize("at", [0.1, 0.4, 0.77, 1.0, 1.3])
def test_a_stop_starts_at_once_and_ends_in_time(at):
    reference, seq = Reference(SAFETY, LIMITS, HOME, 0.0), 0
    next_at = 0.0
    for t in np.arange(round(at / TICK)) * TICK:
        if t >= next_at:
            seq += 1
            reference.add(chunk(seq, t, path=lambda t: HOME + 2.0 * (move(t) - HOME)), t)
            next_at = t + 0.3
        reference.sample(t)
    before = reference.sample(at)
    reference.stop(at)
    fastest = np.abs(before.dq).max()
    allowed = SAFETY.stop.settle_s + fastest / SAFETY.stop.deceleration_rad_s2 - SAFETY.stop.reaction_s
    _, samples = play(reference, at, at + 3.0)
    acceleration, jerk = derivatives([before, *samples])
    assert acceleration <= max(5.01, np.abs(before.ddq).max() + 1e-9) and jerk <= 1001
    slow = [np.abs(s.dq).max() < SAFETY.stop.rest_velocity_rad_s for s in samples]
    assert slow.index(True) * TICK <= allowed + TICK
    assert all(slow[slow.index(True) :])
    assert samples[-1].done and not samples[-1].starved and (samples[-1].dq == 0).all()
    np.testing.assert_allclose(samples[0].q, before.q, atol=1e-12)


def test_a_stop_can_continue_from_what_the_gate_let_through():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    reference.add(chunk(1, 0.0), 0.0)
    reference.sample(0.3)
    q, dq = HOME + 0.01, np.full(14, 0.1)
    reference.stop(0.3, state=(q, dq, np.zeros(14)))
    sample = reference.sample(0.3)
    assert (sample.q == q).all() and (sample.dq == dq).all()
    assert reference.sample(1.0).done


def test_first_motion_is_slow_until_the_error_is_small():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    target = HOME + 0.25
    info = reference.add(chunk(1, 0.0, path=still(target)), 0.0)
    assert info.aligning and info.size_rad == pytest.approx(0.25)
    t, seq, speeds, errors = 0.0, 1, [], []
    while t < 3.0:
        sample = reference.sample(t)
        if round(t / TICK) % 60 == 59:
            seq += 1
            reference.add(chunk(seq, t, path=still(target)), t)
        if sample.aligning:
            speeds.append(np.abs(sample.dq).max())
            errors.append(np.abs(sample.q - target).max())
            assert sample.gripper is None, "hands wait for the arms"
            assert not sample.starved
        t += TICK
    assert max(speeds) <= 0.2 + 1e-9 and max(speeds) > 0.19
    assert min(errors) >= 0.05
    np.testing.assert_allclose(reference.sample(t).q, target, atol=1e-6)
    assert not reference.sample(t).aligning


def test_alignment_catches_a_chunk_that_moves():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    samples = command(reference, 1, 0.0, 3.0, lambda t: move(t / 4) + 0.2)
    assert samples[0].aligning and not samples[-1].aligning
    np.testing.assert_allclose(samples[-1].q, move(2.995 / 4) + 0.2, atol=0.01)
    acceleration, jerk = derivatives(samples)
    assert acceleration <= 6 and jerk <= 2500


def test_alignment_ends_with_its_chunk_when_no_other_comes():
    """However far the chunk goes: it has 0.64 s, and 0.2 rad/s are stopped within 0.1 s."""
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    made = chunk(1, 0.0, path=lambda t: HOME + 0.1 + 2.0 * np.asarray(t)[..., None])
    assert reference.add(made, 0.0).aligning
    ticks, samples = play(reference, 0.0, 2.0)
    for t, s in zip(ticks, samples, strict=True):
        assert s.aligning == (t < made.end) and s.starved == (t >= made.end)
        assert not s.dq.any() or t < made.end + 0.1
    assert samples[-1].done and samples[-1].starved
    assert np.abs(samples[-1].q - HOME).max() < 0.2 * (made.end + 0.1)
    acceleration, jerk = derivatives(samples)
    assert acceleration <= 6 and jerk <= 2500
    assert reference.add(chunk(2, 2.0, path=still(HOME + 0.3)), 2.0).aligning, "the next one goes on"


def test_a_close_first_chunk_needs_no_alignment():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    assert not reference.add(chunk(1, 0.0, offset=0.04), 0.0).aligning


def code(call):
    with pytest.raises(Rejected) as rejected:
        call()
    return rejected.value.code


def test_chunks_that_must_not_run_are_rejected_and_change_nothing():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    assert code(lambda: reference.add(chunk(1, 0.0, offset=0.31), 0.0)) == "start"
    reference.add(chunk(5, 0.0), 0.0)
    before = reference.sample(0.2)
    bad = {
        "stale": chunk(5, 0.2),
        "expired": chunk(6, 0.2 - 14 / RATE),
        "future": chunk(6, 0.2 + 2.1),
        "jump": chunk(6, 0.2, offset=0.16),
        "shape": Chunk(6, 0.2, RATE, np.zeros((14, 7)), np.zeros((14, 1))),
        "position": chunk(6, 0.2, path=lambda t: move(t) + np.linspace(0, -1, 14)[:, None] * np.eye(14)[3]),
        "velocity": chunk(6, 0.2, path=lambda t: move(t) + 0.2 * (-1.0) ** np.arange(14)[:, None]),
        "rough": chunk(6, 0.0, 5.0, path=lambda t: move(t) + 0.2 * np.sin(2 * np.arange(14))[:, None]),
    }
    for expected, rejected in bad.items():
        assert code(lambda rejected=rejected: reference.add(rejected, 0.2)) == expected
        after = reference.sample(0.2)
        assert (after.q == before.q).all() and after.seq == 5
    assert reference.seq == 5
    reference.reseed(before.q, 0.2)
    reference.add(chunk(1, 0.2), 0.2)


def test_arms_that_ran_out_of_actions_align_to_a_chunk_too_far_to_join():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    reference.add(chunk(1, 0.0), 0.0)
    _, first = play(reference, 0.0, 0.7)
    assert code(lambda: reference.add(chunk(2, 0.7, offset=0.2), 0.7)) == "jump", "not at rest yet"
    _, second = play(reference, 0.7, 1.2)
    assert second[-1].done and second[-1].starved
    rest = second[-1].q
    assert code(lambda: reference.add(chunk(2, 1.2, path=still(rest + 0.31)), 1.2)) == "start"
    assert not reference.add(chunk(3, 1.2, path=still(rest + 0.1)), 1.2).aligning, "joined as ever"
    _, third = play(reference, 1.2, 2.5)
    rest = third[-1].q
    assert reference.add(chunk(4, 2.5, path=still(rest + 0.2)), 2.5).aligning
    _, fourth = play(reference, 2.5, 2.8)
    fifth = command(reference, 5, 2.8, 5.0, still(rest + 0.25))  # the next ones, on the way
    assert fifth[0].aligning
    aligning = [s for s in fourth + fifth if s.aligning]
    assert 0.15 < max(np.abs(s.dq).max() for s in aligning) <= 0.2 + 1e-9
    np.testing.assert_allclose(fifth[-1].q, rest + 0.25, atol=1e-6)
    acceleration, jerk = derivatives(first + second + third + fourth + fifth)
    assert acceleration <= 10 and jerk <= 2500


def test_another_commander_starts_slowly_and_with_its_own_numbers_while_the_arms_still_move():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    reference.add(chunk(50, 0.0), 0.0)
    _, first = play(reference, 0.0, 0.6)
    reference.stop(0.6)
    reference.start_over()
    _, second = play(reference, 0.6, 0.62)
    target = second[-1].q + 0.2
    third = command(reference, 1, 0.62, 3.0, still(target))
    assert third[0].aligning
    acceleration, jerk = derivatives(first + second + third)
    assert acceleration <= 5.1 and jerk <= 2500, "no jump in velocity"
    aligning = [s for s in third if s.aligning]
    assert all((s.dq > -1e-9).all() for s in aligning), "straight there"
    assert max(np.abs(s.dq).max() for s in aligning[40:]) <= 0.2 + 1e-9
    np.testing.assert_allclose(third[-1].q, target, atol=1e-6)


def test_what_is_no_chunk_cannot_be_built():
    q, g = np.zeros((14, 14)), np.zeros((14, 2))
    assert code(lambda: Chunk(0, 0.0, RATE, np.full((14, 14), np.nan), g)) == "non_finite"
    assert code(lambda: Chunk(0, math.inf, RATE, q, g)) == "non_finite"
    assert code(lambda: Chunk(0, 0.0, 0.0, q, g)) == "rate"
    assert code(lambda: Chunk(0, 0.0, math.nan, q, g)) == "rate"
    assert code(lambda: Chunk(0, 0.0, RATE, q[0], g)) == "shape"
    assert code(lambda: Chunk(0, 0.0, RATE, q, g[:3])) == "shape"
    assert code(lambda: Chunk(0, 0.0, RATE, q[:0], g[:0])) == "shape"
    assert code(lambda: Chunk(0, 0.0, RATE, q, g + 1.5)) == "gripper"


def test_actions_are_split_by_the_embodiment():
    embodiment = load(Embodiment, "franka_bimanual")
    actions = np.tile(np.arange(16) / 100.0, (14, 1))
    made = Chunk.from_actions(3, 1.0, RATE, actions, embodiment)
    assert made.joints.shape == (14, 14) and made.grippers.shape == (14, 2)
    np.testing.assert_allclose(made.grippers[0], [0.07, 0.15])
    np.testing.assert_allclose(made.joints[0, 6:8], [0.06, 0.08])
    assert code(lambda: Chunk.from_actions(3, 1.0, RATE, actions[:, :8], embodiment)) == "shape"
    with pytest.raises(ValueError, match="read-only"):
        made.joints[0, 0] = 1.0


def test_gripper_openings_are_due_like_joints_but_not_blended():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    assert reference.sample(0.0).gripper is None
    openings = np.linspace(0, 1, 14)[:, None] * np.ones(2)
    reference.add(Chunk(1, 0.1, RATE, move(0.1 + np.arange(14) / RATE), openings), 0.0)
    assert reference.sample(0.09).gripper is None
    for i in range(14):
        assert (reference.sample(0.1 + (i + 0.5) / RATE).gripper == openings[i]).all()
    reference.stop(0.75)
    assert (reference.sample(2.0).gripper == openings[-1]).all(), "a stop does not drop what is held"


def test_single_action_chunks_work_as_a_stream():
    reference = Reference(SAFETY, LIMITS, HOME, 0.0)
    samples = []
    for k in range(400):
        t = k * TICK
        if k % 8 == 0:
            reference.add(chunk(k + 1, t, rate=25.0, n=1), t)
        samples.append(reference.sample(t))
    acceleration, jerk = derivatives(samples)
    assert acceleration < 10 and jerk < 2500


def test_noisy_chunks_are_smoothed_into_the_limits():
    rng = np.random.default_rng(0)
    reference, samples, joins = Reference(SAFETY, LIMITS, HOME, 0.0), [], []
    for k in range(1200):
        t = k * TICK
        if k % 64 == 0:
            noisy = move(t - 0.06 + np.arange(H) / RATE) + 0.01 * rng.standard_normal((H, 14))
            joins.append(reference.add(Chunk(k + 1, t - 0.06, RATE, noisy, np.ones((H, 2))), t))
        samples.append(reference.sample(t))
    acceleration, jerk = derivatives(samples)
    assert acceleration < 10 and jerk < 2500
    assert 0 < max(j.smoothed_rad for j in joins) < 0.04


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_reference_is_continuous_whatever_is_accepted(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    reference, seq, last = Reference(SAFETY, LIMITS, HOME, 0.0), 0, None
    centre = HOME.copy()
    for k in range(200):
        t = k * TICK
        event = rng.random()
        if event < 0.08:
            seq += 1
            n = int(rng.integers(1, 20))
            rate = float(rng.uniform(5, 40))
            centre = centre + rng.normal(0, 0.03, 14)
            path = centre + np.cumsum(rng.normal(0, 0.02, (n, 14)), axis=0)
            try:
                reference.add(Chunk(seq, t + rng.uniform(-0.4, 0.4), rate, path, np.ones((n, 2))), t)
            except Rejected as rejected:
                assert rejected.code in ("expired", "jump", "start", "rough", "velocity")
        elif event < 0.09:
            reference.stop(t)
        sample = reference.sample(t)
        assert np.isfinite(sample.q).all() and np.isfinite(sample.dq).all()
        if last is not None:
            np.testing.assert_allclose(sample.q - last.q, 0.5 * TICK * (sample.dq + last.dq), atol=1e-3)
        last = sample
    _, rest = play(reference, 1.0, 8.0)
    assert rest[-1].done and (rest[-1].dq == 0).all()


def test_motion_profiles_are_evaluated_as_ruckig_does():
    rng = np.random.default_rng(0)
    for n in range(100):
        request = InputParameter(14)
        request.current_position = rng.normal(0, 1, 14)
        request.current_velocity = rng.normal(0, 0.6, 14) * (rng.random(14) < 0.7)
        request.current_acceleration = rng.normal(0, 6, 14) * (rng.random(14) < 0.7)
        request.synchronization = Synchronization.No
        if n % 2:
            request.control_interface = ControlInterface.Velocity
            request.max_acceleration, request.max_jerk = np.full(14, 5.0), np.full(14, 1000.0)
        else:
            request.target_position = np.asarray(request.current_position) + rng.normal(0, 0.2, 14)
            request.max_velocity = np.full(14, 0.2)
            request.max_acceleration, request.max_jerk = np.full(14, 1.0), np.full(14, 20.0)
        trajectory = Trajectory(14)
        assert Ruckig(14).calculate(request, trajectory) == Result.Working
        profile = _Profile(3.0, trajectory)
        for u in np.linspace(0.0, trajectory.duration, 40, endpoint=False):
            for ours, theirs in zip(profile(3.0 + u), trajectory.at_time(u), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-9)
        at_end = profile(3.0 + trajectory.duration + 1e-6)
        np.testing.assert_allclose(at_end[0], trajectory.at_time(trajectory.duration)[0], atol=1e-9)
        assert (at_end[1] == 0).all()
