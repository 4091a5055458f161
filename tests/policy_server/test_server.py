"""The server over real sockets: whatever a client does, it is answered and others notice nothing."""

import contextlib
import os
import random
import socket
import threading
import time

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policy_server import images, protocol
from policy_server.client import PolicyClient
from policy_server.router import ServeError, Server, stays_here
from policy_server.scheduler import DeviceFailed, Result
from policy_server.server import main
from tests.policy_server.policies import SIZE, Echo, Gate
from tests.policy_server.raw import Raw, infer, message

pytestmark = pytest.mark.live

ANY_PORT = "tcp://127.0.0.1:*"


@contextlib.contextmanager
def serving(policy, **options):
    with Server(lambda: policy, ANY_PORT, **options) as server:
        assert server.ready.wait(10)
        yield server


@pytest.fixture
def gate():
    policy = Gate(max_batch=4)
    with serving(policy) as server:
        yield policy, server
        policy.opened.release(20)


@pytest.fixture(scope="module")
def echo():
    with serving(Echo()) as server:
        yield server


def test_hello_tells_what_is_served(echo):
    with Raw(echo.endpoint) as raw:
        reply = raw.ask({"v": 1, "type": "hello"})
    assert reply["type"] == "metadata" and reply["protocol"] == protocol.VERSION
    assert len(reply["action_names"]) == len(reply["units"]) == reply["action_dim"] == 8
    assert reply["image_size"] == list(SIZE) and reply["horizon"] == 14 and reply["max_batch"] == 4
    assert len(reply["limits"]["action_low"]) == 8


def test_infer_returns_the_chunk_of_that_request(echo):
    with Raw(echo.endpoint) as raw:
        reply = raw.ask(infer(5, seed=2))
    assert (reply["type"], reply["session"], reply["seq"], reply["t_obs"]) == ("chunk", "raw", 5, 0.5)
    actions = protocol.unpack_array(reply["actions"])
    assert actions.dtype == np.float32 and actions.shape == (14, 8) and (actions == 2).all()
    timing = reply["timing"]
    assert (timing["encode"], timing["prefill"], timing["integrate"]) == (1.0, 2.0, 3.0)
    assert timing["total"] >= timing["queue"] >= 0


def test_jpeg_reaches_the_policy_as_rgb():
    policy = Echo()
    red = np.zeros((*SIZE, 3), np.uint8)
    red[..., 0] = 200
    jpeg = images.encode_jpeg(red, 95)
    with serving(policy) as server, Raw(server.endpoint) as raw:
        assert raw.ask(infer(1, [jpeg, jpeg]))["type"] == "chunk"
    got = policy.batches[0][0].images
    assert got.shape == (2, *SIZE, 3)
    assert np.abs(got.astype(int) - red).max() < 10


def test_a_plain_req_peer_is_answered_too(echo):
    with Raw(echo.endpoint, zmq.REQ) as raw:
        assert raw.ask(message("ping"))["type"] == "pong"
        assert raw.ask(infer(1))["type"] == "chunk"


