"""Plays a recorded episode's actions back on the arms: through a lease and in chunks, like a policy.

Whatever the arms node checks for a policy is checked here: limits, joins, collisions, dead-man, stop.
"""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from config.embodiment import Embodiment
from config.robot import Robot
from episodes.demonstration import ACTION
from episodes.layout import EpisodesError
from episodes.reader import Dataset
from vipra_ros.commander import ARMS_SILENT_S, LATCHED, ArmsStatus
from vipra_ros.execution.chunk import Chunk
from vipra_ros.process import ProcessError, wait_for
from vipra_ros.recording.synchronizer import Track
from vipra_ros.robot.commands import joint_names

HORIZON, EVERY = 14, 7  # actions of a chunk, and how many of them run before the next takes over
LEAD_S = 0.15  # a chunk goes out this long before its first action is due
ALIGN_S = 15.0  # for the arms to move to the first action
ALIGNED_RAD = 0.05
WATCH_S = 0.1  # between two looks at the arms


def chunks(actions: np.ndarray, rate_hz: float, start_s: float, embodiment: Embodiment) -> list[Chunk]:
    """`actions` [T, D] as overlapping chunks; action i is due at start_s + i / rate_hz in each that has it.

    The last one holds the last action once more, so that two actions at least are in it.
    """
    found = []
    padded = np.concatenate([actions, actions[-1:]])
    for seq, first in enumerate(range(0, len(actions), EVERY)):
        rows = padded[first : first + HORIZON]
        found.append(Chunk.from_actions(seq, start_s + first / rate_hz, rate_hz, rows, embodiment))
    return found


def load_actions(dataset: Dataset, episode: int, embodiment: Embodiment) -> np.ndarray:
    """The episode's actions [T, D]. Raises EpisodesError where they are not this robot's."""
    if not 0 <= episode < len(dataset):
        raise EpisodesError(f"{dataset.root} has episodes 0 to {len(dataset) - 1}, not {episode}")
    names = dataset.names(ACTION)
    if names != embodiment.names:
        raise EpisodesError(
            f"{dataset.root} was recorded with {dataset.info['robot_type']}: its actions are "
            f"{', '.join(names)}; {embodiment.name} has {', '.join(embodiment.names)}"
        )
    return dataset.values(episode, ACTION).astype(float)


@dataclass(frozen=True)
class Replayed:
    """What came of a replay."""

    seconds: float
    error_rms_rad: float  # measured joints against the actions that were due
    error_max_rad: float


