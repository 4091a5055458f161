"""The robot as an evaluation sees it: start and stop the policy, tell trouble, film and record a trial.

ROS is imported when a `GraphRig` is made.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import av
import numpy as np

from config.safety import GripperLimits
from vipra_ros.evaluation.ledger import EvaluationError, Key, Ledger
from vipra_ros.evaluation.motion import measure
from vipra_ros.report.video import Video, jpeg

if TYPE_CHECKING:
    from vipra_ros.monitor import Status

SAMPLE_HZ = 15.0  # of the trajectory, as the demonstrations
STATUS_S = 0.5  # after a start, until the nodes' status tells of it
SILENT_S = 3.0  # wall time without a node's status, which comes at 10 Hz and more: the node is gone
UNANSWERED_S = 5.0  # of the arms' time that arms rest and no chunk comes while the policy runs
WAITING_S = 2.0  # of the arms' time that a policy may wait, for a lease say, before the trial is void
NOT_ITS_DOING = (  # beginnings of a policy's reason
    "no policy server",
    "the server's policy does not fit",
    "the policy server refuses: inference_failed",
    "the arms node has fallen silent",
)
LATCHED = ("FAULT", "STOPPED", "STOPPING")
Track = list[tuple[float, np.ndarray]]  # stamp s; [7] rad and the hand's opening, if there is one


class Rig(Protocol):
    """The robot as an evaluation sees it."""

    def start(self, instruction: str, film: Path) -> None: ...
    def stop(self) -> None: ...
    def halt(self) -> None: ...
    def open_hands(self) -> str: ...

    def trouble(self) -> tuple[str, str] | None:
        """("void" or "fault", reason) when the policy no longer moves the arms."""

    def save(self, ledger: Ledger, key: Key) -> dict[str, float | None]:
        """Write the trial's files; what `motion` measures."""

    def discard(self) -> None:
        """The trial does not count: nothing more is written."""

    errors: tuple[type[Exception], ...]  # of a call that was refused


