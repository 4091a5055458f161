"""One sitting of recording: what the operator asks for, what the streams do, and which episodes are kept.

An episode is recorded, then kept or discarded. One whose data is suspicious has to be kept twice:
nothing with a frozen camera enters a dataset unseen. No ROS.
"""

import enum
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from config.recording import Recording
from episodes import quality
from episodes.quality import Finding
from vipra_ros.recording.setups import Setup, Setups
from vipra_ros.recording.synchronizer import Synchronizer
from vipra_ros.recording.worker import Worker

FRESH_S = 0.5  # a stream without a sample for this long is silent
LOST_S = 2.0  # silent for this long, it ends the episode
AHEAD_S = 0.1  # a stamp this far ahead of now is not on this clock
HELD_S = 0.5  # arms that nobody commands for this long flag the episode
WAITING = "waiting for camera and arms"
# Kinds that need a second ~/keep.
GRAVE = frozenset(("frozen", "gap", "dropped", "stale", "lost", "stopped", "held"))
_DISK_EVERY_S = 0.5
_STOPPED = ("FAULT", "STOPPING", "STOPPED", "RECOVERING")
_HELD = ("HOLDING", "IDLE")
_ASKED = ("PAUSED", "OFF")  # states of teleoperation in which the operator let the arms go


class State(enum.Enum):
    IDLE = "IDLE"
    RECORDING = "RECORDING"
    PAUSED = "PAUSED"
    FINISHING = "FINISHING"  # the last frames are being written
    PENDING = "PENDING"  # keep or discard?
    SAVING = "SAVING"


class Refused(ValueError):
    """What was asked for cannot be done now; the message says why and what to do."""


