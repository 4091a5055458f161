"""Which request runs next, with a clock that only the test moves."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_server.scheduler import Entry, Key, PrefetchEntry, Request, Scheduler

REQUEST = Request(np.zeros((2, 1, 1, 3), np.uint8), "task")


def entry(client: int | bytes, seq: int, now: float = 0.0, due: float = math.inf, session: int = 0) -> Entry:
    client = client if isinstance(client, bytes) else bytes([client])
    return Entry(Key(client, session), seq, REQUEST, now, due)


def prefetch(client: int, task: str = "task") -> PrefetchEntry:
    return PrefetchEntry(Key(bytes([client]), 0), task, np.zeros((1, 1, 3), np.uint8))


def seqs(entries) -> list[int]:
    return [e.seq for e in entries]


def test_the_newest_request_of_a_session_wins():
    scheduler = Scheduler(max_batch=4)
    old, new = entry(1, 1), entry(1, 2)
    assert scheduler.submit(old, 0.0) == []
    assert scheduler.submit(new, 0.1) == [(old, "superseded")]
    assert scheduler.take(0.2) == [new]


def test_a_request_that_arrives_after_a_newer_one_is_superseded_itself():
    scheduler = Scheduler(max_batch=4)
    scheduler.submit(entry(1, 5), 0.0)
    late = entry(1, 4)
    assert scheduler.submit(late, 0.1) == [(late, "superseded")]
    assert seqs(scheduler.take(0.2)) == [5]


def test_a_running_request_is_not_superseded():
    scheduler = Scheduler(max_batch=4)
    scheduler.submit(entry(1, 1), 0.0)
    running = scheduler.take(0.0)
    assert scheduler.submit(entry(1, 2), 0.1) == []
    assert list(scheduler.finish(0.2).values()) == running
    assert seqs(scheduler.take(0.2)) == [2]


def test_other_clients_cannot_supersede_or_cancel():
    scheduler = Scheduler(max_batch=4)
    mine, theirs = entry(1, 1, session=7), entry(2, 9, session=7)
    assert scheduler.submit(mine, 0.0) == scheduler.submit(theirs, 0.0) == []
    assert scheduler.cancel(theirs.key, 1) == []
    assert set(seqs(scheduler.take(0.0))) == {1, 9}


def test_past_its_deadline_a_request_is_expired_and_never_run():
    scheduler = Scheduler(max_batch=4)
    late = entry(1, 1, due=0.5)
    scheduler.submit(late, 0.0)
    assert scheduler.wake_at(0.0) <= 0.5
    assert scheduler.expire(0.49) == []
    assert scheduler.expire(0.5) == [(late, "expired")]
    assert scheduler.take(0.5) is None


def test_one_batch_runs_at_a_time_and_takes_all_clients():
    scheduler = Scheduler(max_batch=3)
    for client in range(4):
        scheduler.submit(entry(client, client), 0.0)
    assert seqs(scheduler.take(0.0)) == [0, 1, 2]
    assert scheduler.take(0.0) is None
    scheduler.finish(1.0)
    assert seqs(scheduler.take(1.0)) == [3]


def test_cancel_withdraws_queued_and_running_requests():
    scheduler = Scheduler(max_batch=1)
    first, second = entry(1, 1), entry(2, 1)
    scheduler.submit(first, 0.0)
    assert scheduler.take(0.0) == [first]
    scheduler.submit(second, 0.0)
    assert scheduler.cancel(second.key, 2) == []
    assert scheduler.cancel(second.key, 1) == [(second, "cancelled")]
    assert scheduler.cancel(first.key, 1) == [(first, "cancelled")]
    assert scheduler.finish(1.0) == {}
    assert scheduler.take(1.0) is None


def test_queues_are_bounded_in_all_and_for_each_client():
    scheduler = Scheduler(max_batch=1, max_queued=4, max_queued_per_client=2)
    assert not any(scheduler.submit(entry(1, 1, session=s), 0.0) for s in range(2))
    extra = entry(1, 1, session=2)
    assert scheduler.submit(extra, 0.0) == [(extra, "busy")]
    assert not any(scheduler.submit(entry(c, 1), 0.0) for c in (2, 3))
    extra = entry(4, 1)
    assert scheduler.submit(extra, 0.0) == [(extra, "busy")]
    assert len(scheduler.queue) == 4
    # a full queue still lets a session refresh its own request
    assert [code for _, code in scheduler.submit(entry(3, 2), 0.0)] == ["superseded"]


def test_a_client_with_many_sessions_gets_no_more_than_its_turn():
    scheduler = Scheduler(max_batch=2)
    for session in range(6):
        scheduler.submit(entry(1, session, session=session), 0.0)
    scheduler.submit(entry(2, 100), 0.1)
    assert seqs(scheduler.take(0.2)) == [0, 100]


def test_a_client_that_keeps_asking_anew_keeps_its_place():
    scheduler = Scheduler(max_batch=1)
    scheduler.submit(entry(9, 0), 0.0)
    scheduler.take(0.0)
    scheduler.submit(entry(1, 1), 0.1)
    scheduler.submit(entry(2, 1), 0.2)
    scheduler.submit(entry(1, 2), 0.3)
    scheduler.finish(0.4)
    assert [e.key.client for e in scheduler.take(0.4)] == [b"\x01"]


def test_two_robots_in_closed_loop_share_batches_instead_of_taking_turns():
    scheduler = Scheduler(max_batch=4)
    scheduler.gather_s = 0.01
    scheduler.submit(entry(1, 1), 0.0)
    assert seqs(scheduler.take(0.0)) == [1]  # nobody else was heard: no waiting
    scheduler.submit(entry(2, 1), 0.001)
    scheduler.finish(0.5)
    assert scheduler.take(0.5) is None  # robot 1 was just served and will ask again at once
    assert scheduler.wake_at(0.5) == pytest.approx(0.51)
    scheduler.submit(entry(1, 2), 0.502)
    assert {e.key.client for e in scheduler.take(0.502)} == {b"\x01", b"\x02"}


def test_waiting_for_an_absent_client_is_bounded():
    scheduler = Scheduler(max_batch=4)
    scheduler.gather_s = 0.01
    scheduler.hear(b"\x02", 0.0)
    scheduler.submit(entry(1, 1), 0.0)
    assert scheduler.take(0.009) is None
    assert seqs(scheduler.take(0.0101)) == [1]
    scheduler.finish(5.0)
    scheduler.submit(entry(1, 2), 5.0)
    assert seqs(scheduler.take(5.0)) == [2]  # client 2 has been silent for long


def test_prefetch_runs_only_when_nothing_else_waits():
    scheduler = Scheduler(max_batch=4)
    assert scheduler.submit_prefetch(prefetch(1, "old"), 0.0)
    assert scheduler.submit_prefetch(prefetch(1, "new"), 0.0)
    scheduler.submit(entry(2, 1), 0.0)
    assert seqs(scheduler.take(0.0)) == [1]
    scheduler.finish(1.0)
    assert scheduler.take(1.0).task == "new"
    assert scheduler.take(1.0) is None
    assert scheduler.finish(1.1) == {}
    assert scheduler.take(1.1) is None


def test_a_prefetch_overtaken_by_its_request_is_dropped():
    scheduler = Scheduler(max_batch=4)
    scheduler.submit_prefetch(prefetch(1), 0.0)
    scheduler.submit(entry(1, 1), 0.0)
    scheduler.take(0.0)
    scheduler.finish(0.1)
    assert scheduler.take(0.1) is None


def test_silent_clients_are_forgotten_and_their_number_is_bounded():
    scheduler = Scheduler(max_batch=1)
    scheduler.max_clients = 10
    for client in range(50):
        scheduler.hear(bytes([client]), client * 0.01)
    assert scheduler.clients == 10
    scheduler.expire(1000.0)
    assert scheduler.clients == 0


_steps = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "take", "finish", "cancel", "expire"]),
        st.integers(0, 5),  # client
        st.integers(0, 2),  # session
        st.floats(0.0, 0.3),  # time passes
        st.none() | st.floats(0.01, 0.5),  # deadline
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(steps=_steps, max_batch=st.integers(1, 4), gather_s=st.sampled_from([0.0, 0.02, 0.2]))
def test_every_request_is_answered_exactly_once_and_the_rules_hold(steps, max_batch, gather_s):
    scheduler = Scheduler(max_batch, max_queued=6, max_queued_per_client=2)
    scheduler.gather_s = gather_s
    now, seq = 0.0, 0
    submitted, answered, running = [], [], []
    newest: dict[Key, int] = {}

    def run(batch):
        assert 1 <= len(batch) <= max_batch and not running
        for e in batch:
            assert now < e.due
            assert e.seq == newest[e.key]
        running.extend(batch)

    for action, client, session, passes, deadline in steps:
        now += passes
        answered += [e for e, _ in scheduler.expire(now)]
        if action == "submit":
            seq += 1
            e = entry(client, seq, now, math.inf if deadline is None else now + deadline, session)
            submitted.append(e)
            refused = scheduler.submit(e, now)
            answered += [other for other, _ in refused]
            if (e, "busy") not in refused:
                newest[e.key] = seq
        elif action == "take" and (batch := scheduler.take(now)):
            run(batch)
        elif action == "finish" and running:
            answered += scheduler.finish(now).values()
            running.clear()
        elif action == "cancel":
            key = Key(bytes([client]), session)
            answered += [e for e, _ in scheduler.cancel(key, newest.get(key, 0))]
        assert len(scheduler.queue) <= 6
    if running:
        answered += scheduler.finish(now).values()
        running.clear()
    while scheduler.queue:  # nothing gets stuck: at the promised time something happens
        wake = scheduler.wake_at(now)
        assert now <= wake < math.inf
        now = wake + 1e-9
        answered += [e for e, _ in scheduler.expire(now)]
        if batch := scheduler.take(now):
            run(batch)
            answered += scheduler.finish(now).values()
            running.clear()
    assert sorted(seqs(answered)) == seqs(submitted)


@settings(max_examples=50, deadline=None)
@given(clients=st.integers(1, 12), max_batch=st.integers(1, 4))
def test_no_client_waits_longer_than_one_round(clients, max_batch):
    scheduler = Scheduler(max_batch)
    last_served = dict.fromkeys(range(clients), 0)
    for client in range(clients):
        scheduler.submit(entry(client, 1), client * 1e-6)
    for turn in range(1, 40):
        for e in scheduler.take(float(turn)):
            client = e.key.client[0]
            assert turn - last_served[client] <= math.ceil(clients / max_batch)
            last_served[client] = turn
        for client in (c for c, t in last_served.items() if t == turn):
            scheduler.submit(entry(client, turn + 1), turn + 0.1)  # asks again at once
        scheduler.finish(turn + 0.5)
