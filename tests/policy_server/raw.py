"""A peer that speaks plain ZeroMQ and msgpack, so that tests can say anything to a server."""

import time

import msgpack
import zmq

from policy_server import protocol
from tests.policy_server.policies import frames


def message(kind: str, seq: int = 0, **fields) -> dict:
    return {"v": 1, "type": kind, "session": "raw", "seq": seq, **fields}


def infer(seq: int, pictures=None, task: str = "stack", **fields) -> dict:
    pictures = protocol.pack_array(frames()) if pictures is None else pictures
    return message("infer", seq, t_obs=0.5, images=pictures, task=task, **fields)


class Raw:
    """A DEALER (or REQ) socket. Messages are plain data; bytes are sent as they are."""

    def __init__(self, endpoint: str, kind: int = zmq.DEALER, **options):
        self.context = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        for name, value in options.items():
            setattr(self.socket, name, value)
        self.socket.connect(endpoint)

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_) -> None:
        self.context.destroy(linger=0)

    def send(self, data: dict | bytes) -> None:
        self.socket.send(
            data if isinstance(data, bytes) else msgpack.packb(data, unicode_errors="surrogateescape")
        )

    def receive(self, timeout_s: float = 5.0) -> dict:
        assert self.socket.poll(timeout_s * 1000), "no reply"
        return msgpack.unpackb(self.socket.recv_multipart()[-1])

    def ask(self, data: dict | bytes, timeout_s: float = 5.0) -> dict:
        self.send(data)
        return self.receive(timeout_s)

    def replies(self, seqs: set[int], timeout_s: float = 10.0) -> dict[int, dict]:
        """The replies to these requests, by seq."""
        found, give_up = {}, time.monotonic() + timeout_s
        while seqs - set(found) and time.monotonic() < give_up:
            if self.socket.poll(100):
                reply = msgpack.unpackb(self.socket.recv())
                assert reply.get("seq") not in found, f"two replies to {reply['seq']}"
                found[reply.get("seq")] = reply
        assert not seqs - set(found), f"no reply to {seqs - set(found)}"
        return found
