"""Which requests run next, and what a policy is to the server.

Pure bookkeeping: no threads, no sockets, no clock; every call gets the time `now`, s.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from policy_server.protocol import ErrorCode, Metadata


@dataclass(frozen=True)
class Request:
    """What a policy computes a chunk from."""

    images: np.ndarray  # uint8 [2, h, w, 3], RGB, o_{t-1} then o_t, read-only
    task: str
    seed: int = 0
    state: np.ndarray | None = None  # float32 [D], where metadata.needs_state
    prefix: np.ndarray | None = None  # float32 [n, D], only where metadata.supports_prefix
    delay_steps: int = 0


@dataclass(frozen=True)
class Result:
    """A chunk of actions in `metadata.units`."""

    actions: np.ndarray  # float32 [H, D]
    timing: dict[str, float] = field(default_factory=dict)  # encode, prefill, integrate, ms
    prefetched: bool = False  # o_{t-1} was prepared by a `prefetch`


@dataclass(frozen=True)
class Failure:
    """Why a request has no result, as the client is told."""

    code: ErrorCode
    message: str


class DeviceFailed(RuntimeError):
    """The device is lost to this process (a CUDA error): only a new process can compute again."""


class Policy(Protocol):
    """What the server serves; called from one thread only. `policy_server.engine.Engine` is the real one."""

    metadata: Metadata
    max_batch: int

    def warm_up(self) -> float:
        """Compile, allocate and run until latency is steady; returns the latency of one request, ms."""

    def infer(self, requests: list[Request]) -> list[Result]:
        """One result a request, in order; 1 <= len(requests) <= max_batch.

        An exception with a `code` of protocol.ERRORS is told to the client with its message; any other is
        logged and answered `inference_failed`. After an exception each request of a batch is tried alone,
        except after DeviceFailed: that ends the server.
        """

    def prefetch(self, task: str, image: np.ndarray) -> None:
        """Prepare for `task` and o_{t-1} `image`, uint8 [h, w, 3]; may do nothing. Raises as `infer` does."""

    def memory(self) -> dict[str, int]:
        """Bytes on the device by use (weights, cache, graphs), once it is warm; may be empty."""


@dataclass(frozen=True)
class Key:
    """Whose request: ZeroMQ's identity of the connection, and the session named in the message.

    The identity is part of it, so nobody can supersede or cancel another client's requests.
    """

    client: bytes
    session: str | int


@dataclass(frozen=True)
class Entry:
    """A request with what is needed to schedule and answer it. Times in s, of the server's clock."""

    key: Key
    seq: int
    request: Request
    received: float
    due: float = math.inf  # past this it is answered `expired`
    t_obs: float = 0.0  # echoed


@dataclass(frozen=True)
class PrefetchEntry:
    """Frame and task to prepare for, when there is nothing better to do."""

    key: Key
    task: str
    image: np.ndarray  # uint8 [h, w, 3]


Refusal = tuple[Entry, ErrorCode]


