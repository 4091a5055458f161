"""Arms follow their leaders smoothly, and nothing a leader does moves them outside the limits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.loading import ConfigError, load, parse
from config.safety import Safety
from config.teleop import Filter, Teleop
from vipra_ros.execution.reference import Reference
from vipra_ros.robot.hands import Hysteresis
from vipra_ros.safety.limits import JointLimits
from vipra_ros.teleop.follow import Refused, State, Teleoperation
from vipra_ros.teleop.leader import OneEuro, Samples, Stamps

HOME = np.array([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398])
LEADERS = {"left": {"namespace": "left"}, "right": {"namespace": "right"}}
PERIOD = 0.04
SAFETY = load(Safety, "fr3")


def config(**changes) -> Teleop:
    return parse(Teleop, {"source": "topics", "leaders": LEADERS, **changes}, "test")


class Rig:
    """Leaders with `path(t)` [7A], sampled at 25 Hz, and arms at `measured`."""

    def __init__(self, arms=("right",), path=None, start=HOME, **changes):
        self.config = config(**changes)
        limits = JointLimits.of(SAFETY, len(arms))
        self.low, self.high = limits.soft_min, limits.soft_max
        self.tele = Teleoperation(self.config, arms, (True,) * len(arms), self.low, self.high)
        self.arms, self.t = arms, 0.0
        self.measured = np.tile(start, len(arms))
        self.path = path or (lambda t: np.tile(HOME, len(arms)))
        self.openings, self.chunks = np.ones(len(arms)), []
        self.trigger = 1.0

    def sample(self, **override) -> None:
        """One sample of every leader, then a tick."""
        self.t += PERIOD
        joints = self.path(self.t)
        for i, arm in enumerate(self.arms):
            self.tele.add(arm, self.t, override.get(arm, joints[7 * i : 7 * i + 7]), self.trigger)
        self.tick()

    def tick(self):
        chunk = self.tele.tick(self.t)
        if chunk is not None:
            self.chunks.append(chunk)
        return chunk

    def feed(self, reference: Reference) -> None:
        """One sample, and what comes of it to the arms' reference."""
        count = len(self.chunks)
        self.sample()
        for chunk in self.chunks[count:]:
            reference.add(chunk, self.t)

    def run(self, seconds: float) -> "Rig":
        for _ in range(round(seconds / PERIOD)):
            self.sample()
        return self

    def engage(self) -> "Rig":
        self.run(0.4)
        self.tele.engage(self.t, self.measured, self.openings)
        return self


# --- engaging


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 6), st.floats(-1.0, 1.0))
def test_coupling_needs_less_than_the_limit(joint, off):
    """Nearer than 0.3 rad in every joint, or nothing moves and the joint is named."""
    rig = Rig()
    measured = np.clip(HOME, rig.low, rig.high)
    measured[joint] += off
    rig.run(0.4)
    if abs(off) < 0.299:
        rig.tele.engage(rig.t, measured, rig.openings)
        assert rig.tele.state is State.ALIGNING
    elif abs(off) > 0.301:
        with pytest.raises(Refused, match=rf"right joint {joint + 1} is {abs(off):.2f} rad"):
            rig.tele.engage(rig.t, measured, rig.openings)
        assert rig.tele.state is State.OFF and rig.tele.tick(rig.t) is None


def test_no_leader_and_an_old_leader_are_refused():
    rig = Rig(arms=("left", "right"))
    with pytest.raises(Refused, match="no sample from the left leader"):
        rig.tele.check(0.0, rig.measured)
    rig.run(0.4)
    with pytest.raises(Refused, match=r"left leader lost: no sample for 0\.30 s"):
        rig.tele.check(rig.t + 0.3, rig.measured)


def test_alignment_is_slow_and_ends_in_following():
    rig = Rig(start=HOME + np.array([0.25, -0.2, 0.1, 0.28, 0.0, 0.05, -0.29]))
    rig.engage().run(0.2)
    assert rig.tele.state is State.ALIGNING
    rig.run(3.0)
    assert rig.tele.state is State.FOLLOWING
    assert max(np.abs(np.diff(c.joints, axis=0)).max() for c in rig.chunks) <= 0.2 * PERIOD + 1e-9
    np.testing.assert_allclose(rig.chunks[-1].joints[-1], HOME, atol=1e-3)