class Replayer:
    """A commander of its own ROS context. Use as a context manager; the arms are let go at its end."""

    def __init__(self, robot: Robot, embodiment: Embodiment):
        import rclpy
        from diagnostic_msgs.msg import DiagnosticStatus
        from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
        from rclpy.qos import DurabilityPolicy, QoSProfile
        from rclpy.signals import SignalHandlerOptions
        from sensor_msgs.msg import JointState
        from std_srvs.srv import Trigger
        from trajectory_msgs.msg import JointTrajectory

        from vipra_ros.clock import make_clock

        self._embodiment = embodiment
        self._arms = {arm: list(joint_names(arm, robot.arms[arm].gripper)) for arm in embodiment.by_arm}
        self._clock = make_clock(robot)
        self._lease, self._leased_at = "", 0.0
        self._status: ArmsStatus | None = None
        self._heard = -np.inf  # wall time of it
        self._before = ""  # the refusal that stood when the lease was new
        self._sent: set[int] = set()  # sequence numbers; refusals of others are another commander's
        self._tracks = {arm: Track() for arm in self._arms}
        self._tracking = threading.Lock()  # samples come in another thread
        self._context = rclpy.Context()
        rclpy.init(args=[], context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node("replay", context=self._context)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._node.create_subscription(DiagnosticStatus, "/arms/status", self._on_status, latched)
        self._commands = {}
        for arm in self._arms:
            self._node.create_subscription(
                JointState, f"/{arm}/joint_states", lambda m, arm=arm: self._on_joints(arm, m), 100
            )
            self._commands[arm] = self._node.create_publisher(JointTrajectory, f"/{arm}/joint_command", 2)
        self._client = self._node.create_client(Trigger, "/arms/acquire_lease")
        self._request = Trigger.Request
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)

        def spin() -> None:
            with contextlib.suppress(ExternalShutdownException):
                self._executor.spin()

        self._thread = threading.Thread(target=spin, name="replay", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Replayer":
        return self

    def __exit__(self, *_) -> None:
        if self._lease:
            self._send(None, 1 << 40)
            time.sleep(0.1)  # for the message to leave
        self._executor.shutdown(timeout_sec=2.0)
        self._thread.join(2.0)
        self._node.destroy_node()
        self._context.try_shutdown()
        self._clock.close()

    def _on_status(self, message) -> None:
        with contextlib.suppress(KeyError, ValueError):  # not the arms node's: as if nothing was heard
            self._status = ArmsStatus.of(message.message, {v.key: v.value for v in message.values})
            self._heard = time.monotonic()

    def _on_joints(self, arm: str, message) -> None:
        stamp = message.header.stamp
        with self._tracking:
            self._tracks[arm].add(stamp.sec + 1e-9 * stamp.nanosec, np.array(message.position))

    def _known_s(self) -> float:
        """Up to when every arm's joints are known, executor time."""
        with self._tracking:
            return min(track.newest_s for track in self._tracks.values())

    def _measured(self, t: float | None = None) -> np.ndarray:
        """Measured vector [D], now or at executor time `t`."""
        with self._tracking:
            return np.concatenate([k.at(k.newest_s if t is None else t)[0] for k in self._tracks.values()])

    def _send(self, chunk: Chunk | None, seq: int) -> None:
        from vipra_ros.nodes.messages import parts

        self._sent.add(seq)
        for arm, message in parts(f"{self._lease}:{seq}", chunk, self._arms).items():
            self._commands[arm].publish(message)

    def _check(self) -> None:
        """Raises ProcessError where the arms are silent, have stopped, or refused a chunk."""
        arms = self._status
        silent_s = max(time.monotonic() - self._heard, self._clock.now() - self._known_s())
        if silent_s > ARMS_SILENT_S:
            raise ProcessError(f"the arms have been silent for {silent_s:.1f} s: is the arms node up?")
        if arms.state in LATCHED:
            raise ProcessError(f"the arms stopped: {arms.state}: {arms.reason}")
        if arms.time_s > self._leased_at and arms.lease != self._lease:
            raise ProcessError("the arms gave the lease to another commander, or were started again")
        seq, _, text = arms.rejected.partition(" ")
        ours = seq.isdigit() and int(seq) in self._sent and not text.startswith(("lease", "epoch"))
        if arms.rejected != self._before and ours:
            raise ProcessError(f"the arms refused chunk {arms.rejected}")

    def run(self, actions: np.ndarray, rate_hz: float, progress: Callable[[float], None]) -> Replayed:
        """Play `actions` [T, D]; progress(seconds played).

        Raises ProcessError where the arms stop, refuse or are lost, ClockStopped.
        """
        wait_for(lambda: self._status and np.isfinite(self._known_s()), 10.0, "the arms")
        joints = np.array([d.kind == "joint" for d in self._embodiment.dimensions])
        away = np.abs(self._measured() - actions[0])[joints].max()
        if away > 0.3:
            raise ProcessError(
                f"the arms are {away:.2f} rad from the episode's first action, over 0.3 rad: vipra home, or "
                "lead them there first"
            )
        if not self._client.wait_for_service(5.0):
            raise ProcessError("/arms/acquire_lease: nobody offers it: is the robot up (vipra up)?")
        future = self._client.call_async(self._request())
        answer = wait_for(lambda: future.done() and future.result(), 5.0, "answer of /arms/acquire_lease")
        if not answer.success:
            raise ProcessError(answer.message)
        self._lease, self._leased_at = answer.message, self._clock.now()
        self._before = self._status.rejected
        seq = self._align(actions[0], rate_hz, joints)

        start, errors = self._clock.now() + 2 * LEAD_S, []
        end = start + (len(actions) - 1) / rate_hz

        def watch() -> None:
            """Check the arms, and compare what was due with what they did, as far as it is known."""
            self._check()
            while len(errors) < len(actions) and (t := start + len(errors) / rate_hz) <= self._known_s():
                errors.append(np.abs(self._measured(t) - actions[len(errors)])[joints])

        for chunk in chunks(actions, rate_hz, start, self._embodiment):
            self._wait_until(chunk.t0 - LEAD_S, watch)
            self._send(chunk, seq)
            seq += 1
            progress(max(0.0, self._clock.now() - start))
        self._wait_until(end, watch)
        while len(errors) < len(actions):
            self._wait_until(self._clock.now() + WATCH_S, watch)
        found = np.array(errors)
        return Replayed(end - start, float(np.sqrt((found**2).mean())), float(found.max()))

    def _align(self, first: np.ndarray, rate_hz: float, joints: np.ndarray) -> int:
        """Hold the first action until the arms are there; the next sequence number."""
        deadline = time.monotonic() + ALIGN_S
        for seq in itertools.count():
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"the arms did not reach the first action within {ALIGN_S:g} s: {self._status.reason}"
                )
            now = self._clock.now()
            rows = np.tile(first, (HORIZON, 1))
            self._send(Chunk.from_actions(seq, now + 0.05, rate_hz, rows, self._embodiment), seq)
            self._wait_until(now + 0.3, self._check)
            away = np.abs(self._measured() - first)[joints].max()
            if self._status.state == "RUNNING" and away < ALIGNED_RAD:
                return seq + 1

    def _wait_until(self, t: float, watch: Callable[[], None]) -> None:
        """Until executor time `t`, with a `watch` every now and then and at the end. Raises ClockStopped."""
        while (now := self._clock.now()) < t:
            self._clock.sleep_until(min(t, now + WATCH_S))
            watch()
