"""The robot's side of the policy server: ask, keep going, collect what has arrived.

    client = PolicyClient("tcp://127.0.0.1:5555", embodiment=embodiment)
    metadata = client.hello()
    seq = client.submit(images, "stack the cups", t_obs=clock.now())
    for outcome in client.poll(): ...   # Chunk or Error, each seq exactly once

`submit`, `poll` and `cancel` never wait, whether the server is busy, frozen or gone. A client belongs to one
thread; ZeroMQ's own thread does the sending, receiving and reconnecting behind it.
"""

import collections
import time
import uuid
from pathlib import Path

import numpy as np
import zmq
from zmq.utils.monitor import parse_monitor_message

from config.embodiment import Embodiment
from policy_server import images, keys, protocol
from policy_server.protocol import Chunk, Error, Metadata

MAX_IN_FLIGHT = 16
HELLO_RETRY_S = 0.1  # while the server loads or does not answer
_REFUSED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)


class ServerUnavailable(TimeoutError):
    """No answer in time; the message says how far it got and what to check."""


class RequestFailed(RuntimeError):
    """`infer` was answered with an error: `.error` has `code` and `message`."""

    def __init__(self, error: Error):
        super().__init__(f"{error.code}: {error.message}")
        self.error = error


class Mismatch(ValueError):
    """The server's policy is not for this robot: `.problems` names every difference."""

    def __init__(self, problems: list[str]):
        super().__init__("the server's policy does not fit this robot: " + "; ".join(problems))
        self.problems = problems


def check(metadata: Metadata, embodiment: Embodiment) -> None:
    """Raise Mismatch, naming every difference, unless the served policy commands this embodiment."""
    expected = {
        "protocol": protocol.VERSION,
        "embodiment": embodiment.name,
        "action_names": embodiment.names,
        "units": tuple(dimension.unit for dimension in embodiment.dimensions),
        "action_dim": embodiment.action_dim,
        "horizon": embodiment.horizon,
        "rate_hz": embodiment.rate_hz,
        "history_seconds": embodiment.history_seconds,
    }
    problems = _differences(metadata, expected)
    if problems:
        raise Mismatch(problems)


def _differences(metadata: Metadata, expected: dict) -> list[str]:
    problems = []
    for name, want in expected.items():
        got = getattr(metadata, name)
        if isinstance(want, float):
            same = abs(got - want) <= 1e-3 * abs(want)
        else:
            same = got == want
        if not same:
            problems.append(f"{name} is {_short(got)}, the robot has {_short(want)}")
    return problems


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."