BAD_MESSAGES = {
    "empty": (b"", "malformed"),
    "no version": (b"\x80", "unsupported_version"),
    "not a map": (msgpack.packb([1, 2]), "malformed"),
    "truncated": (msgpack.packb(infer(1))[:-100], "malformed"),
    "version 2": (infer(1) | {"v": 2}, "unsupported_version"),
    "unknown type": (infer(1) | {"type": "shutdown"}, "unknown_type"),
    "oversized": (bytes(protocol.MAX_MESSAGE_BYTES + 1), "too_large"),
    "wrong size": (infer(1, protocol.pack_array(np.zeros((2, 64, 64, 3), np.uint8))), "bad_image"),
    "wrong dtype": (infer(1, protocol.pack_array(np.zeros((2, *SIZE, 3), np.float32))), "bad_image"),
    "four channels": (infer(1, protocol.pack_array(np.zeros((2, *SIZE, 4), np.uint8))), "bad_image"),
    "empty JPEG": (infer(1, [b"", b""]), "bad_image"),
    "JPEG of another size": (
        infer(1, [images.encode_jpeg(np.zeros((64, 64, 3), np.uint8))] * 2),
        "bad_image",
    ),
    "state of another robot": (infer(1, state=protocol.pack_array(np.zeros(5, np.float32))), "bad_state"),
    "NaN state": (infer(1, state=protocol.pack_array(np.full(8, np.nan, np.float32))), "bad_state"),
    "empty task": (infer(1, task=""), "bad_task"),
    "blank task": (infer(1, task="   "), "bad_task"),
    "10 kB task": (infer(1, task="x" * 10_000), "bad_task"),
    "task not UTF-8": (infer(1, task=b"\xff\xfe".decode("utf-8", "surrogateescape")), "bad_task"),
    "negative deadline": (infer(1, deadline=-5.0), "invalid"),
    "NaN stamp": (infer(1) | {"t_obs": float("nan")}, "invalid"),
    "delay steps": (infer(1, delay_steps=3), "unsupported"),
    "prefix": (infer(1, prefix=protocol.pack_array(np.zeros((2, 8), np.float32))), "unsupported"),
    "prefetch without picture": (message("prefetch", image=b"", task="x"), "bad_image"),
    "cancel without session": (message("cancel") | {"session": None}, "invalid"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_a_bad_message_is_answered_with_its_code(echo, name):
    data, code = BAD_MESSAGES[name]
    with Raw(echo.endpoint) as raw:
        reply = raw.ask(data)
        assert (reply["type"], reply["code"]) == ("error", code)
        assert 0 < len(reply["message"]) < 500
        assert raw.ask(infer(2))["type"] == "chunk"


def test_many_frames_in_one_message_are_refused(echo):
    with Raw(echo.endpoint) as raw:
        raw.socket.send_multipart([b"a", b"b", b"c"])
        assert raw.receive()["code"] == "malformed"


def test_a_message_beyond_all_bounds_costs_only_its_senders_connection(echo):
    with Raw(echo.endpoint) as huge, Raw(echo.endpoint) as other:
        huge.send(bytes(8 * protocol.MAX_MESSAGE_BYTES))
        assert not huge.socket.poll(300)
        assert other.ask(infer(1))["type"] == "chunk"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=4), min_size=1, max_size=10))
def test_random_bytes_get_errors_and_nobody_else_notices(echo, junk):
    with Raw(echo.endpoint) as bad, Raw(echo.endpoint) as good:
        for frames_of_message in junk:
            bad.socket.send_multipart(frames_of_message)
        for _ in junk:
            assert bad.receive()["type"] == "error"
        assert good.ask(infer(1, seed=4))["type"] == "chunk"


def test_corrupted_requests_never_take_the_server_down(echo):
    chaos = random.Random(0)
    whole = msgpack.packb(infer(1, state=None, seed=1))
    with Raw(echo.endpoint) as raw:
        for _message in range(200):
            damaged = bytearray(whole)
            for _ in range(chaos.randint(1, 4)):
                damaged[chaos.randrange(120)] = chaos.randrange(256)
            raw.send(bytes(damaged[: chaos.choice([len(damaged), chaos.randrange(len(damaged))])]))
            raw.receive()
        assert raw.ask(infer(300))["type"] == "chunk"


def test_bytes_that_are_no_zeromq_at_all_disturb_nobody(echo):
    host, port = echo.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as plain, Raw(echo.endpoint) as raw:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(1000))
        assert raw.ask(infer(1))["type"] == "chunk"


def test_state_is_required_where_the_policy_needs_it():
    policy = Echo(needs_state=True)
    state = np.arange(8, dtype=np.float32)
    with serving(policy) as server, Raw(server.endpoint) as raw:
        assert raw.ask(infer(1))["code"] == "bad_state"
        assert raw.ask(infer(2, state=protocol.pack_array(state)))["type"] == "chunk"
    np.testing.assert_array_equal(policy.batches[0][0].state, state)


