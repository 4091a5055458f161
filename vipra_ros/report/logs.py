"""Reads what the nodes wrote during a run."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class LogError(RuntimeError):
    """A run's log is missing or not what it should be; the message names the file."""


@dataclass(frozen=True)
class ArmsLog:
    """`arms.npz`: the reference loop, tick by tick. n ticks, J joints, c chunks; executor clock."""

    t: np.ndarray  # [n] s
    late: np.ndarray  # [n] s past the absolute deadline
    q_ref: np.ndarray  # [n, J] rad
    q_meas: np.ndarray  # [n, J] rad
    state: np.ndarray  # [n] names
    seq: np.ndarray  # [n] chunk in charge, -1: none
    starved: np.ndarray  # [n] bool
    skew: np.ndarray  # [n] s between handing the first and the last arm its target
    chunk_seq: np.ndarray  # [c]
    chunk_accepted: np.ndarray  # [c] s
    chunk_join_rad: np.ndarray  # [c] largest step that the join blended out
    events: tuple[tuple[float, str, str], ...]  # time s, kind, reason
    joint_names: tuple[str, ...]  # [J]

    @classmethod
    def read(cls, path: Path) -> "ArmsLog":
        """Raises LogError."""
        try:
            with np.load(path, allow_pickle=False) as file:
                events = zip(file["event_t"].tolist(), file["event_kind"], file["event_reason"], strict=True)
                plain = {
                    name: file[name]
                    for name in (
                        *("t", "late", "q_ref", "q_meas", "seq", "starved", "skew"),
                        *("chunk_seq", "chunk_accepted", "chunk_join_rad"),
                    )
                }
                return cls(
                    **plain,
                    state=file["states"][file["state"]],
                    events=tuple((t, str(kind), str(reason)) for t, kind, reason in events),
                    joint_names=tuple(str(name) for name in file["joint_names"]),
                )
        except FileNotFoundError as error:
            raise LogError(f"{path} is missing: the arms node wrote no log") from error
        except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile) as error:
            raise LogError(f"{path} is not a log of the arms node: {error}") from error

    def between(self, start: float, end: float) -> "ArmsLog":
        """The part from `start` to `end`, s."""
        ticks = (self.t >= start) & (self.t <= end)
        chunks = (self.chunk_accepted >= start) & (self.chunk_accepted <= end)
        cut = {
            name: getattr(self, name)[ticks]
            for name in ("t", "late", "q_ref", "q_meas", "state", "seq", "starved", "skew")
        }
        cut |= {
            name: getattr(self, name)[chunks] for name in ("chunk_seq", "chunk_accepted", "chunk_join_rad")
        }
        events = tuple(event for event in self.events if start <= event[0] <= end)
        return ArmsLog(**cut, events=events, joint_names=self.joint_names)

    def started(self) -> float | None:
        """When the arms first ran a chunk at full speed, s; None: never."""
        running = np.flatnonzero(self.state == "RUNNING")
        return float(self.t[running[0]]) if running.size else None


def read_requests(path: Path) -> list[dict]:
    """`policy.jsonl`, one request a line; a last line that was cut short is dropped. Raises LogError."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}: the policy node wrote no log") from error
    requests = []
    for number, line in enumerate(lines, 1):
        try:
            requests.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise LogError(f"{path}:{number}: {error}") from error
    return requests
