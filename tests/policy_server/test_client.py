"""The client against real servers, in processes that are killed, frozen and restarted."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import zmq

from benchmarks.standin import StandIn
from policy_server import protocol
from policy_server.client import Mismatch, PolicyClient, RequestFailed, ServerUnavailable, check
from policy_server.router import Server
from tests.policy_server.policies import SIZE, Echo, Gate, embodiment, frames

pytestmark = pytest.mark.live


@pytest.fixture
def address() -> str:
    """A port that was free a moment ago, so that a server can come back to it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


class ServerProcess:
    """A policy server in a process of its own; killed at the end."""

    def __init__(self, address: str, delay_s: float = 0.0, *more: str, stderr=subprocess.DEVNULL):
        command = [sys.executable, "-m", "tests.policy_server.policies", address, str(delay_s), *more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def __enter__(self) -> "ServerProcess":
        line = self.process.stdout.readline()
        assert line.startswith("ready model=echo embodiment=franka_single"), line
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


def outcomes(client: PolicyClient, count: int, timeout_s: float = 10.0) -> list:
    found, give_up = [], time.monotonic() + timeout_s
    while len(found) < count and time.monotonic() < give_up:
        found += client.poll(0.1)
    assert len(found) == count, f"{len(found)} outcomes of {count}"
    return found


def until(condition, timeout_s: float = 10.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


@contextlib.contextmanager
def serving(policy, **options):
    with Server(lambda: policy, "tcp://127.0.0.1:*") as server:
        assert server.ready.wait(10)
        with PolicyClient(server.endpoint, **options) as client:
            yield server, client


def test_a_chunk_comes_back_without_waiting_in_submit():
    with serving(Echo(), embodiment=embodiment()) as (_, client):
        metadata = client.hello()
        assert metadata.image_size == SIZE and client.connected
        seq = client.submit(frames(), "stack", t_obs=12.5, seed=3)
        (chunk,) = outcomes(client, 1)
    assert isinstance(chunk, protocol.Chunk)
    assert (chunk.seq, chunk.t_obs) == (seq, 12.5)
    assert chunk.actions.shape == (14, 8) and (chunk.actions == 3).all()


def test_infer_waits_and_raises_what_the_server_says():
    with serving(Echo()) as (_, client):
        client.hello()
        assert (client.infer(frames(), "stack", seed=1).actions == 1).all()
        with pytest.raises(RequestFailed, match="non_finite") as caught:
            client.infer(frames(), "nan")
        assert caught.value.error.code == "non_finite"


def test_jpeg_and_state_and_prefetch_travel():
    policy = Echo(needs_state=True)
    state = np.linspace(-1, 1, 8)
    with serving(policy, jpeg_quality=90) as (_, client):
        client.hello()
        assert client.prefetch(frames()[0], "stack")
        assert client.infer(frames(100), "stack", state=state).actions.shape == (14, 8)
    (request,) = policy.batches[0]
    np.testing.assert_allclose(request.state, state.astype(np.float32))
    assert np.abs(request.images.astype(int) - 100).max() <= 2


def test_ping_and_stats_answer_while_the_policy_is_busy():
    policy = Gate()
    with serving(policy) as (_, client):
        client.hello()
        client.submit(frames(), "stack", 0.0)
        until(lambda: client.stats().running == 1)
        assert client.ping(5.0) < 5.0
        policy.opened.release()
        assert isinstance(outcomes(client, 1)[0], protocol.Chunk)


def test_wrong_arguments_are_the_callers_error():
    with serving(Echo()) as (_, client):
        client.hello()
        with pytest.raises(ValueError, match="task"):
            client.submit(frames(), "", 0.0)
        with pytest.raises(ValueError, match="images"):
            client.submit(frames().astype(float), "stack", 0.0)
        with pytest.raises(ValueError, match="state"):
            client.submit(frames(), "stack", 0.0, state=np.full(8, np.nan))


def test_nothing_waits_when_there_is_no_server(address):
    with PolicyClient(address) as client:
        start = time.monotonic()
        seqs = [client.submit(frames(), "stack", 0.0) for _ in range(100)]
        client.prefetch(frames()[0], "stack")
        client.cancel(seqs[0])
        found = client.poll()
        assert time.monotonic() - start < 10.0
        assert [outcome.seq for outcome in found] == seqs
        assert {outcome.code for outcome in found} == {"not_sent"}
        with pytest.raises(ServerUnavailable, match="is the server running"):
            client.hello(timeout_s=0.2)
        with pytest.raises(ServerUnavailable):
            client.ping(timeout_s=0.2)


def test_a_server_that_comes_later_is_found(address):
    with PolicyClient(address) as client:
        with pytest.raises(ServerUnavailable):
            client.hello(timeout_s=0.1)
        with ServerProcess(address):
            assert client.hello(timeout_s=10).model == "echo"


def test_hello_waits_for_a_server_that_is_still_loading():
    loading = threading.Event()

    def load():
        assert loading.wait(20)
        return Echo()

    with Server(load, "tcp://127.0.0.1:*") as server, PolicyClient(server.endpoint) as client:
        with pytest.raises(ServerUnavailable, match="loading or warming up"):
            client.hello(timeout_s=0.5)
        loading.set()
        assert client.hello(timeout_s=10).model == "echo"


def test_a_server_killed_mid_request_is_noticed_and_its_successor_is_used(address):
    with PolicyClient(address, embodiment=embodiment(), timeout_s=30.0) as client:
        with ServerProcess(address, 20.0) as server:
            client.hello(10)
            seq = client.submit(frames(), "stack", 0.0)
            until(lambda: client.stats().running == 1)
            server.signal(signal.SIGKILL)
            (lost,) = outcomes(client, 1)
            assert (lost.seq, lost.code) == (seq, "disconnected")
            assert not client.connected
        client.submit(frames(), "stack", 0.0)
        assert outcomes(client, 1)[0].code == "not_sent"
        with ServerProcess(address):
            client.hello(10)
            assert (client.infer(frames(), "stack", seed=5).actions == 5).all()


def test_a_frozen_server_ends_requests_with_a_timeout_and_nothing_waits(address):
    with ServerProcess(address) as server, PolicyClient(address, timeout_s=0.5) as client:
        client.hello(10)
        server.signal(signal.SIGSTOP)
        start = time.monotonic()
        seqs = []
        for _ in range(20):
            seqs.append(client.submit(frames(), "stack", 0.0))
            client.poll()  # must not wait either
        assert time.monotonic() - start < 5.0, "waiting each time would take 10 s"
        last = client.submit(frames(), "stack", 0.0)
        found = []
        until(lambda: found.extend(client.poll(0.1)) or (found and found[-1].seq == last))
        assert {outcome.code for outcome in found} <= {"timeout", "not_sent", "disconnected"}
        server.signal(signal.SIGCONT)

        def well() -> bool:
            with contextlib.suppress(RequestFailed):
                return bool((client.infer(frames(), "stack", seed=9).actions == 9).all())
            return False

        until(well)


def test_late_replies_are_dropped():
    with serving(Echo(delay_s=0.4), timeout_s=0.1) as (_, client):
        client.hello()
        slow = client.submit(frames(), "stack", 0.0, deadline_ms=5000)
        (outcome,) = outcomes(client, 1)
        assert (outcome.seq, outcome.code) == (slow, "timeout")
        give_up = time.monotonic() + 10
        while not client.late_replies and time.monotonic() < give_up:
            assert client.poll(0.05) == []
        assert client.late_replies == 1


def test_cancel_ends_a_request_once():
    policy = Echo(delay_s=0.3)
    with serving(policy) as (_, client):
        client.hello()
        seq = client.submit(frames(), "stack", 0.0)
        client.cancel(seq)
        client.cancel(seq)
        (outcome,) = outcomes(client, 1)
        assert (outcome.seq, outcome.code) == (seq, "cancelled")
        assert client.poll(0.6) == []


def test_an_older_request_is_superseded_and_every_request_has_one_outcome():
    with serving(Echo(delay_s=0.2)) as (_, client):
        client.hello()
        seqs = [client.submit(frames(), "stack", 0.0, seed=i) for i in range(10)]
        found = {outcome.seq: outcome for outcome in outcomes(client, 10)}
    assert sorted(found) == seqs
    assert isinstance(found[seqs[-1]], protocol.Chunk)
    assert {o.code for o in found.values() if isinstance(o, protocol.Error)} == {"superseded"}


def test_check_names_every_difference():
    metadata = Echo(robot="franka_bimanual").metadata
    check(metadata, embodiment("franka_bimanual"))
    with pytest.raises(Mismatch) as caught:
        check(metadata, embodiment("franka_single"))
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert all(
        word in text
        for word in ("embodiment is franka_bimanual", "left_fr3_joint1", "action_dim is 16", "units")
    )
    changed = embodiment("franka_bimanual").model_copy(update={"rate_hz": 30.0, "horizon": 7})
    with pytest.raises(
        Mismatch, match=r"horizon is 14, the robot has 7; rate_hz is 15\.0, the robot has 30\.0"
    ):
        check(metadata, changed)


def test_a_policy_for_another_robot_is_refused_and_never_asked():
    policy = Echo(robot="franka_bimanual")
    with serving(policy, embodiment=embodiment("franka_single")) as (_, client):
        with pytest.raises(Mismatch):
            client.hello()
        client.submit(frames(), "stack", 0.0)
        assert outcomes(client, 1)[0].code == "mismatch"
    assert policy.batches == []


def test_a_restarted_server_with_another_policy_is_refused(address):
    def serve(policy) -> Server:
        server = Server(lambda: policy, address).start()
        assert server.ready.wait(10)
        return server

    with PolicyClient(address) as client:
        server = serve(Echo())
        client.hello()
        server.stop()
        other = Echo(robot="franka_bimanual")
        server = serve(other)
        with pytest.raises(Mismatch, match="franka_bimanual"):
            client.hello()
        server.stop()
        assert other.batches == []


def test_a_robot_of_a_known_body_takes_a_policy_that_sees_other_pictures(address):
    with PolicyClient(address, embodiment=embodiment("franka_single")) as client:
        for size in ((32, 48), (64, 64)):
            with Server(lambda size=size: StandIn("franka_single", image_size=size), address) as server:
                assert server.ready.wait(10)
                assert client.hello().image_size == size
                client.submit(np.zeros((2, *size, 3), np.uint8), "stack", 0.0)
                assert outcomes(client, 1)[0].type == "chunk"


@contextlib.contextmanager
def impostor(answer):
    """The address of a server that answers hello properly and `infer` with `answer(request)`."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    stop = threading.Event()

    def run():
        while not stop.is_set():
            if not router.poll(20):
                continue
            client, frame = router.recv_multipart()
            request = protocol.decode(frame, protocol.REQUESTS)
            if isinstance(request, protocol.Infer):
                reply = answer(request)
            else:
                echo = {"session": request.session, "seq": request.seq}
                reply = protocol.encode(Echo().metadata.model_copy(update=echo))
            router.send_multipart([client, reply])

    thread = threading.Thread(target=run)
    thread.start()
    yield f"tcp://127.0.0.1:{port}"
    stop.set()
    thread.join()
    context.destroy(linger=0)


def chunk_of(request, **changes) -> bytes:
    fields = {
        "session": request.session,
        "seq": request.seq,
        "t_obs": request.t_obs,
        "actions": np.zeros((14, 8), np.float32),
    }
    return protocol.encode(
        protocol.Chunk.model_construct(**{"type": "chunk", "timing": None} | fields | changes)
    )


@pytest.mark.parametrize(
    "answer",
    [
        lambda request: chunk_of(request, actions=np.zeros((13, 8), np.float32)),
        lambda request: chunk_of(request, actions=np.zeros((14, 16), np.float32)),
        lambda request: chunk_of(request, actions=np.full((14, 8), np.nan, np.float32)),
        lambda request: chunk_of(request, t_obs=request.t_obs + 1.0),
        lambda request: chunk_of(request, session="somebody else"),
        lambda request: chunk_of(request, seq=request.seq + 1),
        lambda request: b"\xc1 garbage",
    ],
    ids=["short", "other robot", "nan", "other stamp", "other session", "other seq", "garbage"],
)
def test_wrong_replies_never_become_a_chunk(answer):
    with impostor(answer) as where, PolicyClient(where, timeout_s=0.3) as client:
        client.hello()
        seq = client.submit(frames(), "stack", 2.0)
        (outcome,) = outcomes(client, 1)
        assert outcome.seq == seq and isinstance(outcome, protocol.Error)
        assert outcome.code in ("malformed", "invalid", "timeout")


def test_a_bad_address_is_named():
    with pytest.raises(ValueError, match="no-such-scheme"):
        PolicyClient("no-such-scheme://x")


def test_sigterm_ends_the_process_cleanly_and_tells_who_waits(address):
    with ServerProcess(address, 1.5) as server, PolicyClient(address, timeout_s=10) as client:
        client.hello(10)
        running = client.submit(frames(), "stack", 0.0)
        until(lambda: client.stats().running == 1)
        queued = client.submit(frames(), "stack", 0.0)
        until(lambda: client.stats().queued == 1)
        server.signal(signal.SIGTERM)
        found = {outcome.seq: outcome for outcome in outcomes(client, 2)}
        assert found[queued].code == "shutting_down"
        assert isinstance(found[running], protocol.Chunk)
        assert server.process.wait(10) == 0


def test_client_and_protocol_need_no_torch():
    code = "import sys, policy_server.client, policy_server.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