class PolicyClient:
    """Connection to one policy server.

    server_public_key, client_secret_key: certificate files (`vipra keys`); both or neither.
    timeout_s: a request without reply for this long ends as `timeout`; also the server's default deadline.
    jpeg_quality: send JPEG (1 to 100) instead of raw pixels.
    embodiment: after each (re)connection the server's policy must be for it (`check`), else every request
    ends as `mismatch`. Without it a restarted server must serve the same embodiment and image size as before.
    Raises KeyFileError for bad key files, ValueError for a bad address.
    """

    def __init__(
        self,
        address: str,
        server_public_key: str | Path | None = None,
        client_secret_key: str | Path | None = None,
        timeout_s: float = 2.0,
        jpeg_quality: int | None = None,
        embodiment: Embodiment | None = None,
    ):
        if (server_public_key is None) != (client_secret_key is None):
            raise keys.KeyFileError("give the server's public and this robot's secret key, or neither")
        self.address, self.timeout_s, self.jpeg_quality = address, timeout_s, jpeg_quality
        self.metadata: Metadata | None = None  # of the connected server; None while there is none
        self.late_replies = 0  # dropped because their request had ended already
        self._embodiment, self._first = embodiment, None
        self._mismatch: Mismatch | None = None
        self._trouble = "no connection yet: is the server running, and is the address right?"
        self._session, self._seq = "", 0
        self._connected, self._hello_at = False, 0.0
        self._in_flight: dict[int, tuple[float, float]] = {}  # seq -> (gives up at, t_obs), s
        self._answers: dict[int, protocol.Message] = {}  # to ping and stats
        self._asked: set[int] = set()
        self._outcomes: collections.deque[Chunk | Error] = collections.deque(maxlen=1024)

        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # without a connection a send fails instead of queueing
        self._socket.setsockopt(zmq.SNDHWM, 2 * MAX_IN_FLIGHT)
        self._socket.setsockopt(zmq.RCVHWM, 2 * MAX_IN_FLIGHT)
        self._socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 500)  # a frozen server is a lost one within 2 s
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2000)
        self._socket.setsockopt(zmq.IPV6, int("[" in address))
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        for event in _REFUSED:
            events |= event
        self._monitor = self._socket.get_monitor_socket(events)
        try:
            if server_public_key is not None:
                self._socket.curve_serverkey = keys.load_public(server_public_key)
                public, secret = keys.load_secret(client_secret_key)
                self._socket.curve_publickey, self._socket.curve_secretkey = public, secret
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"{address!r} is no address such as tcp://127.0.0.1:5555: {error}") from error
        except keys.KeyFileError:
            self.close()
            raise

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connection; nothing more may be called."""
        self._socket.disable_monitor()
        self._context.destroy(linger=0)

    # --- Never waiting

    @property
    def connected(self) -> bool:
        """Requests can be sent: the server answered the handshake and serves what this robot expects."""
        return self._connected and self.metadata is not None and self._mismatch is None

    def submit(
        self,
        pictures: np.ndarray,
        task: str,
        t_obs: float,
        seed: int = 0,
        state: np.ndarray | None = None,
        deadline_ms: float | None = None,
        prefix: np.ndarray | None = None,
        delay_steps: int = 0,
    ) -> int:
        """Ask for a chunk; returns its seq at once. The outcome comes from `poll`, also if it cannot be sent.

        pictures: uint8 [2, h, w, 3], RGB, o_{t-1} and o_t, of metadata.image_size. t_obs: capture stamp of
        o_t, s. state: [D] where metadata.needs_state. deadline_ms: budget at the server, default timeout_s.
        Raises ValueError (pydantic's) if an argument breaks the protocol.
        """
        self._pump()
        self._seq += 1
        seq = self._seq
        if self.jpeg_quality is not None and self.connected:
            pictures = tuple(images.encode_jpeg(picture, self.jpeg_quality) for picture in pictures)
        message = protocol.Infer(
            session=self._session or "none",
            seq=seq,
            t_obs=float(t_obs),
            images=pictures,
            state=state,
            task=task,
            seed=seed,
            deadline=self.timeout_s * 1e3 if deadline_ms is None else float(deadline_ms),
            prefix=prefix,
            delay_steps=delay_steps,
        )
        if self._mismatch is not None:
            self._end(seq, "mismatch", str(self._mismatch))
        elif not self.connected:
            self._end(seq, "not_sent", self._trouble)
        elif len(self._in_flight) >= MAX_IN_FLIGHT or not self._send(message):
            self._end(seq, "not_sent", "the server does not take requests as fast as they come")
        else:
            self._in_flight[seq] = (time.monotonic() + self.timeout_s, message.t_obs)
        return seq

    def poll(self, wait_s: float = 0.0) -> list[Chunk | Error]:
        """Outcomes since the last call, in the order they came; waits up to `wait_s` for the first."""
        self._wait(lambda: self._outcomes, wait_s)
        outcomes = list(self._outcomes)
        self._outcomes.clear()
        return outcomes

    def cancel(self, seq: int) -> None:
        """Withdraw a request: its outcome is `cancelled`, at once, whatever the server makes of it."""
        if self._in_flight.pop(seq, None) is not None:
            self._send(protocol.Cancel(session=self._session, seq=seq))
            self._end(seq, "cancelled", protocol.ERRORS["cancelled"])

    def prefetch(self, picture: np.ndarray, task: str) -> bool:
        """Let the server prepare for `task` and o_{t-1} `picture`, uint8 [h, w, 3]; False if not sent."""
        self._pump()
        if not self.connected:
            return False
        self._seq += 1
        if self.jpeg_quality is not None:
            picture = images.encode_jpeg(picture, self.jpeg_quality)
        return self._send(protocol.Prefetch(session=self._session, seq=self._seq, image=picture, task=task))

    # --- Waiting

    def hello(self, timeout_s: float = 5.0) -> Metadata:
        """The server's metadata; waits for the server to be there and warm.

        Raises ServerUnavailable, and Mismatch if it serves a policy for another robot.
        """
        self._wait(lambda: self.metadata is not None or self._mismatch is not None, timeout_s)
        if self._mismatch is not None:
            raise self._mismatch
        if self.metadata is None:
            raise ServerUnavailable(f"{self.address}: {self._trouble}")
        return self.metadata

    def infer(self, pictures: np.ndarray, task: str, t_obs: float = 0.0, **options) -> Chunk:
        """Wait for a connection, `submit` and wait for the outcome. Raises RequestFailed."""
        self._wait(lambda: self.connected or self._mismatch is not None, self.timeout_s)
        seq = self.submit(pictures, task, t_obs, **options)
        self._wait(lambda: any(outcome.seq == seq for outcome in self._outcomes), self.timeout_s + 1.0)
        at = next(i for i, outcome in enumerate(self._outcomes) if outcome.seq == seq)
        outcome = self._outcomes[at]
        del self._outcomes[at]
        if isinstance(outcome, Error):
            raise RequestFailed(outcome)
        return outcome

    def ping(self, timeout_s: float = 1.0) -> float:
        """Round trip to the server's I/O thread, s. Raises ServerUnavailable."""
        start = time.perf_counter()
        self._ask(protocol.Ping, timeout_s)
        return time.perf_counter() - start

    def stats(self, timeout_s: float = 1.0) -> protocol.Stats:
        """The server's counters. Raises ServerUnavailable."""
        return self._ask(protocol.StatsRequest, timeout_s)

    # --- Inside

    def _ask(self, kind: type[protocol.Message], timeout_s: float) -> protocol.Message:
        give_up = time.monotonic() + timeout_s
        self._wait(lambda: self._connected, timeout_s)
        self._seq += 1
        seq = self._seq
        self._asked.add(seq)
        if self._connected and self._send(kind(session=self._session, seq=seq)):
            self._wait(lambda: seq in self._answers, give_up - time.monotonic())
        self._asked.discard(seq)
        answer = self._answers.pop(seq, None)
        if answer is None:
            raise ServerUnavailable(f"{self.address}: {self._trouble or 'no answer'}")
        return answer

    def _wait(self, condition, timeout_s: float) -> None:
        """Handle what arrives until `condition()` or the time is over; once in any case."""
        give_up = time.monotonic() + timeout_s
        self._pump()
        while not condition() and (left_s := give_up - time.monotonic()) > 0:
            # wakes for messages; timeouts and repeated hellos need no more than this
            zmq.select([self._socket, self._monitor], [], [], min(left_s, 0.05))
            self._pump()

    def _pump(self) -> None:
        """Take in everything that has arrived and everything that is due. Never waits."""
        # a reply precedes the loss of its connection: note the events, read what is there, then believe them
        events = list(iter(lambda: _take(self._monitor), None))
        while (frames := _take(self._socket)) is not None:
            self._received(frames)
        for event in events:
            self._connection_changed(parse_monitor_message(event)["event"])
        now = time.monotonic()
        if self._connected and self.metadata is None and now >= self._hello_at:
            self._hello_at = now + HELLO_RETRY_S
            self._seq += 1
            self._send(protocol.Hello(session=self._session, seq=self._seq))
        for seq in [seq for seq, (give_up, _) in self._in_flight.items() if now >= give_up]:
            self._end(seq, "timeout", f"no reply within {self.timeout_s:g} s")

    def _connection_changed(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected, self._hello_at = True, 0.0
            self._session = (
                uuid.uuid4().hex
            )  # a fresh one: replies to the old can no longer be taken for ours
            self._trouble = "connected, but the server does not answer the handshake"
            return
        if event in _REFUSED:
            self._trouble = "the server refuses the connection: check the keys on both sides (vipra keys)"
        elif self._connected:
            self._trouble = "the connection was lost; trying again"
        elif "refuses" not in self._trouble:
            self._trouble = "the server closes the connection: do both sides use keys, and the right ones?"
        self._connected, self.metadata, self._mismatch = False, None, None
        for seq in list(self._in_flight):
            self._end(seq, "disconnected", protocol.ERRORS["disconnected"])

    def _received(self, frames: list[zmq.Frame]) -> None:
        try:
            message = protocol.decode(frames[-1].buffer, protocol.REPLIES)
        except protocol.ProtocolError as error:
            self._trouble = f"the server speaks something else: {error}"
            if error.seq in self._in_flight and error.session == self._session:
                self._end(error.seq, error.code, str(error))
            return
        if message.session != self._session:
            self.late_replies += isinstance(message, Chunk)
        elif isinstance(message, Metadata):
            self._introduced(message)
        elif message.seq in self._asked:
            self._answers[message.seq] = message
        elif message.seq in self._in_flight:
            if isinstance(message, Chunk) and not self._sound(message):
                self._end(message.seq, "malformed", "the chunk is not what the metadata promised")
            else:
                del self._in_flight[message.seq]
                self._outcomes.append(message)
        elif isinstance(message, Chunk):
            self.late_replies += 1
        elif isinstance(message, Error) and self.metadata is None:
            self._trouble = f"{message.code}: {message.message}"

    def _introduced(self, metadata: Metadata) -> None:
        """The server said what it serves: is it for this robot?"""
        try:
            if self._embodiment is not None:
                check(metadata, self._embodiment)
            elif self._first is not None:
                names = ("embodiment", "action_names", "units", "horizon", "image_size", "needs_state")
                problems = _differences(metadata, {name: getattr(self._first, name) for name in names})
                if problems:
                    raise Mismatch(problems)
        except Mismatch as mismatch:
            self._mismatch = mismatch
            return
        self.metadata, self._mismatch = metadata, None
        self._first = self._first or metadata

    def _sound(self, chunk: Chunk) -> bool:
        t_obs = self._in_flight[chunk.seq][1]
        shape = (self.metadata.horizon, self.metadata.action_dim) if self.metadata else None
        return chunk.actions.shape == shape and chunk.t_obs == t_obs

    def _send(self, message: protocol.Message) -> bool:
        try:
            self._socket.send(protocol.encode(message), zmq.DONTWAIT, copy=False)
        except zmq.ZMQError:
            return False
        return True

    def _end(self, seq: int, code: protocol.ErrorCode, text: str) -> None:
        self._in_flight.pop(seq, None)
        self._outcomes.append(Error(code=code, message=text, session=self._session or None, seq=seq))


def _take(socket: zmq.Socket) -> list[zmq.Frame] | None:
    """A message that waits, or None."""
    try:
        return socket.recv_multipart(zmq.DONTWAIT, copy=False)
    except zmq.Again:
        return None
