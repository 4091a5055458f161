"""State of a running simulator in shared memory: one writer each simulated millisecond, many readers.

A file in /dev/shm holds a header, static facts as JSON, and one block of numbers under a sequence lock: the
writer makes the sequence odd, writes, makes it even; a reader copies and tries again if the sequence moved.
The other way goes one number: the time that simulated time may reach before the camera has its picture.
The writer holds an exclusive `flock` on the file, so a file left by a killed simulator is told from a living
one at once. Needs numpy only. The order of plain stores is relied upon (x86-64).
"""

import contextlib
import fcntl
import json
import math
import mmap
import os
import re
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path("/dev/shm")
_MAGIC = b"VIPRASIM"
_LAYOUT = 3
_HEADER = 4096  # bytes: magic, layout, JSON length, JSON
_SEQUENCE, _WALL_NS, _STOPPED, _TRIAL, _LIMIT_US = 0, 1, 2, 3, 4  # int64 slots after the header
_SLOTS = 8


class StateError(RuntimeError):
    """The shared state cannot be created or read; the message names the simulator."""


def path_of(name: str) -> Path:
    """File that carries the state of simulator `name`. Raises StateError unless it is a plain word."""
    if not re.fullmatch(r"[a-z0-9_-]{1,40}", name):
        raise StateError(f"simulation name {name!r}: use 1 to 40 of a-z 0-9 _ -")
    return FOLDER / f"vipra-{name}"


@dataclass(frozen=True)
class Facts:
    """What does not change while a simulator runs."""

    name: str
    pid: int
    arms: tuple[str, ...]  # A arms, in the order of every per-arm array
    hostnames: tuple[str, ...]
    signature: str  # of the joint layout of qpos and qvel; equal signatures mean interchangeable states
    nq: int
    nv: int
    task: str = ""  # file in config/tasks, or its path, whose trials are set up; "": none


@dataclass(frozen=True)
class Snapshot:
    """One consistent simulated instant."""

    time_s: float  # simulated, never goes back
    wall_monotonic_ns: int  # CLOCK_MONOTONIC when written
    qpos: np.ndarray  # [nq] MuJoCo generalised positions
    qvel: np.ndarray  # [nv]
    q: np.ndarray  # [A, 7] rad
    dq: np.ndarray  # [A, 7] rad/s


class _Block:
    """The memory map and its views."""

    def __init__(self, file: int, facts: Facts):
        self.file, self.facts = file, facts
        arms = len(facts.arms)
        counts = [1, facts.nq, facts.nv, 7 * arms, 7 * arms]
        self.map = mmap.mmap(file, _HEADER + 8 * (_SLOTS + sum(counts)))
        self.slots = np.frombuffer(self.map, np.int64, _SLOTS, _HEADER)
        self.numbers = np.frombuffer(self.map, np.float64, sum(counts), _HEADER + 8 * _SLOTS)
        self.ends = np.cumsum(counts)

    def close(self) -> None:
        self.slots = self.numbers = None
        with contextlib.suppress(BufferError):  # a caller still holds a view: the map goes with it
            self.map.close()
        os.close(self.file)


def _read_header(file: int) -> Facts | None:
    raw = os.pread(file, _HEADER, 0)
    if len(raw) < _HEADER or raw[:8] != _MAGIC:
        return None
    layout, length = struct.unpack_from("<II", raw, 8)
    if layout != _LAYOUT:
        raise StateError(
            f"shared state has layout {layout}, this code reads {_LAYOUT}: restart the simulator"
        )
    data = json.loads(raw[16 : 16 + length])
    return Facts(**{**data, "arms": tuple(data["arms"]), "hostnames": tuple(data["hostnames"])})


