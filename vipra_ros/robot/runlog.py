"""What the executor did, tick by tick: kept in memory, written as one `arms.npz` at the end."""

import json
from collections import deque
from pathlib import Path

import numpy as np

_BLOCK = 12000  # ticks; one minute at 200 Hz


class RunLog:
    """Fixed-width rows in preallocated blocks of a minute, so that a tick costs a few copies.

    Only the last `minutes`, events and chunks of a long run are kept.
    """

    def __init__(self, joints: int, minutes: int = 60):
        self._dtype = np.dtype(
            [
                ("t", "f8"),  # s, executor clock
                ("late", "f8"),  # s behind the deadline
                ("q_ref", "f8", joints),  # rad
                ("dq_ref", "f8", joints),  # rad/s
                ("q_meas", "f8", joints),
                ("dq_meas", "f8", joints),
                ("state", "u1"),  # index into `states`
                ("seq", "i8"),  # chunk in charge, -1: none
                ("index", "i2"),  # its action due
                ("starved", "?"),
                ("skew", "f8"),  # s between handing the first and the last arm its target
            ]
        )
        self._blocks = deque([np.zeros(_BLOCK, self._dtype)], maxlen=minutes)
        self._rows = 0
        self.chunks: deque[tuple[int, float, float, float, float, bool]] = deque(maxlen=20_000)
        self.events: deque[tuple[float, str, str]] = deque(maxlen=20_000)

    def add(self, *values) -> None:
        """One tick: the fields above, in order."""
        if self._rows == _BLOCK:
            self._blocks.append(np.zeros(_BLOCK, self._dtype))
            self._rows = 0
        row = self._blocks[-1][self._rows]
        row["t"], row["late"], row["q_ref"], row["dq_ref"], row["q_meas"], row["dq_meas"] = values[:6]
        row["state"], row["seq"], row["index"], row["starved"], row["skew"] = values[6:]
        self._rows += 1

    def save(self, path: Path, states: list[str], names: list[str]) -> None:
        """Write `path` (.npz).

        The tick fields [n]; chunk_seq, chunk_t0, chunk_rate_hz, chunk_accepted, chunk_join_rad,
        chunk_aligning [m]; event_t, event_kind, event_reason [k]; states; joint_names.
        """
        *full, last = self._blocks
        ticks = np.concatenate([*full, last[: self._rows]])
        columns = list(zip(*self.chunks, strict=True)) or [()] * 6
        seq, t0, rate, accepted, join, aligning = columns
        times, kinds, reasons = list(zip(*self.events, strict=True)) or [()] * 3
        np.savez(
            path,
            **{name: ticks[name] for name in ticks.dtype.names},
            chunk_seq=np.array(seq, "i8"),
            chunk_t0=np.array(t0, "f8"),
            chunk_rate_hz=np.array(rate, "f8"),
            chunk_accepted=np.array(accepted, "f8"),
            chunk_join_rad=np.array(join, "f8"),
            chunk_aligning=np.array(aligning, "?"),
            event_t=np.array(times, "f8"),
            event_kind=np.array(kinds, "U"),
            event_reason=np.array(reasons, "U"),
            states=np.array(states),
            joint_names=np.array(names),
            format=json.dumps({"version": 1, "units": "s, rad, rad/s"}),
        )
