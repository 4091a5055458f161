"""The planner asks early enough, and lowers the rate where the policy is too slow for it."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from config.loading import load
from config.robot import PRESETS, PolicyClient
from config.safety import Safety
from vipra_ros.execution.chunk import Chunk
from vipra_ros.execution.planner import RETRY_S, Planner
from vipra_ros.execution.reference import JoinInfo, Reference
from vipra_ros.safety.limits import JointLimits

SAFETY = load(Safety, "fr3")
LIMITS = JointLimits.of(SAFETY, 2)
HOME = np.tile([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398], 2)
H, FRAME, CAMERA_DELAY, TRANSPORT = 14, 1 / 30, 0.005, 0.004


def move(t):
    return HOME + 0.05 * (1 - np.cos(2 * np.pi * np.maximum(t, 0.0) / 4.0))[..., None] * np.ones(14)


@dataclass
class Run:
    planner: Planner
    starved: int = 0  # ticks, after the first chunk
    joins: list[JoinInfo] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)
    executed: list[tuple[int, int]] = field(default_factory=list)  # seq, index of every new action


def timeline(latency, seconds=20.0, jitter=0.0, drop=(), refuse=(), slow=(), **policy) -> Run:
    """Camera, server, policy node and arms on one simulated clock; planner and reference are the real ones.

    latency: s from sending to answer, plus up to `jitter`; `slow`: another one by number of the request.
    Requests whose number is in `drop` fail then, and the chunks of those in `refuse` do not run.
    """
    rng = np.random.default_rng(0)
    run = Run(Planner(PolicyClient(**policy), H, FRAME))
    planner, reference, started = run.planner, Reference(SAFETY, LIMITS, HOME, 0.0), False
    in_flight, on_the_way, seq = None, [], 0
    for millisecond in range(round(1000 * seconds)):
        t = millisecond / 1000
        if millisecond % 2 == 0:
            if in_flight and t >= in_flight[1]:
                if in_flight[0] in drop:
                    planner.failed(in_flight[0], t)
                else:
                    timing = planner.received(in_flight[0], t)
                    path = move(timing.t0 + np.arange(timing.count) / timing.rate_hz)
                    chunk = Chunk(in_flight[0], timing.t0, timing.rate_hz, path, np.ones((timing.count, 2)))
                    run.rates.append(timing.rate_hz)
                    if in_flight[0] in refuse:
                        planner.refused()
                    else:
                        on_the_way.append((t + TRANSPORT, chunk))
                in_flight = None
            if planner.should_request(t):
                seq += 1
                planner.sent(seq, np.floor((t - CAMERA_DELAY) / FRAME) * FRAME, t)
                run.requests.append(t)
                in_flight = seq, t + dict(slow).get(seq, latency) + jitter * rng.random()
        if millisecond % 5 == 0:
            while on_the_way and on_the_way[0][0] <= t:
                run.joins.append(reference.add(on_the_way.pop(0)[1], t))
                started = True
            sample = reference.sample(t)
            run.starved += started and sample.starved
            if sample.index >= 0 and (not run.executed or run.executed[-1] != (sample.seq, sample.index)):
                run.executed.append((sample.seq, sample.index))
    return run


def indices(run: Run, seq: int) -> list[int]:
    return [i for s, i in run.executed if s == seq]


@pytest.mark.parametrize("jitter", [0.0, 0.05])
def test_append_sustains_22_hz_at_510_ms(jitter):
    run = timeline(0.51, jitter=jitter, anchor="append", replan_after=14)
    assert run.starved == 0
    assert set(run.rates) == {22.0} and run.planner.announcement is None
    assert indices(run, 5) == list(range(14)), "open loop: every action of every chunk"


@pytest.mark.parametrize("replan_after", [7, 14])
@pytest.mark.parametrize("jitter", [0.0, 0.05])
def test_observation_lowers_to_the_gap_free_rate_at_510_ms(jitter, replan_after):
    run = timeline(0.51, jitter=jitter, anchor="observation", replan_after=replan_after)
    assert run.starved == 0
    p99 = run.planner.latency().p99 / 1000
    assert 0.51 < p99 < 0.51 + jitter + 0.06
    assert run.rates[-1] == pytest.approx(H / (2 * p99), rel=0.04)
    assert run.rates[-1] <= H / (2 * p99)
    assert run.rates[0] < 14, "the first chunk already runs at a lowered rate"
    assert "highest gap-free rate" in run.planner.announcement and "22 Hz" in run.planner.announcement


@pytest.mark.parametrize("replan_after", [7, 14])
def test_a_fast_policy_runs_at_22_hz_without_gaps(replan_after):
    run = timeline(0.06, jitter=0.02, replan_after=replan_after)
    assert run.starved == 0 and set(run.rates) == {22.0} and run.planner.announcement is None
    assert max(join.size_rad for join in run.joins[1:]) < 1e-3


def test_seven_of_fourteen_hands_over_after_seven_actions():
    run = timeline(0.06, replan_after=7)
    handed_over = np.diff([join.at for join in run.joins[2:]])
    assert 7 / 22 - 0.005 < handed_over.mean() < 7 / 22 + 0.01
    assert np.abs(handed_over - 7 / 22).max() < 0.02
    starts = [indices(run, seq)[0] for seq in range(3, 40)]
    assert max(starts) <= 3, "of a chunk 60 to 125 ms old"


def test_rare_slow_answers_do_not_make_it_ask_more_often():
    run = timeline(0.06, seconds=40.0, slow={k: 0.15 for k in range(10, 200, 12)}, replan_after=7)
    assert run.starved == 0 and set(run.rates) == {22.0}
    assert np.median(np.diff(run.requests)) == pytest.approx(7 / 22, rel=0.03)


def test_up_to_half_a_horizon_of_latency_22_hz_is_gap_free_and_above_it_is_not_claimed():
    limit = H / 44.0  # 318 ms
    below = timeline(limit - 0.07, replan_after=7)
    assert below.starved == 0 and set(below.rates) == {22.0}
    above = timeline(limit + 0.01, replan_after=7)
    assert above.starved == 0 and max(above.rates) < 22.0


def test_append_of_seven_closes_the_loop_twice_as_often():
    run = timeline(0.06, anchor="append", replan_after=7)
    assert run.starved == 0 and set(run.rates) == {22.0}
    assert all(indices(run, seq) == list(range(7)) for seq in range(2, 20))


def test_append_too_slow_even_for_a_whole_chunk_lowers_its_rate():
    run = timeline(0.9, anchor="append", replan_after=14)
    assert run.starved == 0 and 14 < run.rates[-1] < H / 0.9


@pytest.mark.parametrize(("name", "per_second"), [("3.5hz", 3.5), ("7hz", 7.0)])
def test_the_papers_synchronous_rates_are_executed_actions_per_second(name, per_second):
    run = timeline(0.51, seconds=21.0, **PRESETS[name])
    steady = np.diff(run.requests)
    np.testing.assert_allclose(steady, 2.0, atol=0.01)
    n = PRESETS[name]["replan_after"]
    assert indices(run, 4) == list(range(n))
    assert n / steady.mean() == pytest.approx(per_second, rel=0.01)


def test_the_papers_22_hz_runs_22_actions_a_second():
    run = timeline(0.51, **PRESETS["22hz"])
    assert run.starved == 0
    assert len(run.executed) / (20.0 - 0.55) == pytest.approx(22.0, rel=0.02)


def test_synchronous_asks_only_after_the_arms_have_come_to_rest():
    run = timeline(0.1, mode="synchronous", replan_after=7)
    for join, request in zip(run.joins, run.requests[1:], strict=False):
        assert request >= join.at + 7 / 22 + 0.1


def test_a_failed_request_is_asked_again_and_runs_on():
    run = timeline(0.06, drop={5}, replan_after=7)
    assert len(run.requests) > 40
    assert run.requests[5] - run.requests[4] == pytest.approx(0.06 + RETRY_S, abs=0.005)
    assert run.starved == 0, "a 14-action chunk outlasts a quick failure"


@pytest.mark.parametrize(
    ("anchor", "latency_s"), [("observation", 0.51), ("observation", 0.25), ("append", 0.9)]
)
def test_after_a_refused_chunk_the_rate_leaves_time_to_ask_again(anchor, latency_s):
    first = timeline(latency_s, seconds=25.0, jitter=0.05, anchor=anchor, replan_after=14, refuse={6})
    later = timeline(latency_s, seconds=25.0, jitter=0.05, anchor=anchor, replan_after=14, refuse={6, 12, 20})
    assert later.starved == first.starved <= 200 * (latency_s + 0.1), "only the first costs a gap"
    assert later.rates[-1] < later.rates[4] <= 22.0
    assert "time to ask again" in later.planner.announcement


def test_a_hundred_chunks_after_a_refusal_the_rate_is_the_highest_again():
    run = timeline(0.51, seconds=120.0, anchor="observation", replan_after=14, refuse={6})
    assert run.rates[50] < 0.7 * run.rates[4] and run.rates[-1] == pytest.approx(run.rates[4], rel=0.05)


def test_a_fast_policy_keeps_22_hz_through_refusals():
    run = timeline(0.06, jitter=0.02, replan_after=7, refuse={5, 9, 10, 15})
    assert run.starved == 0 and set(run.rates) == {22.0} and run.planner.announcement is None


def test_one_request_at_a_time_and_late_answers_are_ignored():
    planner = Planner(PolicyClient(deadline_s=0.5), H, FRAME)
    planner.sent(1, 0.0, 0.01)
    assert not planner.should_request(5.0)
    with pytest.raises(RuntimeError, match="in flight"):
        planner.sent(2, 0.0, 0.02)
    planner.failed(1, 1.6)
    planner.sent(2, 1.7, 1.75)
    assert planner.received(1, 1.8) is None, "the lost one came after all"
    assert planner.received(2, 1.8) is not None
    assert planner.received(2, 1.9) is None


def test_a_chunk_after_a_rest_starts_on_arrival_and_the_next_at_its_observation():
    planner = Planner(PolicyClient(action_rate_hz=20.0), H, FRAME)
    planner.sent(1, 0.0, 0.02)
    assert planner.received(1, 0.1).t0 == pytest.approx(0.12)
    planner.sent(2, 0.4, 0.42)
    assert planner.received(2, 0.5).t0 == 0.4
    planner.sent(3, 9.0, 9.02)  # long after chunk 2 ran out
    assert planner.received(3, 9.1).t0 == pytest.approx(9.12)


def test_a_refused_chunk_leaves_the_one_before_it_in_charge():
    planner = Planner(PolicyClient(action_rate_hz=22.0, anchor="append", replan_after=14), H, FRAME)
    planner.sent(1, 0.0, 0.02)
    first = planner.received(1, 0.1)
    planner.sent(2, 0.5, 0.52)
    planner.received(2, 0.6)
    planner.refused()
    assert planner.should_request(0.6)
    planner.sent(3, 0.62, 0.63)
    assert planner.received(3, 0.7).t0 == pytest.approx(first.t0 + 14 / 22.0)


def test_the_picture_that_the_next_request_will_look_back_to_is_known_when_it_arrives():
    """At every phase between camera and requests, with arrivals that jitter by 2 ms."""
    rng = np.random.default_rng(0)
    history_s, right, asked = 2 * FRAME, 0, 0
    for phase in np.linspace(0.0, FRAME, 200, endpoint=False):
        planner = Planner(PolicyClient(action_rate_hz=22.0, replan_after=7), H, FRAME)
        planner.sent(1, 0.0, 0.02)
        planner.received(1, 0.1)
        arrivals = [0.1 + phase + k * FRAME + 0.002 * rng.random() for k in range(20)]
        foreseen = [k for k, at in enumerate(arrivals) if planner.precedes_request(history_s, at)]
        due = next(t for t in np.arange(0.1 + 0.01 * rng.random(), 1.0, 0.01) if planner.should_request(t))
        newest = max(k for k, at in enumerate(arrivals) if at <= due)
        asked += 1
        right += newest - 2 in foreseen
        assert len(foreseen) <= 2
    assert right > 0.9 * asked


def test_no_picture_is_foreseen_while_a_request_is_out_or_leaves_at_once():
    planner = Planner(PolicyClient(), H, FRAME)
    assert not planner.precedes_request(2 * FRAME, 0.0)
    planner.sent(1, 0.0, 0.02)
    assert not planner.precedes_request(2 * FRAME, 0.05)
    planner.received(1, 0.1)
    assert any(planner.precedes_request(2 * FRAME, t) for t in np.arange(0.1, 0.6, FRAME))
    planner.refused()
    assert not any(planner.precedes_request(2 * FRAME, t) for t in np.arange(0.1, 0.6, FRAME))


def test_restart_forgets_chunks_but_not_latencies():
    planner = Planner(PolicyClient(), H, FRAME)
    planner.sent(1, 0.0, 0.02)
    planner.received(1, 0.6)
    samples = planner.latency().samples
    planner.sent(2, 1.0, 1.0)
    planner.restart()
    assert planner.should_request(1.0) and planner.latency().samples == samples == 1


def test_latency_counts_from_capture_to_running():
    planner = Planner(PolicyClient(), H, FRAME)
    for i in range(50):
        planner.sent(i, 1.0 * i, i + 0.030)
        planner.received(i, i + 0.130)
    latency = planner.latency()
    assert (
        latency.p50 == pytest.approx(150.0) and latency.p99 == pytest.approx(150.0) and latency.samples == 50
    )


def test_more_actions_than_the_horizon_are_refused():
    with pytest.raises(ValueError, match="horizon"):
        Planner(PolicyClient(replan_after=14), 7, FRAME)


def test_the_rate_falls_at_once_and_recovers_when_latency_does():
    planner = Planner(PolicyClient(anchor="observation"), H, FRAME)
    rates, told = [], set()
    for i in range(250):
        latency = 0.06 if i < 5 or i >= 20 else 0.51
        planner.sent(i, 1.0 * i, i + 0.01)
        rates.append(planner.received(i, i + 0.01 + latency).rate_hz)
        told.add(planner.announcement)
    assert rates[4] == 22.0 and rates[5] < 14.0 and rates[-1] == 22.0
    assert planner.announcement is None and len(told) <= 3
