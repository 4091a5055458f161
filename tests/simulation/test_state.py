"""Shared state: consistent under load, honest about the dead."""

import subprocess
import sys
import time

import numpy as np
import pytest

from simulation.state import Facts, SharedState, StateError, StateWriter
from tests.simulation.running import wait_for

pytestmark = pytest.mark.live


def _facts(name: str) -> Facts:
    return Facts(name, 1, ("left", "right"), ("127.0.0.1", "127.0.0.2"), "abc", nq=40, nv=36)


WRITER = """
import sys
import numpy as np
from simulation.state import Facts, StateWriter
writer = StateWriter(Facts(sys.argv[1], 1, ("left", "right"), ("a", "b"), "abc", nq=40, nv=36))
print("up", flush=True)
for n in range(10_000_000):
    writer.write(float(n), np.full(40, n), np.full(36, n), np.full((2, 7), n), np.full((2, 7), n))
"""


def test_every_snapshot_is_of_one_instant_while_the_writer_runs_flat_out(slot):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, slot.name], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "up\n"
    state = SharedState.attach(slot.name, 5.0)
    times = []
    try:
        deadline = time.monotonic() + 20.0
        while len(set(times[-2000:])) < 50 and time.monotonic() < deadline:
            s = state.snapshot()
            values = np.concatenate([s.qpos, s.qvel, s.q.ravel(), s.dq.ravel()])
            assert (values == s.time_s).all()
            times.append(s.time_s)
    finally:
        writer.kill()
        writer.wait()
    assert len(set(times)) >= 50, "the writer wrote while we read"
    assert times == sorted(times)
    wait_for(state.stopped)
    assert state.age_s() >= 0.0
    state.close()


def test_facts_and_numbers_arrive(slot):
    writer = StateWriter(_facts(slot.name))
    rng = np.random.default_rng(0)
    qpos, qvel, q, dq = rng.random(40), rng.random(36), rng.random((2, 7)), rng.random((2, 7))
    writer.write(1.25, qpos, qvel, q, dq)
    state = SharedState.attach(slot.name, 1.0)
    s = state.snapshot()
    assert state.facts == _facts(slot.name)
    assert state.time() == s.time_s == 1.25
    for got, sent in zip((s.qpos, s.qvel, s.q, s.dq), (qpos, qvel, q, dq), strict=True):
        np.testing.assert_array_equal(got, sent)
    assert state.age_s() < 5.0
    state.close()
    writer.close()


def test_a_name_belongs_to_one_living_simulator(slot):
    writer = StateWriter(_facts(slot.name))
    with pytest.raises(StateError, match="already running"):
        StateWriter(_facts(slot.name))
    writer.close()
    StateWriter(_facts(slot.name)).close()


def test_attach_waits_for_the_first_write_and_gives_up_with_the_name(slot):
    with pytest.raises(StateError, match=slot.name):
        SharedState.attach(slot.name, 0.02)
    writer = StateWriter(_facts(slot.name))
    with pytest.raises(StateError):
        SharedState.attach(slot.name, 0.02)
    writer.close()


@pytest.mark.parametrize("name", ["", "../x", "UPPER", "a" * 41, "with space"])
def test_names_that_are_not_plain_words_are_refused(name):
    with pytest.raises(StateError, match="simulation name"):
        SharedState.attach(name, 0.0)