@pytest.mark.parametrize(
    ("task", "code"), [("explode", "inference_failed"), ("short", "inference_failed"), ("nan", "non_finite")]
)
def test_a_failing_policy_gives_a_code_and_no_traceback(echo, task, code):
    with Raw(echo.endpoint) as raw:
        reply = raw.ask(infer(1, task=task))
        assert reply["code"] == code
        assert "secret" not in str(reply) and "Traceback" not in str(reply) and "actions" not in reply
        assert raw.ask(infer(2))["type"] == "chunk"


def test_actions_too_large_for_the_wire_are_not_finite():
    class Huge(Echo):
        def infer(self, requests):
            return [Result(1e39 * np.ones((14, 8)), r.timing) for r in super().infer(requests)]

    with serving(Huge()) as server, Raw(server.endpoint) as raw:
        assert raw.ask(infer(1))["code"] == "non_finite"
        assert raw.ask(infer(2))["code"] == "non_finite", "and it serves on"


def test_an_answer_that_cannot_be_made_costs_its_sender_alone(monkeypatch):
    with serving(Echo()) as server, Raw(server.endpoint) as raw:
        monkeypatch.setattr(server, "_answered", lambda *_: 1 / 0)
        assert raw.ask(infer(1))["code"] == "internal"
        monkeypatch.undo()
        assert raw.ask(infer(2))["type"] == "chunk"


def test_a_policy_may_say_what_is_wrong_with_a_request(echo):
    with Raw(echo.endpoint) as raw:
        reply = raw.ask(infer(1, task="refuse"))
    assert (reply["code"], reply["message"], reply["seq"]) == ("bad_task", "the prompt is 99 tokens", 1)


def test_one_bad_request_does_not_fail_its_batch(gate):
    policy, server = gate
    with Raw(server.endpoint) as first, Raw(server.endpoint) as bad, Raw(server.endpoint) as good:
        first.send(infer(1))
        assert policy.entered.acquire(timeout=5)
        bad.send(infer(1, task="explode"))
        good.send(infer(1, seed=6))
        waiting(server, 2)
        policy.opened.release(10)
        assert bad.receive()["code"] == "inference_failed"
        assert (protocol.unpack_array(good.receive()["actions"]) == 6).all()
    assert len(policy.batches[1]) == 2, "they did share a batch"


def waiting(server: Server, queued: int) -> None:
    """Wait until that many requests are queued."""
    with Raw(server.endpoint) as raw:
        for _ in range(500):
            if raw.ask(message("stats"))["queued"] == queued:
                return
            time.sleep(0.01)
    raise AssertionError(f"never {queued} in the queue")


def test_newest_request_wins_and_the_older_is_told(gate):
    policy, server = gate
    with Raw(server.endpoint) as raw:
        raw.send(infer(1, seed=1))
        assert policy.entered.acquire(timeout=5)
        for seq in (2, 3, 4):
            raw.send(infer(seq, seed=seq))
        waiting(server, 1)
        policy.opened.release(2)
        replies = raw.replies({1, 2, 3, 4})
    assert [replies[seq].get("code", "chunk") for seq in (1, 2, 3, 4)] == [
        "chunk",
        "superseded",
        "superseded",
        "chunk",
    ]
    assert [batch[0].seed for batch in policy.batches] == [1, 4]


def test_past_its_deadline_a_request_is_answered_at_once_and_never_run(gate):
    policy, server = gate
    with Raw(server.endpoint) as busy, Raw(server.endpoint) as raw:
        busy.send(infer(1, seed=1))
        assert policy.entered.acquire(timeout=5)
        reply = raw.ask(infer(1, seed=2, deadline=50.0))  # while the policy is still at it
        assert reply["code"] == "expired"
        policy.opened.release()
        assert busy.receive()["type"] == "chunk"
    assert [request.seed for batch in policy.batches for request in batch] == [1]