class Session:
    """`now` is executor time. Requests raise Refused and return what the operator is told."""

    def __init__(
        self,
        config: Recording,
        setups: Setups,
        synchronizer: Synchronizer,
        worker: Worker,
        root: Path,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ):
        self.target = config.target
        self._setups = setups
        self._config, self._synchronizer, self._worker = config, synchronizer, worker
        self._root, self._free_bytes = root, free_bytes
        self.state, self.message = State.IDLE, WAITING
        self.frames = 0  # of the running or last episode
        self.repeated = 0
        self.last: tuple[float, list[Finding]] = (0.0, [])  # length in s and findings of the last episode
        self.kept: list[float] = []  # synchronisation errors of every frame kept, s
        self._asked = False  # keep was asked for once, though the episode is flagged
        self._discarded = False  # the last episode is still there, for undo
        self._events: list[Finding] = []  # that only the live streams show
        self._arms: tuple[str, str] = ("", "")
        self._teleop: tuple[str, str] = ("", "")
        self._held_since = np.inf
        self._errors: list[float] = []
        self._disk_at, self._free_mb = -np.inf, np.inf

    @property
    def length_s(self) -> float:
        return self.frames / self._rate_hz

    @property
    def setup(self) -> Setup:
        """Of the running or next episode."""
        return self._setups(self._worker.episodes)

    @property
    def _rate_hz(self) -> float:
        return 1.0 / self._synchronizer.period_s

    # --- what the operator asks for

    def start(self, now: float) -> str:
        """Record from the next picture on. A discarded episode can no longer be brought back then."""
        self._need(State.IDLE, "start")
        self._check_ready(now)
        self._begin()
        return f"recording episode {self._worker.episodes + 1}: {self.setup.instruction}"

    def stop(self) -> str:
        """End the episode; then keep or discard it."""
        if self.state not in (State.RECORDING, State.PAUSED):
            raise Refused(f"nothing is being recorded ({self.state.value}): start first")
        self._finish("")
        return f"{self.frames} frames, {self.length_s:.1f} s"

    def keep(self) -> str:
        """Save the pending episode; a flagged one at the second time."""
        self._need(State.PENDING, "keep")
        if self._worker.broken:
            raise Refused(f"cannot be kept: {self._worker.error}: discard it")
        if self.flags and not self._asked:
            self._asked = True
            raise Refused(
                f"flagged: {quality.summary(self.flags)}: keep again to keep it all the same, or discard"
            )
        self._save()
        return "saving"

    def discard(self) -> str:
        """Drop the running or pending episode; `undo` brings a pending one back until the next start."""
        if self.state in (State.RECORDING, State.PAUSED, State.FINISHING):
            self._drop("discarded")
        elif self.state is State.PENDING:
            self._discarded, self.state, self.message = True, State.IDLE, "discarded (undo brings it back)"
        else:
            raise Refused(f"there is no episode to discard ({self.state.value})")
        return self.message

    def undo(self) -> str:
        """Bring back the episode that was just discarded."""
        if self.state is not State.IDLE or not self._discarded:
            raise Refused("there is nothing to undo: only a discarded episode, until the next start")
        self._discarded, self._asked, self.state = False, False, State.PENDING
        self.message = self._verdict()
        return self.message

    def retry(self, now: float) -> str:
        """Drop the running or pending episode and record again at once."""
        if self.state not in (State.RECORDING, State.PAUSED, State.FINISHING, State.PENDING):
            raise Refused(f"there is no episode to retry ({self.state.value}): start one")
        self._check_ready(now)
        self._drop("retry")
        self._begin()
        return f"recording again: {self.setup.instruction}"

    def pause(self) -> str:
        """Leave out what happens until the next call; hold the arms still meanwhile."""
        if self.state is State.RECORDING:
            self._synchronizer.end()
            self.state, self.message = State.PAUSED, "paused"
        elif self.state is State.PAUSED:
            self._synchronizer.begin()
            self._held_since = np.inf
            self.state, self.message = State.RECORDING, "recording"
        else:
            raise Refused(f"nothing is being recorded ({self.state.value}): start first")
        return self.message

    def change_task(self, setups: Setups) -> None:
        """What the next episodes show."""
        if self.state in (State.RECORDING, State.PAUSED):
            raise Refused("the task cannot change during an episode: stop first")
        self._setups = setups

    # --- what happens meanwhile

    def on_arms(self, state: str, reason: str) -> None:
        """Status of the arms node. A stop or fault ends the episode."""
        self._arms = state, reason
        if state in _STOPPED and self.state in (State.RECORDING, State.PAUSED):
            self._events.append(Finding("stopped", f"arms {state}: {reason}", self.frames, self.frames))
            self._finish("ended: the arms stopped")

    def on_teleop(self, state: str, reason: str) -> None:
        """Status of the teleop node, where there is one: it tells a clutch from a leader that was lost."""
        self._teleop = state, reason

    def poll(self, now: float) -> None:
        """Move complete frames on, and go on with what waits. Call often."""
        if self.message is WAITING and not self._silent(now, FRESH_S):
            self.message = "ready"
        if self.state is State.RECORDING:
            self._record(now)
        elif self.state is State.FINISHING and not self._worker.waiting:
            self._judge()
        elif self.state is State.SAVING and not self._worker.waiting:
            self._saved()

    @property
    def flags(self) -> list[Finding]:
        """What makes the last episode one that has to be kept twice."""
        return [f for f in self.last[1] if f.kind in GRAVE]

    def sync_p99_ms(self) -> float:
        """Of every frame kept, and of those of the running episode."""
        errors = [*self.kept, *self._errors]
        return 1000 * float(np.quantile(errors, 0.99)) if errors else 0.0

    def warnings(self, now: float) -> list[str]:
        """What the operator should know now."""
        found = [f"{stream} is silent" for stream in self._silent(now, FRESH_S)]
        found += filter(None, [self._ahead(now)])
        if self._free(now) < self._config.reserve_mb:
            found.append(f"disk nearly full: {self._free_mb:.0f} MB left at {self._root}")
        if self._arms[0] in _STOPPED:
            found.append(f"arms {self._arms[0]}: {self._arms[1]}")
        if self.state is State.RECORDING and (held := self._held()):
            found.append(held)
        if self._worker.error:
            found.append(self._worker.error)
        return found

    def _need(self, state: State, verb: str) -> None:
        if self.state is not state:
            hints = {
                State.IDLE: "start first",
                State.RECORDING: "stop first",
                State.PAUSED: "stop first",
                State.PENDING: "keep or discard the last episode first",
            }
            hint = hints.get(self.state, "wait a moment")
            raise Refused(f"cannot {verb} now ({self.state.value}): {hint}")

    def _check_ready(self, now: float) -> None:
        if not self.setup.instruction:
            raise Refused(
                "the task is empty: say what is demonstrated (vipra record --task, or parameter task)"
            )
        silent = self._silent(now, FRESH_S)
        if silent:
            raise Refused(f"nothing comes on {', '.join(silent)}: are camera and arms running (vipra up)?")
        if ahead := self._ahead(now):
            raise Refused(ahead)
        if self._arms[0] in _STOPPED:
            raise Refused(f"the arms are stopped ({self._arms[1]}): vipra recover first")
        self._disk_at = -np.inf
        if self._free(now) < self._config.reserve_mb:
            raise Refused(
                f"{self._free_mb:.0f} MB are free at {self._root}, {self._config.reserve_mb} MB are needed: "
                "make room, or record elsewhere"
            )

    def _begin(self) -> None:
        self._worker.discard()  # what is left of a discarded one
        self._discarded = self._asked = False
        self.frames = self.repeated = 0
        self._events, self._errors = [], []
        self._held_since = np.inf
        self._synchronizer.begin()
        self.state, self.message = State.RECORDING, "recording"

    def _record(self, now: float) -> None:
        for frame in self._synchronizer.take(now):
            if not self._worker.put(frame, self.setup.instruction):
                text = f"frame {self.frames} lost: the disk or processor is too slow to encode"
                self._events.append(Finding("lost", text, self.frames, self.frames))
                self._finish("ended: frames were lost")
                return
            self.frames += 1
            self.repeated += frame.repeated
            self._errors.append(frame.sync_error_s)
        self._watch_commands(now)
        silent = self._silent(now, LOST_S)
        if self._synchronizer.jumped:
            self._events.append(Finding("lost", "the clock began anew", self.frames, self.frames))
            self._finish("ended: the clock began anew")
        elif ahead := self._ahead(now):
            self._events.append(Finding("lost", ahead, self.frames, self.frames))
            self._finish(f"ended: {ahead}")
        elif silent:
            text = f"nothing came on {', '.join(silent)} for {LOST_S:g} s"
            self._events.append(Finding("lost", text, self.frames, self.frames))
            self._finish(f"ended: {text}")
        elif self._worker.broken:
            self._finish(f"ended: {self._worker.error}")
        elif self._free(now) < self._config.reserve_mb:
            self._finish(f"ended: disk nearly full, {self._free_mb:.0f} MB left; keep saves what there is")
        elif self.length_s >= self._config.max_episode_s:
            self._finish(f"ended after {self._config.max_episode_s:g} s")

    def _held(self) -> str:
        """Why the arms hold though the operator did not let them go; "" if they do not."""
        if self._arms[0] not in _HELD or self._teleop[0] in _ASKED:
            return ""
        state, reason = self._teleop if self._teleop[0] == "LOST" else self._arms
        return f"arms held: {state}: {reason}"

    def _watch_commands(self, now: float) -> None:
        """A clutch or a late chunk is a rest at most; arms that nobody commands are a finding."""
        held = self._held()
        self._held_since = min(self._held_since, now) if held else np.inf
        if now - self._held_since > HELD_S and not any(f.kind == "held" for f in self._events):
            self._events.append(Finding("held", held, self.frames, self.frames))

    def _finish(self, why: str) -> None:
        self._synchronizer.end()
        self._worker.finish()
        self.state, self.message = State.FINISHING, why

    def _judge(self) -> None:
        if not self.frames:
            self._drop("; ".join(filter(None, (self.message, "no frames were recorded"))))
            return
        findings = sorted([*self._worker.findings(), *self._events], key=lambda f: f.first)
        why, self.last = self.message, (self.length_s, findings)
        self.state, self._asked = State.PENDING, False
        self.message = "; ".join(filter(None, (why, self._verdict())))
        if self._config.keep_clean and not findings and not why:
            self._save()

    def _verdict(self) -> str:
        length, findings = self.last
        text = f"{length:.1f} s: keep or discard?"
        return f"{quality.summary(findings)}; {text}" if findings else text

    def _save(self) -> None:
        self.state, self.message = State.SAVING, "saving"
        self._worker.save()

    def _saved(self) -> None:
        if self._worker.error:
            self.state, self._asked = State.PENDING, True
            hint = "discard it" if self._worker.broken else "free the disk and keep again, or discard"
            self.message = f"not saved: {self._worker.error}: {hint}"
            return
        self.kept += self._errors
        self._errors = []
        count = self._worker.episodes
        self.state, self.message = State.IDLE, f"kept episode {count}, number {count - 1} in the dataset"

    def _drop(self, message: str) -> None:
        self._synchronizer.end()
        self._worker.discard()
        self._errors = []
        self.state, self.message = State.IDLE, message

    def _ahead(self, now: float) -> str:
        """Which stream is stamped by another clock; "" if none. What came late by it nobody could tell."""
        for stream, newest_s in self._synchronizer.newest_s().items():
            if newest_s > now + AHEAD_S:
                return (
                    f"{stream} is stamped {newest_s - now:.1f} s ahead of this clock: run camera, arms and "
                    "recorder on this machine, with the same robot file"
                )
        return ""

    def _silent(self, now: float, limit_s: float) -> list[str]:
        """Streams without a sample for longer than `limit_s`."""
        return [name for name, stamp in self._synchronizer.newest_s().items() if now - stamp > limit_s]

    def _free(self, now: float) -> float:
        """Free disk in MB, looked up now and then."""
        if now - self._disk_at > _DISK_EVERY_S:
            self._disk_at, self._free_mb = now, self._free_bytes(self._root) / 1e6
        return self._free_mb