def test_the_arms_own_reference_stays_below_the_start_velocity_while_aligning():
    rig = Rig(start=HOME + 0.28)
    reference = Reference(SAFETY, JointLimits.of(SAFETY, 1), rig.measured, 0.0)
    rig.engage()
    speeds = []
    while rig.tele.state is State.ALIGNING or len(speeds) < 200:
        rig.feed(reference)
        speeds += [np.abs(reference.sample(rig.t + d).dq).max() for d in (0.0, 0.01, 0.02, 0.03)]
    assert 0.15 < max(speeds) <= SAFETY.start.velocity_rad_s


# --- following


def test_an_arm_runs_little_past_a_leader_that_stops_at_once():
    """From 1.4 rad/s: a person cannot, a GELLO that hits the table can. Its own limit is 10 rad/s2."""

    def path(t):
        s = max(t - 2.0, 0.0)
        way = 3 * s**2 if s < 1.4 / 6 else 0.163 + 1.4 * (s - 1.4 / 6)
        return HOME + np.array([min(way, 0.9), 0, 0, 0, 0, 0, 0])

    rig = Rig(path=path)
    reference = Reference(SAFETY, JointLimits.of(SAFETY, 1), rig.measured, 0.0)
    rig.engage()
    q, dq = [], []
    while rig.t < 6.0:
        rig.feed(reference)
        for ahead in np.arange(0, PERIOD, 0.005):
            sample = reference.sample(rig.t + ahead)
            q.append(sample.q[0])
            dq.append(sample.dq[0])
    assert rig.tele.state is State.FOLLOWING and max(dq) > 1.4
    assert max(q) - path(9.0)[0] < 0.13 and abs(q[-1] - path(9.0)[0]) < 1e-3
    assert np.abs(np.diff(dq)).max() / 0.005 < 8.0


def wave(t, speed=0.6):
    return HOME + 0.4 * np.sin(max(t - 2.0, 0.0) * speed / 0.4) * min(max(t - 2.0, 0.0), 1.0)


def test_chunks_agree_where_they_overlap():
    rig = Rig(path=wave).engage().run(8.0)
    assert rig.tele.state is State.FOLLOWING and len(rig.chunks) > 180
    for before, after in zip(rig.chunks, rig.chunks[1:], strict=False):
        shift = round((after.t0 - before.t0) * before.rate_hz)
        assert shift >= 1 and after.seq == before.seq + 1
        np.testing.assert_array_equal(before.joints[shift:], after.joints[: len(after) - shift])


def test_two_leaders_out_of_phase_share_one_grid():
    rig = Rig(arms=("left", "right"), path=lambda t: np.tile(wave(t), 2))
    rng = np.random.default_rng(0)
    for n in range(150):
        rig.t = PERIOD * (n + 1)
        for arm, phase in (("left", 0.0), ("right", 0.017)):
            t = rig.t - phase + rng.uniform(-0.008, 0)
            rig.tele.add(arm, t, wave(t), 1.0)
        if n == 15:
            rig.tele.engage(rig.t, rig.measured, rig.openings)
        rig.tick()
    assert rig.tele.state is State.FOLLOWING and len(rig.chunks) > 120
    last = rig.chunks[-1].joints
    np.testing.assert_allclose(last[:, :7], last[:, 7:], atol=0.012)  # 15 ms of filter and phase at 0.6 rad/s


