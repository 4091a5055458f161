"""Steering a running simulator: reset, clear, truth, faults, records, status.

ZeroMQ request-reply on `ipc:///tmp/<name>.sock`. A request is one msgpack map {"do": verb, ...arguments}, the
reply {"ok": true, ...result} or {"ok": false, "error": text}. Verbs are those of `SimulationControl`.
"""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgpack
import zmq

_VERBS = (
    "reset",
    "clear",
    "truth",
    "fault",
    "clear_fault",
    "record_start",
    "record_stop",
    "status",
    "shutdown",
)


class SimulationError(RuntimeError):
    """The simulator does not answer, or refuses; the message says why."""


def address_of(name: str) -> str:
    return f"ipc:///tmp/{name}.sock"


class ControlServer:
    """The simulator's end: `serve` between two steps answers at most one request and never waits."""

    def __init__(self, name: str, simulator: Any, stop: Callable[[], None]):
        self.address = address_of(name)
        self._simulator, self._stop = simulator, stop
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 1 << 16)
        self._socket.bind(self.address)
        self._pending: Future | None = None

    def serve(self) -> None:
        if self._pending is not None:
            if self._pending.done():
                error = self._pending.exception()
                self._reply(
                    {"ok": False, "error": str(error)} if error else {"ok": True, **self._pending.result()}
                )
                self._pending = None
            return
        if not self._socket.get(zmq.EVENTS) & zmq.POLLIN:
            return
        try:
            result = self._run(self._socket.recv(zmq.NOBLOCK))
        except (ValueError, TypeError, OSError, msgpack.UnpackException) as error:
            self._reply({"ok": False, "error": str(error) or type(error).__name__})
            return
        if isinstance(result, Future):
            self._pending = result
        else:
            self._reply({"ok": True, **result})

    def _run(self, message: bytes):
        request = msgpack.unpackb(message)
        if not isinstance(request, dict) or request.get("do") not in _VERBS:
            raise ValueError(f"a request is a map with 'do' one of {', '.join(_VERBS)}")
        verb = request.pop("do")
        if verb == "shutdown":
            self._stop()
            return {}
        return getattr(self._simulator, verb)(**request)

    def _reply(self, message: dict) -> None:
        self._socket.send(msgpack.packb(message))

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)


class SimulationControl:
    """Client of one simulator. A call raises SimulationError when it is refused or not answered in time."""

    def __init__(self, name: str, timeout_s: float = 5.0):
        self._name = name
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        # A request that was never answered must not spoil the next one.
        self._socket.setsockopt(zmq.REQ_RELAXED, 1)
        self._socket.setsockopt(zmq.REQ_CORRELATE, 1)
        self._timeout_ms = round(1000 * timeout_s)
        self._socket.setsockopt(zmq.SNDTIMEO, self._timeout_ms)
        self._socket.connect(address_of(name))

    def _call(self, do: str, timeout_s: float | None = None, **arguments) -> dict:
        wait = self._timeout_ms if timeout_s is None else round(1000 * timeout_s)
        try:
            self._socket.send(msgpack.packb({"do": do, **arguments}))
            if not self._socket.poll(wait):
                raise zmq.Again
            reply = msgpack.unpackb(self._socket.recv())
        except zmq.Again:
            raise SimulationError(
                f"simulator {self._name!r} did not answer {do} in {wait} ms: is it running?"
            ) from None
        if not reply.pop("ok"):
            raise SimulationError(f"{do}: {reply['error']}")
        return reply

    def reset(self, seed: int, arms: bool = True, split: str = "seen") -> float:
        """Objects to their poses of `seed`, of its trial in `split` where there is a task; simulated time, s.

        Arms home unless `arms` is False; refused while one moves.
        """
        return self._call("reset", seed=seed, arms=arms, split=split)["time_s"]

    def clear(self) -> None:
        """Objects off the table, out of the arms' reach, until the next reset."""
        self._call("clear")

    def truth(self) -> dict:
        """{"time_s", "objects": {name: {position, quaternion (wxyz), ...}}, "arms": {name: {q, ...}}}."""
        return self._call("truth")

    def fault(self, arm: str, kind: str, **options) -> None:
        """kind: reflex (error="cartesian_reflex"), silent, loss (fraction=0.5), freeze_state, user_stop."""
        self._call("fault", arm=arm, kind=kind, **options)

    def clear_fault(self, arm: str) -> None:
        """End what `fault` injected; a reflex is recovered from by the arm's client."""
        self._call("clear_fault", arm=arm)

    def record_start(self, max_duration_s: float = 300.0) -> None:
        """Begin the 1 kHz record."""
        self._call("record_start", max_duration_s=max_duration_s)

    def record_stop(self, path: str | Path) -> dict:
        """End the record and write it to `path` (npz, see simulation.record): {"path", "samples", ...}."""
        return self._call("record_stop", timeout_s=60.0, path=str(Path(path).absolute()))

    def status(self) -> dict:
        """{"time_s", "real_time_factor" (of the last second), "real_time_factor_total", "arms": {...}}."""
        return self._call("status")

    def shutdown(self) -> None:
        """End the simulator."""
        self._call("shutdown")

    def close(self) -> None:
        self._socket.close()
        self._context.term()