class StateWriter:
    """The simulator's end. Owns the name: a second writer of a living simulator's name raises StateError."""

    def __init__(self, facts: Facts):
        self._path = path_of(facts.name)
        self._claim = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        taken = StateError(f"a simulator named {facts.name!r} is already running: choose another --name")
        if not _lock(self._claim):
            os.close(self._claim)
            raise taken
        # A file left by a killed simulator may still be mapped by readers: leave them theirs and make a new
        # one, keeping the lock on the old one so that nobody who opened it before now can think it free.
        self._path.unlink(missing_ok=True)
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            os.close(self._claim)
            raise taken from None
        _lock(file)
        text = json.dumps(facts.__dict__).encode()
        arms = len(facts.arms)
        os.ftruncate(file, _HEADER + 8 * (_SLOTS + 1 + facts.nq + facts.nv + 14 * arms))
        self._block = _Block(file, facts)
        # Header last: a reader that sees the magic sees a complete file.
        os.pwrite(file, struct.pack("<II", _LAYOUT, len(text)) + text, 8)
        os.pwrite(file, _MAGIC, 0)

    def write(self, time_s: float, qpos: np.ndarray, qvel: np.ndarray, q: np.ndarray, dq: np.ndarray) -> None:
        """Publish one instant; shapes as in `Snapshot`."""
        slots, numbers, ends = self._block.slots, self._block.numbers, self._block.ends
        slots[_SEQUENCE] += 1
        numbers[0] = time_s
        numbers[1 : ends[1]] = qpos
        numbers[ends[1] : ends[2]] = qvel
        numbers[ends[2] : ends[3]] = q.reshape(-1)
        numbers[ends[3] :] = dq.reshape(-1)
        slots[_WALL_NS] = time.monotonic_ns()
        slots[_SEQUENCE] += 1

    def set_trial(self, split: str, seed: int) -> None:
        """The instants from now on are of this trial of `Facts.task`."""
        self._block.slots[_TRIAL] = 2 * seed + (split == "unseen")

    def limit_s(self) -> float:
        """Simulated time that a reader asked not to go beyond; inf: none did."""
        limit = int(self._block.slots[_LIMIT_US])
        return 1e-6 * limit if limit else math.inf

    def lift_limit(self) -> None:
        """Until a reader asks again."""
        self._block.slots[_LIMIT_US] = 0

    def close(self) -> None:
        """Tell readers that the simulator has stopped and give the name back."""
        if self._block is not None:
            self._block.slots[_STOPPED] = 1
            self._path.unlink(missing_ok=True)
            self._block.close()
            os.close(self._claim)
            self._block = None


class SharedState:
    """A reader's end; make one with `attach`."""

    def __init__(self, block: _Block):
        self._block = block
        self.facts = block.facts

    @classmethod
    def attach(cls, name: str, timeout_s: float = 10.0) -> "SharedState":
        """Wait up to `timeout_s` (wall) for simulator `name` to publish its first instant.

        Raises StateError when none does; the remains of a killed simulator do not count.
        """
        path, deadline = path_of(name), time.monotonic() + timeout_s
        while True:
            state = cls._try(path)
            if state is not None:
                return state
            if time.monotonic() > deadline:
                raise StateError(
                    f"no simulator named {name!r} came up within {timeout_s:.1f} s: start it, or name "
                    "another robot than a simulated one (--robot)"
                )
            time.sleep(0.01)

    @classmethod
    def _try(cls, path: Path) -> "SharedState | None":
        try:
            file = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return None
        facts = None if _unowned(file) else _read_header(file)
        if facts is None:
            os.close(file)
            return None
        block = _Block(file, facts)
        if block.slots[_SEQUENCE] < 2:
            block.close()
            return None
        return cls(block)

    def time(self) -> float:
        """Simulated time, s: one aligned 8-byte load."""
        return float(self._block.numbers[0])

    def trial(self) -> tuple[str, int]:
        """Split and seed of the trial that is set up, where `facts.task` names a task."""
        seed, unseen = divmod(int(self._block.slots[_TRIAL]), 2)
        return ("unseen" if unseen else "seen"), seed

    def limit(self, time_s: float) -> None:
        """Simulated time shall stand at `time_s` until a later limit is set; inf: no limit. One reader's."""
        self._block.slots[_LIMIT_US] = 0 if time_s == math.inf else round(1e6 * time_s)

    def age_s(self) -> float:
        """Wall time since the last write, s. A running simulator writes every few milliseconds."""
        return (time.monotonic_ns() - int(self._block.slots[_WALL_NS])) * 1e-9

    def stopped(self) -> bool:
        """The simulator has said goodbye, or its process is gone."""
        return bool(self._block.slots[_STOPPED]) or _unowned(self._block.file)

    def snapshot(self) -> Snapshot:
        """A consistent copy of the newest instant. Raises StateError if the writer died while writing it."""
        block, deadline = self._block, None
        while True:
            before = int(block.slots[_SEQUENCE])
            if before % 2 == 0:
                numbers, wall = block.numbers.copy(), int(block.slots[_WALL_NS])
                if int(block.slots[_SEQUENCE]) == before:
                    break
            elif deadline is None:
                deadline = time.monotonic() + 1.0
            elif time.monotonic() > deadline:
                raise StateError(f"simulator {self.facts.name!r} stopped in the middle of a write")
            else:
                time.sleep(0)  # the writer may need this core
        ends, arms = block.ends, len(self.facts.arms)
        return Snapshot(
            time_s=float(numbers[0]),
            wall_monotonic_ns=wall,
            qpos=numbers[1 : ends[1]],
            qvel=numbers[ends[1] : ends[2]],
            q=numbers[ends[2] : ends[3]].reshape(arms, 7),
            dq=numbers[ends[3] :].reshape(arms, 7),
        )

    def close(self) -> None:
        """Unmap; the simulator does not notice."""
        if self._block is not None:
            self._block.close()
            self._block = None


def _lock(file: int) -> bool:
    """Take the writer's lock; a reader's look at it (`_unowned`) lasts microseconds, so try for a moment."""
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.005)
    return False


def _unowned(file: int) -> bool:
    """No process holds the writer's lock on this file."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True