@pytest.mark.parametrize(("jitter", "noise"), [(0.0, 0.0), (0.012, 0.001)])
def test_the_arm_follows_a_known_time_behind_and_joins_are_small(jitter, noise):
    """Through the arms' own reference, with uneven stamps, servo noise, 4096 counts and late arrival."""
    rng = np.random.default_rng(1)
    rig = Rig(path=wave)
    reference = Reference(SAFETY, JointLimits.of(SAFETY, 1), HOME, 0.0)
    stamps = PERIOD * np.arange(1, 200) + rng.uniform(-jitter, jitter, 199)
    arrivals = np.maximum.accumulate(stamps + rng.uniform(0.001, 0.02, 199))
    joins, track, i = [], [], 0
    for n in range(round(stamps[-1] / 0.005)):
        now = 0.005 * n
        while i < len(stamps) and arrivals[i] <= now:
            count = 2 * math.pi / 4096
            rig.tele.add(
                "right", stamps[i], np.round((wave(stamps[i]) + rng.normal(0, noise, 7)) / count) * count, 1.0
            )
            i += 1
        if n == 100:
            rig.tele.engage(now, HOME, np.ones(1))
        chunk = rig.tele.tick(now)
        if chunk is not None:
            info = reference.add(chunk, now)
            joins.append(info.size_rad)
            assert not info.aligning and info.smoothed_rad < 0.002
        track.append((now, *reference.sample(now).q, np.abs(reference.sample(now).ddq).max()))
    track = np.array(track)
    moving = track[track[:, 0] > 3.0]
    lag = rig.config.delay_s + 1 / (2 * math.pi * (3 + 10 * 0.4))  # filter at the mean speed
    behind = np.array([wave(t - lag) for t in moving[:, 0]])
    assert np.sqrt(np.mean((moving[:, 1:8] - behind) ** 2)) < 0.006
    assert max(joins) < 0.01 and np.median(joins) < 0.002
    assert moving[:, 8].max() < 9.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31))
def test_whatever_the_leader_does_commands_keep_position_speed_and_the_grippers_range(seed):
    rng = np.random.default_rng(seed)
    rig = Rig()
    walk = {"q": HOME.copy()}

    def path(t):
        walk["q"] = walk["q"] + rng.normal(0, rng.choice([0.001, 0.03, 0.09]), 7)
        return walk["q"]

    rig.engage()
    rig.path = path
    for _ in range(100):
        rig.trigger = float(rng.normal(0.5, 1.0))
        rig.sample()
    for chunk in rig.chunks:
        assert (chunk.joints >= rig.low - 1e-12).all() and (chunk.joints <= rig.high + 1e-12).all()
        assert np.abs(np.diff(chunk.joints, axis=0)).max() * chunk.rate_hz <= rig.config.velocity_rad_s + 1e-9
        assert chunk.t0 <= rig.t and chunk.end > rig.t - 4.0
    assert rig.tele.active or rig.tele.reason


def test_a_leader_beyond_the_joints_range_leads_to_its_end_and_back():
    rig = Rig(path=lambda t: HOME + np.array([0, 0, 0, 0, 0, 0, 1.0]) * max(t - 2.0, 0.0)).engage().run(5.0)
    assert rig.tele.state is State.FOLLOWING
    assert rig.chunks[-1].joints[-1, 6] == pytest.approx(rig.high[6])


# --- losing a leader


def test_a_silent_leader_is_lost_and_no_more_chunks_come():
    rig = Rig(arms=("left", "right"), path=lambda t: np.tile(HOME, 2)).engage().run(1.0)
    rig.t += 0.19
    rig.tele.tick(rig.t)
    assert rig.tele.state is not State.LOST
    rig.t += 0.02
    assert rig.tick() is None
    assert rig.tele.state is State.LOST and "left leader lost: no sample for 0.21 s" in rig.tele.reason
    count = len(rig.chunks)
    rig.run(1.0)  # it comes back: nothing moves until the operator says so, and only when close
    assert len(rig.chunks) == count and rig.tele.state is State.LOST
    with pytest.raises(Refused, match=r"0\.50 rad"):
        rig.tele.engage(rig.t, rig.measured + 0.5, rig.openings)
    rig.tele.engage(rig.t, rig.measured, rig.openings)
    rig.run(1.0)
    assert rig.tele.state is State.FOLLOWING


def test_when_samples_stop_the_reference_comes_to_rest_within_limits():
    rig = Rig(path=wave)
    reference = Reference(SAFETY, JointLimits.of(SAFETY, 1), HOME, 0.0)
    rig.engage()
    for _ in range(80):
        rig.feed(reference)
    assert np.abs(reference.sample(rig.t).dq).max() > 0.3
    t, samples = rig.t, []
    while not samples or not samples[-1].done:
        t += 0.005
        samples.append(reference.sample(t))
    assert t - rig.t < 0.5
    assert max(np.abs(s.ddq).max() for s in samples) <= 0.9 * 10


