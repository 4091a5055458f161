"""CURVE: with the right keys chunks are exchanged, with any other neither side learns or gets anything."""

import socket

import pytest

from policy_server import keys
from policy_server.client import PolicyClient, ServerUnavailable
from policy_server.router import ServeError, Server
from tests.policy_server.policies import Echo, embodiment, frames
from tests.policy_server.test_client import ServerProcess


@pytest.fixture
def folder(tmp_path):
    """The server's folder with one robot allowed."""
    for name in (keys.SERVER, "robot"):
        keys.generate(tmp_path / "keys", name)
    return tmp_path / "keys"


@pytest.fixture
def server(folder):
    policy = Echo()
    with Server(lambda: policy, "tcp://127.0.0.1:*", keys=folder) as server:
        assert server.ready.wait(10)
        yield server
    assert policy.batches == [] or policy.batches[0][0].task == "allowed"


def test_with_the_right_keys_two_processes_exchange_chunks(folder):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    right = {"server_public_key": folder / "server.key", "client_secret_key": folder / "robot.key_secret"}
    with ServerProcess(address, 0.0, str(folder)), PolicyClient(address, **right) as client:
        client.hello(10)
        assert (client.infer(frames(), "allowed", seed=2).actions == 2).all()


def test_a_client_that_is_not_in_the_folder_is_refused(folder, server, tmp_path):
    _, stranger = keys.generate(tmp_path / "elsewhere", "robot")
    with PolicyClient(server.endpoint, folder / "server.key", stranger) as client:
        with pytest.raises(ServerUnavailable, match="keys"):
            client.hello(timeout_s=1.0)
        client.submit(frames(), "stack", 0.0)
        assert client.poll()[0].code == "not_sent"


def test_a_client_refuses_a_server_with_another_key(folder, server, tmp_path):
    wrong, _ = keys.generate(tmp_path / "elsewhere", "server")
    with (
        PolicyClient(server.endpoint, wrong, folder / "robot.key_secret") as client,
        pytest.raises(ServerUnavailable, match="keys"),
    ):
        client.hello(timeout_s=1.0)


def test_a_client_without_keys_is_refused(server):
    with PolicyClient(server.endpoint) as client, pytest.raises(ServerUnavailable):
        client.hello(timeout_s=1.0)


def test_a_client_with_keys_refuses_a_server_without(folder):
    right = (folder / "server.key", folder / "robot.key_secret")
    with Server(Echo, "tcp://127.0.0.1:*") as server, PolicyClient(server.endpoint, *right) as client:
        assert server.ready.wait(10)
        with pytest.raises(ServerUnavailable):
            client.hello(timeout_s=1.0)


def test_a_robot_added_to_the_folder_needs_no_restart(folder, server, tmp_path):
    public, secret = keys.generate(tmp_path / "elsewhere", "second")
    (folder / "second.key").write_bytes(public.read_bytes())
    with PolicyClient(server.endpoint, folder / "server.key", secret, embodiment=embodiment()) as client:
        assert client.hello().model == "echo"
        assert client.infer(frames(), "allowed").seq == 2


def test_keys_open_the_server_to_other_machines(folder):
    with Server(Echo, "tcp://127.0.0.1:0", keys=folder) as server:
        assert server.ready.wait(10)
    with pytest.raises(ServeError, match="--insecure"):
        Server(Echo, "tcp://0.0.0.0:0")


def test_a_folder_without_the_servers_key_is_named(tmp_path):
    with pytest.raises(keys.KeyFileError, match=r"server\.key_secret.*vipra keys"):
        Server(Echo, "tcp://127.0.0.1:*", keys=tmp_path)


def test_half_a_pair_of_keys_is_refused(folder):
    with pytest.raises(keys.KeyFileError, match="neither"):
        PolicyClient("tcp://127.0.0.1:1", server_public_key=folder / "server.key")