def test_cancelled_requests_are_answered_so_queued_or_running(gate):
    policy, server = gate
    with Raw(server.endpoint) as one, Raw(server.endpoint) as two:
        one.send(infer(1, seed=1))
        assert policy.entered.acquire(timeout=5)
        two.send(infer(1, seed=2))
        waiting(server, 1)
        two.send(message("cancel", 1))
        assert two.receive()["code"] == "cancelled"
        one.send(message("cancel", 1))
        assert one.receive()["code"] == "cancelled"
        policy.opened.release()
        one.send(infer(2, seed=3))
        policy.opened.release()
        assert one.receive()["seq"] == 2, "the cancelled result is not sent"
    assert [request.seed for batch in policy.batches for request in batch] == [1, 3]


def test_the_queue_is_bounded_and_says_so(gate):
    policy, server = gate
    with Raw(server.endpoint) as raw:
        raw.send(infer(0))
        assert policy.entered.acquire(timeout=5)
        for session in range(20):
            raw.send(infer(session + 1) | {"session": session})
        codes = [reply.get("code") for reply in (raw.receive() for _ in range(12))]
        assert codes == ["busy"] * 12


def test_prefetch_reaches_the_policy_before_the_request():
    policy = Echo()
    with serving(policy) as server, Raw(server.endpoint) as raw:
        picture = np.full((*SIZE, 3), 9, np.uint8)
        raw.send(message("prefetch", 1, image=protocol.pack_array(picture), task="fold"))
        for _ in range(500):
            if policy.prefetched:
                break
            time.sleep(0.01)
        assert raw.ask(infer(2))["type"] == "chunk"
    task, image = policy.prefetched[0]
    assert task == "fold" and (image == 9).all()


@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "jpeg"])
def test_a_request_finds_the_frame_that_was_prefetched_and_stats_count_it(compressed):
    noise = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    policy, quality = Echo(supports_prefetch=True), 90 if compressed else None
    with serving(policy) as server, PolicyClient(server.endpoint, jpeg_quality=quality) as client:
        assert client.hello().supports_prefetch
        assert client.prefetch(noise[0], "fold")
        while not policy.prefetched:
            client.poll(0.01)
        assert client.infer(noise, "fold").seq
        assert client.infer(noise[::-1], "fold").seq, "another o_{t-1}"
        counts = client.stats().counts
    (task, image), (first,) = policy.prefetched[0], policy.batches[0]
    assert task == "fold" and image.tobytes() == first.images[0].tobytes()
    assert (counts["prefetch"], counts["prefetch_hit"], counts["chunk"]) == (1, 1, 2)


def test_a_prefetch_runs_only_when_no_request_waits_and_is_dropped_when_its_own_comes(gate):
    policy, server = gate
    picture = protocol.pack_array(np.zeros((*SIZE, 3), np.uint8))
    with Raw(server.endpoint) as busy, Raw(server.endpoint) as one, Raw(server.endpoint) as two:
        busy.send(infer(1))
        assert policy.entered.acquire(timeout=5)
        one.send(message("prefetch", 1, image=picture, task="kept"))
        assert one.ask(message("ping"))["type"] == "pong", "it has arrived"
        two.send(message("prefetch", 1, image=picture, task="overtaken"))
        two.send(infer(2))
        waiting(server, 1)
        policy.opened.release()
        assert policy.entered.acquire(timeout=5), "the request, before the other's prefetch"
        assert policy.prefetched == []
        policy.opened.release()
        assert two.receive()["type"] == "chunk"
        policy.opened.release()
        assert one.ask(infer(2))["type"] == "chunk"
    assert [task for task, _ in policy.prefetched] == ["kept"]


# --- A device that fails