@pytest.mark.parametrize(
    ("joints", "reason"),
    [
        (HOME + 2 * math.pi, "jumped by 6.28 rad"),
        (np.full(7, np.nan), "not finite"),
        (np.full(7, np.inf), "not finite"),
        (HOME[:6], "6 joint positions"),
    ],
)
def test_a_leader_that_makes_no_sense_is_lost(joints, reason):
    rig = Rig().engage().run(1.0)
    rig.sample(right=joints)
    assert rig.tele.state is State.LOST and reason in rig.tele.reason and "right leader" in rig.tele.reason


@pytest.mark.parametrize(
    ("still_s", "step", "lost"), [(1.0, 0.15, True), (1.0, 0.08, False), (0.0, 0.15, False)]
)
def test_a_leader_that_had_no_power_and_comes_back_elsewhere_is_lost(still_s, step, lost):
    """Its publisher repeats the last sample meanwhile; a hand does not move 0.1 rad in one from rest."""
    rig = Rig(path=lambda t: HOME + 1e-3 * round(10 * t))  # a count or so now and then
    rig.engage().run(0.5)
    stood = rig.path(rig.t)
    rig.path = lambda t: stood
    rig.run(still_s)
    rig.sample(right=stood + step)
    assert (rig.tele.state is State.LOST) == lost
    if lost:
        assert "jumped by 0.15 rad, limit 0.1 after 1.0 s without a change" in rig.tele.reason


def test_a_trigger_that_is_not_finite_is_lost():
    rig = Rig().engage().run(1.0)
    rig.trigger = math.nan
    rig.sample()
    assert rig.tele.state is State.LOST and "not finite" in rig.tele.reason


def test_missing_samples_are_lost_even_when_the_loop_slept_over_them():
    rig = Rig().engage().run(1.0)
    for t in (rig.t + 0.4, rig.t + 0.44, rig.t + 0.48):
        rig.tele.add("right", t, HOME, 1.0)
    assert rig.tele.tick(rig.t + 0.49) is None
    assert rig.tele.state is State.LOST and "missing" in rig.tele.reason


def test_a_leader_faster_than_the_arm_may_is_lost_not_chased():
    rig = Rig(path=lambda t: HOME + np.array([1, 0, 0, 0, 0, 0, 0]) * min(2.4 * max(t - 2.0, 0.0), 2.0))
    rig.engage().run(3.0)
    assert rig.tele.state is State.LOST and "behind its leader" in rig.tele.reason


# --- clutch and hands


def test_pause_lets_go_and_coupling_again_starts_where_the_arm_is():
    rig = Rig().engage().run(1.0)
    rig.tele.pause()
    count = len(rig.chunks)
    rig.path = lambda t: HOME + 0.2
    rig.run(0.4)
    assert rig.tele.state is State.PAUSED and len(rig.chunks) == count
    rig.tele.engage(rig.t, rig.measured, rig.openings)
    rig.sample()
    np.testing.assert_allclose(rig.chunks[-1].joints[0], rig.measured, atol=1e-9)
    rig.run(2.0)
    np.testing.assert_allclose(rig.chunks[-1].joints[-1], HOME + 0.2, atol=2e-3)


CUP = 0.068 / SAFETY.gripper.max_width_m  # opening of a hand that holds a cup; above `open_above`


@pytest.mark.parametrize("leave", ["pause", "stop", "lose"])
@pytest.mark.parametrize("trigger", [0.0, 1.0])
def test_coupling_again_never_opens_a_hand_that_was_told_to_close(leave, trigger):
    rig = Rig().engage().run(1.0)
    rig.trigger = 0.0
    rig.run(1.0)
    told = rig.chunks[-1].grippers[-1]
    getattr(rig.tele, leave)(*["a reason"] * (leave == "lose"))
    rig.trigger = trigger
    rig.run(0.4)
    count = len(rig.chunks)
    rig.tele.engage(rig.t, rig.measured, told)
    rig.run(1.0)
    assert max(chunk.grippers.max() for chunk in rig.chunks[count:]) == 0.0
    assert rig.tele.waiting_triggers == (("right",) if trigger else ())
    for rig.trigger in (0.1, 0.9):  # squeezed, then opened
        rig.run(0.2)
    assert rig.chunks[-1].grippers[-1] == pytest.approx(0.9) and not rig.tele.waiting_triggers


