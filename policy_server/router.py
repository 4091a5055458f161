"""The server itself: a ROUTER socket on an I/O thread, the policy on an inference thread.

The I/O thread owns the socket and the scheduler, checks every message, answers hello, ping and stats at once
and never waits for the policy. The inference thread owns the policy. Work goes over in a queue, results come
back in another with a wake-up through an inproc socket, so neither side polls and nothing is shared under a
lock.
"""

import collections
import contextlib
import ipaddress
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zmq
from zmq.auth.thread import ThreadAuthenticator

from policy_server import inference, keys, protocol
from policy_server.inference import Done
from policy_server.scheduler import Entry, Key, Policy, PrefetchEntry, Result, Scheduler

log = logging.getLogger("policy_server")

GATHER_FRACTION = 0.02  # of the policy's latency: what a batch may wait for robots expected to ask as well
FAREWELL_S = 0.1  # between the last reply and closing: a closing connection takes unread replies with it
HARD_MESSAGE_BYTES = 4 * protocol.MAX_MESSAGE_BYTES  # above this ZeroMQ drops the connection unread


class ServeError(RuntimeError):
    """The server cannot start; the message says why and what to do."""


class Server:
    """Serves the policy that `load` returns at `bind` until `stop`, or until its device fails.

    The socket is bound here; `start` runs the threads: requests are answered `not_ready` until the policy is
    loaded and warm. Use as a context manager, or call `stop`.

    keys: folder of `policy_server.keys`; turns CURVE on. Without it only addresses on this machine are bound,
    unless `insecure`. gather_ms: None waits GATHER_FRACTION of the latency for batch mates. grace_s: how long
    `stop` waits for the request that is running.
    Raises ServeError (address refused or in use) and KeyFileError.
    """

    def __init__(
        self,
        load: Callable[[], Policy],
        bind: str = "tcp://127.0.0.1:5555",
        keys: str | Path | None = None,
        insecure: bool = False,
        gather_ms: float | None = None,
        grace_s: float = 2.0,
    ):
        self.metadata: protocol.Metadata | None = None
        self.memory: dict[str, int] = {}  # bytes of the policy by use, once ready
        self.failure: BaseException | None = None  # why it stopped by itself
        self.ready, self.stopped = threading.Event(), threading.Event()
        self._load, self._gather_ms, self._grace_s = load, gather_ms, grace_s
        self._state = "warming"
        self._stop_requested, self._stop_lock = threading.Event(), threading.Lock()
        self._jobs: queue.SimpleQueue[list[Entry] | PrefetchEntry | None] = queue.SimpleQueue()
        self._done: collections.deque[Done] = collections.deque()
        self._scheduler = Scheduler(max_batch=1)
        self._envelopes: dict[bytes, list[bytes]] = {}
        self.record = _Record()
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        try:
            self._wake = self._context.socket(zmq.PULL)
            self._wake.bind("inproc://wake")
            self._stopper = self._waker()
            self._socket = self._listen(bind, keys, insecure)
        except BaseException:
            self._close()
            raise
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        self._io_thread = threading.Thread(target=self._io, name="io", daemon=True)
        self._inference_thread = threading.Thread(target=self._inference, name="inference", daemon=True)

    def start(self) -> "Server":
        self._io_thread.start()
        self._inference_thread.start()
        return self

    def stop(self) -> None:
        """Answer what waits with `shutting_down`, let the running request finish, close. Idempotent."""
        if not self._io_thread.ident:
            self._close()
            return
        self._stop_requested.set()
        with self._stop_lock:
            _nudge(self._stopper)
        self._io_thread.join()
        self._inference_thread.join(timeout=self._grace_s)

    @property
    def stuck(self) -> bool:
        """After `stop`: the policy did not return within the grace time."""
        return self._inference_thread.is_alive()

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def _listen(self, bind: str, keys_folder: str | Path | None, insecure: bool) -> zmq.Socket:
        if keys_folder is None and not insecure and not stays_here(bind):
            raise ServeError(
                f"{bind} can be reached from other machines: give --keys FOLDER (made by: vipra keys), "
                "bind tcp://127.0.0.1:PORT, or accept anybody with --insecure"
            )
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.MAXMSGSIZE, HARD_MESSAGE_BYTES)
        socket.setsockopt(zmq.RCVHWM, 8)  # a client: the rest waits in its own send queue
        socket.setsockopt(zmq.SNDHWM, 64)  # a client: one that does not read loses replies, alone
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an undeliverable reply is an error that we count
        socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6000)
        socket.setsockopt(zmq.IPV6, int("[" in bind))
        if keys_folder is not None:
            folder = Path(keys_folder).expanduser()
            socket.curve_publickey, socket.curve_secretkey = keys.load_secret(
                folder / f"{keys.SERVER}.key_secret"
            )
            socket.curve_server = True
            allowed = keys.AllowedClients(folder)
            log.info("CURVE is on", extra={"fields": {"clients": sorted(allowed.names().values())}})
            self._authenticator = ThreadAuthenticator(
                self._context, log=logging.getLogger("policy_server.auth")
            )
            self._authenticator.start()
            self._authenticator.configure_curve_callback(credentials_provider=allowed)
        try:
            socket.bind(bind)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise ServeError(
                f"cannot listen at {bind}: {error.strerror} (is another server running?)"
            ) from error
        return socket

    def _waker(self) -> zmq.Socket:
        """A socket whose messages wake the I/O thread; for one thread."""
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect("inproc://wake")
        return socket

    def _close(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.destroy()
        self.stopped.set()

    # --- Inference thread

    def _inference(self) -> None:
        wake = self._waker()
        try:
            policy, metadata, self.memory = inference.load(self._load)
            self._done.append(Done(metadata=metadata))
            _nudge(wake)
            while (job := self._jobs.get()) is not None:
                done = inference.run(policy, metadata, job)
                if done.lost is not None:
                    self._fail(done.lost)  # first: so that no further job is handed over
                self._done.append(done)
                _nudge(wake)
        except BaseException as error:
            self._fail(error)
        finally:
            _nudge(wake)
            wake.close()

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self._stop_requested.set()

    # --- I/O thread

    def _io(self) -> None:
        try:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._wake, zmq.POLLIN)
            stop_at = math.inf
            while True:
                now = time.monotonic()
                wait_s = min(self._scheduler.wake_at(now), stop_at, now + 1.0) - now
                ready = dict(poller.poll(max(0, math.ceil(wait_s * 1000))))
                if self._wake in ready:
                    while _receive(self._wake):
                        pass
                    while self._done:
                        self._finish(self._done.popleft())
                if self._stop_requested.is_set() and self._state != "stopping":
                    self._state, stop_at = "stopping", time.monotonic() + self._grace_s
                    for entry in self._scheduler.drain():
                        self._refuse(entry, "shutting_down")
                if self._socket in ready:
                    # a bounded number, so that a flood cannot keep the results of others waiting
                    for _ in range(32):
                        frames = _receive(self._socket)
                        if not frames:
                            break
                        self._handle(frames)
                now = time.monotonic()
                for entry, code in self._scheduler.expire(now):
                    self._refuse(entry, code)
                if self._state == "stopping":
                    if now >= stop_at:
                        break
                    if self.failure or not self._scheduler.busy:
                        stop_at = min(stop_at, now + FAREWELL_S)
                elif (job := self._scheduler.take(now)) is not None:
                    self._jobs.put(job)
            for entry in self._scheduler.finish(time.monotonic()).values():
                self._refuse(entry, "shutting_down")
        except Exception as error:
            log.exception("the I/O thread failed")
            self.failure = self.failure or error
        finally:
            self._state = "stopping"
            self._jobs.put(None)
            self._socket.close()  # waits up to LINGER when the context is destroyed
            self._wake.close(linger=0)
            with self._stop_lock:
                self._stopper.close()
            if self._inference_thread.is_alive():
                self._inference_thread.join(timeout=max(0.1, self._grace_s / 4))
            if self._authenticator is not None:
                self._authenticator.stop()
            if not self._inference_thread.is_alive():
                self._context.term()
            self.stopped.set()

    def _finish(self, done: Done) -> None:
        if done.metadata is not None:
            self.metadata = done.metadata
            self._scheduler.max_batch = done.metadata.max_batch
            self._pace(done.metadata.warm_latency_ms / 1e3)
            if self._state == "warming":
                self._state = "ready"
            self.ready.set()
            return
        now = time.monotonic()
        wanted = self._scheduler.finish(now)
        if not done.outcomes:
            return
        self.record.batches[str(len(done.outcomes))] += 1
        self._pace(done.finished - done.started)
        for entry, outcome in done.outcomes:
            if wanted.get(entry.key) is not entry:
                continue  # cancelled meanwhile
            try:
                self._answered(entry, outcome, done, now)
            except Exception:  # a defect: whatever it is, the others are served on
                log.exception("an answer could not be sent")
                self._refuse(entry, "internal")

    def _answered(self, entry: Entry, outcome: Result | inference.Failure, done: Done, now: float) -> None:
        if isinstance(outcome, Result):
            queued_ms, total_ms = (done.started - entry.received) * 1e3, (now - entry.received) * 1e3
            self.record.counts["prefetch_hit"] += outcome.prefetched
            self.record.latency_ms.append(total_ms)
            self.record.queue_ms.append(queued_ms)
            self._reply(
                entry.key.client,
                protocol.Chunk(
                    session=entry.key.session,
                    seq=entry.seq,
                    t_obs=entry.t_obs,
                    actions=outcome.actions,
                    timing=protocol.Timing(queue=max(0.0, queued_ms), total=total_ms, **outcome.timing),
                ),
            )
        else:
            self._refuse(entry, outcome.code, outcome.message)

    def _pace(self, latency_s: float) -> None:
        """Follow the policy's latency with the gather window."""
        old = self.record.latency_s
        self.record.latency_s = latency_s if old is None else 0.8 * old + 0.2 * latency_s
        gather_s = (
            GATHER_FRACTION * self.record.latency_s if self._gather_ms is None else self._gather_ms / 1e3
        )
        self._scheduler.gather_s = gather_s
        self._scheduler.recent_s = 1.0 + 2.0 * self.record.latency_s

    def _handle(self, frames: list[zmq.Frame]) -> None:
        """Answer or queue one message. Whatever is in it, only its sender hears of it."""
        client = frames[0].bytes
        # a REQ peer puts an empty frame before the message and expects it back
        delimiter = len(frames) == 3 and len(frames[1]) == 0
        self._envelopes.pop(client, None)
        if delimiter:
            self._envelopes[client] = [b""]
            while len(self._envelopes) > 1024:
                del self._envelopes[next(iter(self._envelopes))]
        session = seq = None
        try:
            if len(frames) != 2 and not delimiter:
                raise protocol.ProtocolError("malformed", f"{len(frames) - 1} frames, a message is one")
            message = protocol.decode(frames[-1].buffer, protocol.REQUESTS)
            session, seq = message.session, message.seq
            self.record.counts[message.type] += 1
            self._answer(client, message)
        except protocol.ProtocolError as error:
            session = error.session if error.session is not None else session
            seq = error.seq if error.seq is not None else seq
            self._reply(client, protocol.Error(code=error.code, message=str(error), session=session, seq=seq))
            if error.code not in ("not_ready", "busy", "shutting_down"):  # the client did nothing wrong
                self.record.complain(client, error.code, str(error))
        except Exception:
            log.exception("a message could not be handled")
            text = protocol.ERRORS["internal"]
            self._reply(client, protocol.Error(code="internal", message=text, session=session, seq=seq))

    def _answer(self, client: bytes, message: protocol.Message) -> None:
        now = time.monotonic()
        echo = {"session": message.session, "seq": message.seq}
        if isinstance(message, protocol.Ping):
            self._reply(client, protocol.Pong(state=self._state, **echo))
            return
        if isinstance(message, protocol.StatsRequest):
            self._reply(client, self._stats(echo))
            return
        if self._state == "stopping":
            raise protocol.ProtocolError("shutting_down", protocol.ERRORS["shutting_down"])
        if self.metadata is None:
            raise protocol.ProtocolError("not_ready", protocol.ERRORS["not_ready"])
        if isinstance(message, protocol.Hello):
            self._scheduler.hear(client, now)
            self._reply(client, self.metadata.model_copy(update=echo))
            return
        key = Key(client, message.session)
        if isinstance(message, protocol.Infer):
            due = math.inf if message.deadline is None else now + message.deadline / 1e3
            entry = Entry(
                key, message.seq, inference.checked(message, self.metadata), now, due, message.t_obs
            )
            refused = self._scheduler.submit(entry, now)
        elif isinstance(message, protocol.Prefetch):
            picture = inference.checked_image(message.image, self.metadata.image_size)
            task = inference.checked_task(message.task)
            if not self._scheduler.submit_prefetch(PrefetchEntry(key, task, picture), now):
                raise protocol.ProtocolError("busy", protocol.ERRORS["busy"])
            refused = []
        else:
            refused = self._scheduler.cancel(key, message.seq)
        for entry, code in refused:
            self._refuse(entry, code)

    def _refuse(self, entry: Entry, code: protocol.ErrorCode, text: str | None = None) -> None:
        client, session = entry.key.client, entry.key.session
        text = protocol.ERRORS[code] if text is None else text
        self._reply(client, protocol.Error(code=code, message=text, session=session, seq=entry.seq))

    def _reply(self, client: bytes, message: protocol.Message) -> None:
        name = message.code if isinstance(message, protocol.Error) else message.type
        self.record.counts[name if name != "stats" else "stats_reply"] += 1
        frames = [client, *self._envelopes.get(client, ()), protocol.encode(message)]
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT)
        except zmq.ZMQError:  # EHOSTUNREACH: it is gone; EAGAIN: it does not read
            self.record.counts["undeliverable"] += 1

    def _stats(self, echo: dict) -> protocol.Stats:
        record = self.record
        return protocol.Stats(
            state=self._state,
            uptime_s=time.monotonic() - record.started,
            sessions=self._scheduler.clients,
            queued=len(self._scheduler.queue),
            running=len(self._scheduler.running),
            counts=dict(record.counts),
            batches=dict(record.batches),
            latency_ms=_percentiles(record.latency_ms),
            queue_ms=_percentiles(record.queue_ms),
            **echo,
        )