def test_a_lost_device_fails_its_batch_refuses_the_rest_and_stops_the_server(gate):
    policy, server = gate
    with contextlib.ExitStack() as stack:
        first, lost, mate, late = (stack.enter_context(Raw(server.endpoint)) for _ in range(4))
        first.send(infer(1))
        assert policy.entered.acquire(timeout=5)
        lost.send(infer(1, task="lost"))
        mate.send(infer(1))
        waiting(server, 2)
        policy.opened.release()
        assert first.receive()["type"] == "chunk"
        assert policy.entered.acquire(timeout=5)
        late.send(infer(1))
        waiting(server, 1)
        policy.opened.release()
        assert [raw.receive()["code"] for raw in (lost, mate, late)] == [
            "inference_failed",
            "inference_failed",
            "shutting_down",
        ]
        assert server.stopped.wait(10)
    assert isinstance(server.failure, DeviceFailed)
    assert len(policy.batches) == 2, "nothing more was computed, and nobody alone"


def test_a_device_lost_in_a_prefetch_stops_the_server_too():
    policy = Echo()
    with serving(policy) as server, Raw(server.endpoint) as raw:
        picture = protocol.pack_array(np.zeros((*SIZE, 3), np.uint8))
        raw.send(message("prefetch", 1, image=picture, task="lost"))
        assert server.stopped.wait(10)
        assert isinstance(server.failure, DeviceFailed)


def test_ping_and_stats_are_answered_while_an_inference_runs(gate):
    policy, server = gate
    with Raw(server.endpoint) as busy, Raw(server.endpoint) as raw:
        busy.send(infer(1))
        assert policy.entered.acquire(timeout=5)
        assert raw.ask(message("ping", 3)) == {
            "v": 1,
            "type": "pong",
            "session": "raw",
            "seq": 3,
            "state": "ready",
        }
        assert raw.ask(message("hello"))["type"] == "metadata"
        stats = raw.ask(message("stats"))
        assert (stats["running"], stats["queued"]) == (1, 0)
        policy.opened.release()
        assert busy.receive()["type"] == "chunk"
        stats = raw.ask(message("stats"))
    assert stats["counts"]["chunk"] == 1 and stats["batches"] == {"1": 1}
    assert stats["latency_ms"]["p50"] > 0 and stats["uptime_s"] > 0


def test_two_robots_on_a_slow_policy_each_see_one_latency_not_two():
    policy = Echo(delay_s=0.1)
    with serving(policy, gather_ms=5000) as server, Raw(server.endpoint) as one, Raw(server.endpoint) as two:
        for raw in (one, two):
            raw.ask(message("hello"))
        for seq in (1, 2):
            for raw in (one, two):
                raw.send(infer(seq))
            assert one.receive()["type"] == two.receive()["type"] == "chunk"
    assert [len(batch) for batch in policy.batches] == [2, 2]


def test_robots_out_of_step_fall_into_step():
    policy = Echo(delay_s=0.5)
    with serving(policy, gather_ms=5000) as server, Raw(server.endpoint) as one, Raw(server.endpoint) as two:
        one.send(infer(1))
        while not policy.batches:
            time.sleep(0.01)
        two.send(infer(1))  # too late for the first batch
        assert one.receive()["type"] == "chunk"
        one.send(infer(2))
        assert one.receive()["type"] == two.receive()["type"] == "chunk"
    assert [len(batch) for batch in policy.batches] == [1, 2]


def test_a_client_that_never_reads_costs_others_nothing(echo):
    with Raw(echo.endpoint, rcvhwm=1, rcvbuf=4096) as deaf, Raw(echo.endpoint) as raw:
        deaf.socket.setsockopt(zmq.SNDTIMEO, 0)
        sent = 0
        for seq in range(5000):
            try:
                deaf.send(message("stats", seq))
                sent += 1
            except zmq.Again:
                break
        for seq in range(20):
            assert raw.ask(infer(seq))["type"] == "chunk"
    assert sent > 100