@pytest.mark.parametrize("trigger", [0.0, 1.0])
def test_coupling_after_the_arms_were_restarted_does_not_open_a_hand_round_a_cup(trigger):
    """Nobody told the hand anything yet: its reference is what is measured, any clear wish is carried out."""
    rig, hand = Rig(), Hysteresis(SAFETY.gripper)
    rig.openings, rig.trigger = np.array([CUP]), trigger
    rig.engage().run(1.0)
    wishes = [hand.update(opening) for chunk in rig.chunks for opening in chunk.grippers[:, 0]]
    assert len(wishes) > 50 and set(wishes) <= ({None} if trigger else {None, "close"})
    for rig.trigger in (0.0, 1.0):
        rig.run(0.4)
        wishes += [hand.update(opening) for opening in rig.chunks[-1].grippers[-4:, 0]]
    assert [wish for wish in wishes if wish] == ["close", "open"]


def test_a_hand_that_another_commander_closed_during_a_pause_stays_closed():
    rig = Rig().engage().run(1.0)
    assert rig.chunks[-1].grippers[-1] == 1.0
    rig.tele.pause()
    count = len(rig.chunks)
    rig.tele.engage(rig.t, rig.measured, np.zeros(1))
    rig.run(1.0)
    assert max(chunk.grippers.max() for chunk in rig.chunks[count:]) == 0.0


def test_without_a_trigger_the_hand_stays():
    rig = Rig().engage()
    for _ in range(40):
        rig.t += PERIOD
        rig.tele.add("right", rig.t, HOME, None)
        rig.tick()
    assert (rig.chunks[-1].grippers == 1.0).all()


# --- samples


def test_uneven_samples_become_an_even_grid():
    samples, rng = Samples(config(filter={"min_cutoff_hz": 100.0, "beta": 100.0})), np.random.default_rng(0)
    for t in PERIOD * np.arange(60) + rng.uniform(-0.015, 0.015, 60):
        samples.add(t, HOME + 0.5 * t, 1.0)
    numbers = [k for k, _ in samples.knots]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    late = np.array([row[:7] for _, row in samples.knots])[10:]
    expected = np.array([HOME + 0.5 * k * PERIOD for k in numbers])[10:]
    assert np.abs(late - expected).max() < 0.003


def test_one_euro_lag_is_what_it_says():
    settings_ = Filter()
    one, speed = OneEuro(settings_), 0.5
    for t in np.arange(0, 4, PERIOD):
        value = one(float(t), np.array([speed * t]))
    lag = (speed * t - value[0]) / speed
    assert lag == pytest.approx(1 / (2 * math.pi * (3 + 10 * speed)), rel=0.1)


def test_noise_at_rest_is_filtered():
    one, rng = OneEuro(Filter()), np.random.default_rng(0)
    values = [one(PERIOD * n, rng.normal(0, 0.001, 1))[0] for n in range(500)]
    assert np.std(values[50:]) < 0.0007


def test_stamps_of_another_clock_follow_its_rate_and_survive_its_jumps():
    stamps, rng = Stamps(), np.random.default_rng(0)
    offset, mapped = 1.7e9, []
    for n in range(200):
        t = PERIOD * n
        arrival = t + 0.01 + rng.uniform(0, 0.02)
        if n == 100:
            offset += 3600.0  # the wall clock is set
        mapped.append(stamps.map(offset + t / 0.87, arrival))  # simulated time at 0.87 of real time
    assert np.diff(mapped)[20:95].std() < 0.004
    assert np.abs(np.array(mapped) - PERIOD * np.arange(200))[20:].max() < 0.08
    assert stamps.map(7.99, 8.0) == 7.99  # on the executor clock: as it is
    assert stamps.map(0.0, 9.0) == 9.0


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"delay_s": 0.05}, "delay_s must be at least 0.08"),
        ({"knots": 4, "delay_s": 0.16}, "chunks would begin in the future"),
        ({"lost_after_s": 0.05}, "lost_after_s"),
        ({"leaders": {"left": {}, "right": {}}}, "namespace '' twice: one GELLO would lead both"),
        ({"source": "dynamixel"}, "vipra gello calibrate --arm left"),
        ({"align_velocity_rad_s": 0.5}, "align_velocity_rad_s"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        config(**changes)