class Scheduler:
    """Queue of at most one request a session, and the batch that runs.

    Rules: the newest request of a session replaces the queued one; a request past its deadline is never run;
    a batch is filled round-robin over clients, the one served longest ago first, so a client with many
    sessions or a fast loop cannot starve another.

    A batch starts when the policy is free. If other clients were heard lately and have nothing queued, it
    waits `gather_s` for them: otherwise two robots in closed loop lock into turns and each sees twice the
    latency.
    """

    def __init__(self, max_batch: int, max_queued: int = 64, max_queued_per_client: int = 8):
        self.max_batch, self.max_queued = max_batch, max_queued
        self.max_queued_per_client = max_queued_per_client
        self.gather_s = 0.0
        self.recent_s = 1.0  # a client heard within this is waited for
        self.forget_s = 60.0  # a client silent for this is forgotten
        self.max_clients = 1024
        self.queue: dict[Key, Entry] = {}
        self.running: dict[Key, Entry] = {}
        self.busy = False  # the policy runs something, be it only a prefetch
        self._prefetch: dict[Key, PrefetchEntry] = {}
        self._waiting_since: dict[Key, float] = {}  # kept when a newer request replaces the queued one
        self._served: dict[bytes, float] = {}  # client -> when it last got into a batch
        self._heard: dict[bytes, float] = {}  # client -> when it last asked for work
        self._free_since = 0.0

    @property
    def clients(self) -> int:
        """How many clients asked for work within `forget_s`."""
        return len(self._heard)

    def hear(self, client: bytes, now: float) -> None:
        """Note that `client` is here and may ask for work."""
        self._heard.pop(client, None)
        self._heard[client] = now
        if len(self._heard) > self.max_clients:
            self._forget(next(iter(self._heard)))

    def submit(self, entry: Entry, now: float) -> list[Refusal]:
        """Queue a request; returns those that are thereby answered (possibly this one)."""
        key = entry.key
        self.hear(key.client, now)
        self._prefetch.pop(key, None)
        older = self.queue.get(key)
        if older is not None:
            if older.seq > entry.seq:
                return [(entry, "superseded")]
            self.queue[key] = entry
            return [(older, "superseded")]
        mine = sum(queued.client == key.client for queued in self.queue)
        if len(self.queue) >= self.max_queued or mine >= self.max_queued_per_client:
            return [(entry, "busy")]
        self.queue[key] = entry
        self._waiting_since[key] = now
        return []

    def submit_prefetch(self, entry: PrefetchEntry, now: float) -> bool:
        """Queue a prefetch, replacing the session's earlier one; False if too many wait."""
        self.hear(entry.key.client, now)
        mine = sum(key.client == entry.key.client for key in self._prefetch)
        full = len(self._prefetch) >= self.max_queued or mine >= self.max_queued_per_client
        if full and entry.key not in self._prefetch:
            return False
        self._prefetch[entry.key] = entry
        return True

    def cancel(self, key: Key, seq: int) -> list[Refusal]:
        """Withdraw a request, queued or running (its result is then dropped)."""
        self._prefetch.pop(key, None)
        for pool in (self.queue, self.running):
            if key in pool and pool[key].seq == seq:
                entry = pool.pop(key)
                if pool is self.queue:
                    self._waiting_since.pop(key)
                return [(entry, "cancelled")]
        return []

    def expire(self, now: float) -> list[Refusal]:
        """Requests whose deadline has passed while queued; also forgets clients long silent."""
        late = [entry for entry in self.queue.values() if now >= entry.due]
        for entry in late:
            del self.queue[entry.key], self._waiting_since[entry.key]
        while self._heard and now - next(iter(self._heard.values())) > self.forget_s:
            self._forget(next(iter(self._heard)))
        return [(entry, "expired") for entry in late]

    def take(self, now: float) -> list[Entry] | PrefetchEntry | None:
        """What the policy shall run now, if anything. Call `finish` when it is done."""
        if self.busy:
            return None
        if not self.queue:
            if not self._prefetch:
                return None
            self.busy = True
            return self._prefetch.pop(next(iter(self._prefetch)))
        if now < self._gather_end(now):
            return None
        batch = self._order()[: self.max_batch]
        for entry in batch:
            del self.queue[entry.key], self._waiting_since[entry.key]
            self._served[entry.key.client] = now
            self.running[entry.key] = entry
        self.busy = True
        return batch

    def finish(self, now: float) -> dict[Key, Entry]:
        """The policy is free again; returns the requests that still want their result (not the cancelled)."""
        wanted, self.running = self.running, {}
        self.busy, self._free_since = False, now
        return wanted

    def wake_at(self, now: float) -> float:
        """When `expire` or `take` may next have something to say without a new message."""
        times = [entry.due for entry in self.queue.values()]
        if self.queue and not self.busy:
            times.append(max(now, self._gather_end(now)))
        return min(times, default=math.inf)

    def drain(self) -> list[Entry]:
        """Everything that waits; the queue is empty afterwards."""
        entries = list(self.queue.values())
        self.queue.clear()
        self._waiting_since.clear()
        self._prefetch.clear()
        return entries

    def _gather_end(self, now: float) -> float:
        """Until when a batch waits for more requests; the past where it need not."""
        if not self.gather_s or len(self.queue) >= self.max_batch:
            return -math.inf
        queued = {key.client for key in self.queue}
        absent = any(
            now - heard <= self.recent_s for client, heard in self._heard.items() if client not in queued
        )
        start = max(self._free_since, min(self._waiting_since.values()))
        return start + self.gather_s if absent else -math.inf

    def _order(self) -> list[Entry]:
        rank: dict[bytes, int] = {}
        turns = []
        for key, since in sorted(self._waiting_since.items(), key=lambda item: item[1]):
            turn = rank[key.client] = rank.get(key.client, -1) + 1
            turns.append((turn, self._served.get(key.client, -math.inf), since, key))
        return [self.queue[key] for *_, key in sorted(turns, key=lambda item: item[:3])]

    def _forget(self, client: bytes) -> None:
        self._heard.pop(client, None)
        self._served.pop(client, None)