def test_clients_that_vanish_leave_the_server_well(gate):
    policy, server = gate
    with Raw(server.endpoint) as raw:
        raw.send(infer(1))
        assert policy.entered.acquire(timeout=5)
    with Raw(server.endpoint) as raw:
        raw.send(infer(1))
        waiting(server, 1)
    policy.opened.release(10)
    with Raw(server.endpoint) as raw:
        assert raw.ask(infer(9))["type"] == "chunk"


def test_until_the_policy_is_warm_requests_are_told_so():
    loading = threading.Event()

    def load():
        assert loading.wait(20)
        return Echo()

    with Server(load, ANY_PORT) as server, Raw(server.endpoint) as raw:
        assert raw.ask(message("hello"))["code"] == "not_ready"
        assert raw.ask(infer(1))["code"] == "not_ready"
        assert raw.ask(message("ping"))["state"] == "warming"
        loading.set()
        assert server.ready.wait(10)
        assert raw.ask(infer(2))["type"] == "chunk"


def test_a_policy_that_cannot_load_stops_the_server_with_the_reason():
    def load():
        raise OSError("no such checkpoint")

    with Server(load, ANY_PORT) as server:
        assert server.stopped.wait(10)
        assert "no such checkpoint" in str(server.failure)


def test_a_fault_of_the_server_itself_stops_it_with_the_reason(monkeypatch):
    with serving(Echo()) as server, Raw(server.endpoint) as raw:
        monkeypatch.setattr(server, "_finish", lambda done: 1 / 0)
        raw.send(infer(1))
        assert server.stopped.wait(10)
        assert isinstance(server.failure, ZeroDivisionError)


def test_stop_answers_what_waits_and_lets_the_running_request_finish(gate):
    policy, server = gate
    with Raw(server.endpoint) as running, Raw(server.endpoint) as queued:
        running.send(infer(1))
        assert policy.entered.acquire(timeout=5)
        queued.send(infer(1))
        waiting(server, 1)
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        assert queued.receive()["code"] == "shutting_down"
        assert queued.ask(infer(2))["code"] == "shutting_down"
        policy.opened.release()
        assert running.receive()["type"] == "chunk"
        stopper.join(10)
    assert server.stopped.is_set() and server.failure is None and not server.stuck


def test_stop_does_not_wait_for_ever():
    policy = Gate()
    with serving(policy, grace_s=0.3) as server, Raw(server.endpoint) as raw:
        raw.send(infer(1))
        assert policy.entered.acquire(timeout=5)
        server.stop()
        assert raw.receive()["code"] == "shutting_down"
        assert server.stuck
        policy.opened.release()


def test_the_address_is_free_again_after_stop():
    with serving(Echo()) as server:
        pass
    with Server(Echo, server.endpoint) as again:
        assert again.ready.wait(10)


def test_an_address_in_use_is_refused_with_a_reason(echo):
    with pytest.raises(ServeError, match="cannot listen"):
        Server(Echo, echo.endpoint)


@pytest.mark.parametrize(
    "bind", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://eth0:0", "tcp://192.168.1.5:0", "tcp://[::]:0"]
)
def test_other_machines_are_let_in_only_with_keys_or_on_demand(bind):
    assert not stays_here(bind)
    with pytest.raises(ServeError, match="--keys"):
        Server(Echo, bind)


@pytest.mark.parametrize(
    "bind", ["tcp://127.0.0.1:1", "tcp://127.72.3.4:*", "tcp://[::1]:5", "tcp://localhost:5", "ipc://x"]
)
def test_addresses_of_this_machine_need_no_keys(bind):
    assert stays_here(bind)


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert all(word in text for word in ("--policy", "--bind", "--keys", "--insecure", "--log-json", "ready"))


def test_an_unknown_policy_is_a_one_line_error(capsys):
    assert main(["--policy", "no_such_policy"]) == 2
    assert "no_such_policy" in capsys.readouterr().err


def test_a_request_within_its_deadline_is_run(echo):
    with Raw(echo.endpoint) as raw:
        assert raw.ask(infer(1, deadline=5000.0))["type"] == "chunk"
