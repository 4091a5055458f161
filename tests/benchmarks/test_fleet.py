"""The fleet benchmark counts what an executor would count, and finds the largest fleet."""

import numpy as np
import pytest

from benchmarks import fleet
from benchmarks.peers import Peer
from config.loading import load
from config.robot import PolicyClient
from config.safety import Safety
from vipra_ros.execution.chunk import Chunk
from vipra_ros.execution.planner import Planner
from vipra_ros.execution.reference import Reference
from vipra_ros.process import free_port
from vipra_ros.safety.limits import JointLimits

SAFETY = load(Safety, "fr3")
HOME = np.array([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398])
DELIVERY_S = 0.004


def chunks_of(latencies: list[float]):
    """What the planner makes of answers that took so long, as (arrival, timing)."""
    planner, found, now = Planner(PolicyClient(), 14, 1 / 30), [], 0.0
    for seq, latency in enumerate(latencies):
        while not planner.should_request(now):
            now += 0.005
        planner.sent(seq, now - 0.02, now)
        now += latency
        found.append((now, planner.received(seq, now)))
    return found


@pytest.mark.parametrize(
    ("slow_s", "starves"), [(0.1, False), (0.6, True), (1.5, True)], ids=["fast", "slow", "very slow"]
)
def test_starved_ticks_are_those_of_the_arms_reference(slow_s, starves):
    chunks = chunks_of([0.1, 0.1, slow_s, 0.1, 0.1, slow_s, 0.1])
    until = chunks[-1][0] + 0.3
    reference, starved, waiting = Reference(SAFETY, JointLimits.of(SAFETY, 1), HOME, 0.0), 0, list(chunks)
    for tick in range(round(until * fleet.EXECUTOR_HZ)):
        now = tick / fleet.EXECUTOR_HZ
        while waiting and waiting[0][0] + DELIVERY_S <= now:
            _, timing = waiting.pop(0)
            rows = np.tile(HOME, (timing.count, 1))
            chunk = Chunk(100 - len(waiting), timing.t0, timing.rate_hz, rows, np.ones((timing.count, 1)))
            reference.add(chunk, now)
        starved += reference.sample(now).starved
    counted = fleet.starved_ticks(chunks, until, DELIVERY_S)
    assert (counted > 0) == starves
    assert counted == pytest.approx(starved, abs=3), "one tick a gap may fall on either side"


@pytest.mark.parametrize("low", [1, 3, 7])
@pytest.mark.parametrize("limit", range(9))
def test_the_largest_fleet_is_found_whatever_it_is(low, limit):
    tried = []
    assert fleet.largest(low, 7, lambda n: tried.append(n) or n <= limit) == min(limit, 7)
    assert len(tried) == len(set(tried)) <= 6


def test_robots_are_spread_evenly_over_processes():
    assert fleet.groups(1) == [(0, 1)]
    assert fleet.groups(17) == [(0, 6), (6, 6), (12, 5)]


def test_a_fleet_is_measured_against_a_server_of_its_own():
    address = f"tcp://127.0.0.1:{free_port()}"
    options = {"model": "still", "device": "cpu", "threads": 1, "fp8": False, "delay_s": 0.02}
    with Peer("benchmarks.fleet", "serve", address=address, **options):
        row = fleet.trial(address, robots=2, seconds=3.0)
    assert row["robots"] == 2 and row["failures"] == 0
    assert 4 <= row["chunks_per_s"] * 3 <= 22, "each asks at most 22 / 7 times a second"
    assert 20 <= row["p50_ms"] <= row["p99_ms"] and row["lateness_p99_ms"] >= 0
    assert row["passed"] == (row["p99_ms"] <= 280 and row["starved_ticks"] == row["lowered"] == 0)