class GraphRig:
    """The graph that `vipra up` or a launch file started.

    hand: limits of the hands. evaluated: what of `played` a start insists on; EvaluationError where the
    policy has something else.
    """

    def __init__(
        self,
        monitor,
        arms: tuple[str, ...],
        hand: GripperLimits,
        tell: Callable[[str], None],
        evaluated: dict | None = None,
    ):
        from vipra_ros.monitor import CallFailed

        self.errors = (CallFailed, EvaluationError)
        self._monitor, self._arms, self._hand = monitor, arms, hand
        self._tell, self.evaluated = tell, evaluated or {}
        self._lock = threading.Lock()  # the monitor's thread delivers pictures and joints
        self._recording, self._film = False, None  # a film may end before its trial
        self._filmed_s, self._picture = -np.inf, None
        self.newest_s = -np.inf  # capture stamp of the newest picture
        self._joints: dict[str, Track] = {arm: [] for arm in arms}
        self._told: dict[str, Track] = {arm: [] for arm in arms}
        self._started = -np.inf
        self._moved_s: float | None = None  # the arms' time when the policy last did not wait
        self._answers: tuple = ()  # chunks so far in this trial
        self._answered_s = 0.0  # the arms' time of a newer one, or of motion
        self._told_at: dict[str, float] = {}  # node -> when its status came
        for node in ("arms", "policy"):
            monitor.watch_status(node, lambda _, node=node: self._told_at.update({node: time.monotonic()}))
        monitor.watch_images(self._on_image)
        for arm in arms:
            monitor.watch_joints(arm, lambda message, arm=arm: self._on_joints(self._joints[arm], message))
            monitor.watch_joints(
                arm, lambda message, arm=arm: self._on_joints(self._told[arm], message), "joint_reference"
            )

    def start(self, instruction: str, film: Path) -> None:
        self._monitor.set_task(instruction)
        now = played(self._monitor.status("policy"))
        for name, value in self.evaluated.items():
            if now[name] != value:
                raise EvaluationError(
                    f"the policy has {name} {now[name]!r}, this evaluation's has {value!r}: serve that one"
                )
        with self._lock:
            self._picture, self._film, self._recording = None, Video(film, SAMPLE_HZ), True
            for arm in self._arms:
                self._joints[arm].clear()
                self._told[arm].clear()
        self._monitor.call("/policy/start", 15.0)
        self._started, self._moved_s, self._answers = time.monotonic(), None, ()

    def stop(self) -> None:
        self._monitor.call("/policy/stop", 5.0)

    def halt(self) -> None:
        self._monitor.call("/arms/stop", 2.0)

    def open_hands(self) -> str:
        return self._monitor.call("/arms/open_hands", 2.0)

    def trouble(self) -> tuple[str, str] | None:
        arms, policy = self._monitor.status("arms"), self._monitor.status("policy")
        if time.monotonic() - self._started < STATUS_S or arms is None or policy is None:
            return None
        if arms.values.get("state") in LATCHED:
            return "fault", f"arms {arms.values['state']}: {arms.message}"
        if policy.message.startswith(NOT_ITS_DOING):
            return "void", policy.message
        for node in ("policy", "arms"):
            if time.monotonic() - max(self._started, self._told_at.get(node, -np.inf)) > SILENT_S:
                return "void", f"no status from the {node} node for {SILENT_S:g} s: is it up?"
        state, now = policy.values.get("state"), arms.number("time_s")
        if state != "WAITING" or self._moved_s is None:
            self._moved_s = now
        elif now - self._moved_s > WAITING_S:
            return "void", f"the policy waits: {policy.message}"
        answers = policy.values.get("chunks"), policy.values.get("refused")
        moving = arms.values.get("state") in ("RUNNING", "ALIGNING")
        if state != "RUNNING" or moving or answers != self._answers:
            self._answers, self._answered_s = answers, now
        elif now - self._answered_s > UNANSWERED_S:
            return "void", f"no chunk from the policy server for {UNANSWERED_S:g} s: does it hang?"
        return ("fault", f"policy: {policy.message}") if state in ("STOPPED", "IDLE") else None

    def save(self, ledger: Ledger, key: Key) -> dict[str, float | None]:
        joints, told = self.finish(ledger.file(key, ".jpg"))
        times = grid(joints)
        np.savez_compressed(
            ledger.file(key, ".npz"),
            time_s=times - times[:1],  # [T]
            arms=np.array(self._arms),  # [A]
            state=together(times, joints),  # [T, A, 8] measured joints, rad, and the hand's opening
            commanded=together(times, told),  # [T, A, 8]
        )
        return self.measure(joints, told)

    def measure(self, joints: list[Track], told: list[Track]) -> dict[str, float | None]:
        """What `motion` measures, of joints measured and commanded, by arm."""
        times = grid(joints)
        positions = np.hstack([*together(times, joints)[..., :7].swapaxes(0, 1)])
        openings = np.hstack([*together(times, told)[..., 7:].swapaxes(0, 1)])
        return measure(positions, openings, SAMPLE_HZ, self._hand)

    def finish(self, still: Path) -> tuple[list[Track], list[Track]]:
        """End the film and write its last picture; joints measured and commanded, by arm, with the hand's
        opening.
        """
        self.discard()
        with self._lock:
            if self._picture is not None:
                still.write_bytes(jpeg(self._picture))
            return [list(self._joints[arm]) for arm in self._arms], [
                list(self._told[arm]) for arm in self._arms
            ]

    def discard(self) -> None:
        with self._lock:
            film, self._film, self._recording = self._film, None, False
        if film is not None:
            film.close()

    def _on_image(self, message) -> None:
        stamp_s = message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec
        self.newest_s = stamp_s
        with self._lock:
            if not self._recording or stamp_s - self._filmed_s < 0.9 / SAMPLE_HZ:
                return
            self._filmed_s = stamp_s
            rgb = np.frombuffer(message.data, np.uint8)
            self._picture = rgb.reshape(message.height, message.width, 3)
            if self._film is None:
                return
            try:
                self._film.add(self._picture, stamp_s)
            except (av.FFmpegError, OSError) as error:  # here is the thread that hears the arms
                self._film = None
                self._tell(f"this trial's film ends early, the trial goes on: {error}")

    def _on_joints(self, track: Track, message) -> None:
        stamp_s = message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec
        with self._lock:
            if self._recording:
                track.append((stamp_s, np.array(message.position)))


def played(policy: "Status") -> dict:
    """Of the policy node's status: what is served and how it is played, as a simulated trial's settings."""
    words = {name: policy.values.get(name) for name in ("model", "checkpoint", "mode", "anchor")}
    return words | {name: policy.number(name) for name in ("action_rate_hz", "replan_after", "min_cycle_s")}


def grid(arms: list[Track]) -> np.ndarray:
    """Times [T] s at SAMPLE_HZ in which every arm told of itself; none where one did not."""
    if not all(arms):
        return np.zeros(0)
    return np.arange(max(track[0][0] for track in arms), min(track[-1][0] for track in arms), 1 / SAMPLE_HZ)


def together(times: np.ndarray, arms: list[Track]) -> np.ndarray:
    """Positions of all arms [T, A, 7 or 8] at `times` s; [T, A, 0] where one told nothing."""
    if not all(arms):
        return np.zeros((len(times), len(arms), 0))
    return np.stack([at(times, track) for track in arms], axis=1)


def at(times: np.ndarray, track: Track) -> np.ndarray:
    """Positions [T, n] at `times` s, between the states of a track that is not empty."""
    stamps, positions = np.array([stamp for stamp, _ in track]), np.array([q for _, q in track])
    return np.stack([np.interp(times, stamps, column) for column in positions.T], axis=1)
