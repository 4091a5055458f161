"""The executor clock keeps its own time and never hangs."""

import threading
import time

import numpy as np
import pytest

from config.loading import load
from config.robot import Robot
from simulation.state import Facts, StateError, StateWriter
from vipra_ros.clock import ClockStopped, MonotonicClock, SimulatedClock, make_clock, to_stamp

pytestmark = pytest.mark.live


@pytest.fixture
def writer(slot):
    facts = Facts(slot.name, 0, ("left",), ("127.75.9.1",), "-", 1, 1)
    made = StateWriter(facts)
    zero = np.zeros(1), np.zeros(1), np.zeros(7), np.zeros(7)
    made.name, made.set = slot.name, lambda t: made.write(t, *zero)
    made.set(5.0)
    yield made
    made.close()


def test_simulated_clock_reads_simulated_time_and_wakes_when_it_comes(writer):
    clock, woken = SimulatedClock(writer.name, 1.0), threading.Event()
    assert clock.now() == 5.0

    def run():
        for i in range(1, 5000):
            if woken.wait(0.002):
                return
            writer.set(5.0 + 0.001 * i)

    thread = threading.Thread(target=run)
    thread.start()
    clock.sleep_until(5.030)
    assert 5.030 <= clock.now() < 6.0
    woken.set()
    thread.join()
    clock.sleep_until(5.001)  # past: at once
    clock.close()


def test_a_stopped_simulator_ends_the_wait_instead_of_hanging(writer):
    clock = SimulatedClock(writer.name, 1.0)
    with pytest.raises(ClockStopped, match=r"5.000 s"):
        clock.sleep_until(6.0)


def test_no_simulator_is_an_error_not_a_wait(tmp_path):
    with pytest.raises(StateError, match="no simulator named"):
        SimulatedClock("test_clock_nobody", 0.05)


def test_a_wall_clock_jump_moves_neither_clock(writer, monkeypatch):
    clocks = MonotonicClock(), SimulatedClock(writer.name, 1.0)
    before = [c.now() for c in clocks]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600.0)
    monkeypatch.setattr(time, "time_ns", lambda: int((real() - 3600.0) * 1e9))
    after = [c.now() for c in clocks]
    assert after[0] - before[0] < 100.0
    assert after[1] == before[1]


def test_hardware_runs_on_the_monotonic_clock():
    robot = load(Robot, "sim_bimanual")
    hardware = robot.model_copy(update={"clock": "monotonic", "simulation": None})
    clock = make_clock(hardware)
    assert isinstance(clock, MonotonicClock)
    began = time.monotonic()
    clock.sleep_until(clock.now() + 0.01)
    assert time.monotonic() - began >= 0.01


@pytest.mark.parametrize("t, stamp", [(0.0, (0, 0)), (1.25, (1, 250_000_000)), (3.9999999999, (4, 0))])
def test_stamps_are_normalised(t, stamp):
    assert to_stamp(t) == stamp