class _Record:
    """Counters of the I/O thread."""

    def __init__(self):
        self.started = time.monotonic()
        self.counts: collections.Counter[str] = collections.Counter()
        self.batches: collections.Counter[str] = collections.Counter()
        self.latency_ms: collections.deque[float] = collections.deque(maxlen=1000)
        self.queue_ms: collections.deque[float] = collections.deque(maxlen=1000)
        self.latency_s: float | None = None
        self._complained, self._held_back = -math.inf, 0

    def complain(self, client: bytes, code: str, text: str) -> None:
        """Log a bad message, at most one a second: a broken client must not fill the disk."""
        now = time.monotonic()
        if now - self._complained < 1.0:
            self._held_back += 1
            return
        fields = {"code": code, "client": client.hex(), "more": self._held_back}
        log.warning("bad request: %s", text, extra={"fields": fields})
        self._complained, self._held_back = now, 0


def _nudge(socket: zmq.Socket) -> None:
    """Wake the I/O thread; if it has gone already there is nothing to do."""
    with contextlib.suppress(zmq.ZMQError):
        socket.send(b"", zmq.DONTWAIT)


def _receive(socket: zmq.Socket) -> list[zmq.Frame]:
    """A message that waits, or nothing."""
    try:
        return socket.recv_multipart(zmq.DONTWAIT, copy=False)
    except zmq.Again:
        return []


def _percentiles(values: collections.deque[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99)}


def stays_here(bind: str) -> bool:
    """Whether an address can only be reached from this machine (loopback, ipc)."""
    transport, _, rest = bind.partition("://")
    if transport in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # `*` or the name of an interface
