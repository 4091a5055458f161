"""The policy's side of the robot: pictures in, requests to the server, checked chunks out. No ROS in here.

One thread calls everything; nothing waits. Times are the executor clock's. What runs when is the `Planner`'s
arithmetic; this is the bookkeeping around it and the reactions to a lost camera, a lost server, refused
chunks and arms that stop.

    IDLE     nobody asked for motion (~/start does)
    WAITING  asked for, but something is missing; goes on by itself when it is there. The chunk that runs
             ends, then the arms decelerate and hold
    RUNNING  requests go out and chunks go to the arms
    STOPPED  ended by a fault or something that waiting cannot cure; needs ~/start again
"""

import enum
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from config.embodiment import Embodiment
from config.robot import PolicyClient as PolicyConfig
from policy_server import images, protocol
from policy_server.client import Mismatch, PolicyClient, ServerUnavailable
from vipra_ros.clock import Clock
from vipra_ros.execution.cartesian import joint_chunk
from vipra_ros.execution.chunk import Chunk, Rejected
from vipra_ros.execution.history import FrameHistory
from vipra_ros.execution.planner import Planner, Timing
from vipra_ros.safety.supervisor import Supervisor

ARMS_SILENT_S = 2.0  # wall time; their status comes at 20 Hz
JOINTS_OLD_S = 0.5
WRONG_CLOCK_S = 5.0  # a capture stamp this much older than now is not on this clock,
AHEAD_S = 0.1  # nor is one this far ahead
ACKNOWLEDGE_S = 1.0  # an accepted or refused chunk shows in the arms' status within milliseconds
GIVE_UP = 5  # failures or refusals in a row
LATCHED = ("FAULT", "STOPPING", "STOPPED", "RECOVERING")
# The server's errors that asking again cannot cure.
HOPELESS = ("bad_image", "bad_state", "bad_task", "invalid", "unsupported", "too_large", "mismatch")
# Of the join error that the arms treat as a fault; the measured position trails the reference a little.
JOIN_SHARE = 0.9
# The arms' refusals that the next chunk may not meet: timing and a message lost on the way.
PASSING = ("expired", "stale", "future", "incomplete", "rough")


class State(enum.Enum):
    IDLE = "IDLE"
    WAITING = "WAITING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"


@dataclass(frozen=True)
class Problem:
    """Why nothing can be asked of the policy now. `fatal`: waiting will not help."""

    text: str
    fatal: bool = False


@dataclass(frozen=True)
class ArmsStatus:
    """What the arms node says of itself."""

    state: str
    reason: str
    lease: str
    time_s: float
    accepted_seq: int
    rejected: str  # "seq code message" of the last refusal, or empty

    @classmethod
    def of(cls, message: str, values: Mapping[str, str]) -> "ArmsStatus":
        """From `/arms/status`. Raises ValueError, KeyError for something else."""
        lease = f"{values['lease']}:{values['epoch']}" if values["lease"] else ""
        time_s, seq = float(values["time_s"]), int(values["accepted_seq"])
        return cls(values["state"], message, lease, time_s, seq, values["rejected"])


@dataclass
class _Request:
    t_obs: float
    sent: float
    seed: int
    task: str


@dataclass
class Counts:
    requests: int = 0
    prefetches: int = 0
    chunks: int = 0  # sent to the arms
    failures: int = 0  # requests without a chunk
    refused: int = 0  # chunks that the safety check here or the arms refused
    in_a_row: int = field(default=0)


def connect(config: PolicyConfig, embodiment: Embodiment) -> PolicyClient:
    """The connection that `config` describes. Raises ValueError, KeyFileError."""
    return PolicyClient(
        config.server,
        config.server_public_key,
        config.client_secret_key,
        timeout_s=config.deadline_s + 0.5,
        jpeg_quality=config.jpeg_quality,
        embodiment=embodiment,
    )


class Commander:
    """See the module.

    send(seq, chunk) commands the arms under `lease`; a chunk of None lets them go. record(line) logs one
    request.
    """

    def __init__(
        self,
        config: PolicyConfig,
        embodiment: Embodiment,
        arms: tuple[str, ...],
        client: PolicyClient,
        planner: Planner,
        gate: Supervisor,
        clock: Clock,
        send: Callable[[int, Chunk | None], None],
        record: Callable[[dict], None] = lambda line: None,
    ):
        self.task = config.task
        self.state, self.reason = State.IDLE, "idle: ~/start lets the policy move the arms"
        self.lease: str | None = None  # "lease:epoch"
        self.wants_lease = False  # everything else is there: get one and call `granted` or `refused`
        self.counts = Counts()
        self.arms: ArmsStatus | None = None
        self.chunk: Chunk | None = None  # the last one sent
        self.chunk_t_obs: float | None = None
        self._chunk_before: tuple[Chunk | None, float | None] = None, None  # the one before it
        self._failure, self._failures = "", 0  # of the last request without a chunk, and how many in a row
        self.client, self.planner = client, planner
        self._config, self._embodiment, self._names = config, embodiment, arms
        self._gate, self._clock, self._send, self._record = gate, clock, send, record
        self._history = FrameHistory(embodiment.history_seconds)
        self._wrong_clock_s: float | None = None
        self._paired_s = -np.inf  # newest picture that had its o_{t-1}
        self._joints: dict[str, deque[tuple[float, np.ndarray]]] = {name: deque() for name in arms}
        self._joints_kept_s = config.deadline_s + 1e-3 * config.inject_latency_ms + 1.0  # an answer may take
        self._gripper = np.array([d.kind == "gripper" for d in embodiment.dimensions])
        self._hand = hands(embodiment, arms, gate.limits.size // len(arms))
        if not embodiment.stateful and gate.geometry is None:
            raise ValueError("end-effector steps need the arms' kinematics: a gate with a workcell")
        self._arms_heard = -np.inf  # wall
        self._leased_at = 0.0
        self._open: dict[int, _Request] = {}  # sent to the server, no outcome yet
        self._arrived: deque[tuple[float, protocol.Chunk]] = deque()  # (release at, chunk)
        self._unacknowledged: dict[int, float] = {}  # seq -> sent to the arms at
        self._rejection = ""  # the last one that was looked at
        self.commanded = -1  # seq of the last chunk that went to the arms
        # The same noise every time: a chunk is then a function of what the policy sees alone and follows on
        # from the last one. With fresh noise successive chunks differ by the whole spread of its answers.
        self.seed = config.seed  # of the next request

    @property
    def active(self) -> bool:
        """Motion is asked for."""
        return self.state in (State.WAITING, State.RUNNING)

    # --- Inputs

    def on_picture(self, rgb: np.ndarray, stamp_s: float) -> None:
        """uint8 [h, w, 3] captured at `stamp_s`; kept, not copied."""
        now = self._clock.now()
        off_s = now - stamp_s
        self._wrong_clock_s = None if -AHEAD_S <= off_s <= WRONG_CLOCK_S else off_s
        if self._wrong_clock_s is None:
            self._history.add(rgb, stamp_s)
            self._prefetch(rgb, now)

    def on_joints(self, arm: str, stamp_s: float, positions: np.ndarray) -> None:
        """Measured positions of one arm: its joints, rad, and its hand's opening if the policy moves it."""
        states = self._joints[arm]
        states.append((stamp_s, positions))
        while states[0][0] < stamp_s - self._joints_kept_s:
            states.popleft()

    def on_arms(self, status: ArmsStatus) -> None:
        self.arms, self._arms_heard = status, time.monotonic()

    # --- Control

    def start(self) -> None:
        """Ask for motion. `state` shows what comes of it."""
        if not self.active:
            self.counts.in_a_row = self._failures = 0
            self.chunk = None
            self.planner.restart()
            self._set(State.WAITING, "starting")

    def stop(self, reason: str = "stopped: ~/start goes on", state: State = State.IDLE) -> None:
        """Let the arms go: they decelerate at once."""
        self._drop_requests(reason)
        if self.lease is not None and not self._latched():
            self._send(self.commanded + 1, None)  # this lease's last word: its numbers end here
        self.lease, self.wants_lease = None, False
        self._unacknowledged.clear()
        self._set(state, reason)

    def granted(self, lease: str) -> None:
        """The arms gave us `lease` ("lease:epoch")."""
        self.lease, self.wants_lease, self._leased_at = lease, False, self._clock.now()
        self._unacknowledged.clear()

    def refused(self, why: str) -> None:
        """The arms gave no lease."""
        self.stop(f"the arms gave no lease: {why}", State.STOPPED)

    # --- The loop

    def tick(self) -> None:
        """Call often (100 Hz): takes in what the server sent, asks again, commands the arms."""
        now = self._clock.now()
        self._collect(now)
        if not self.active:
            return
        problem = self.problem()
        if problem is None and self.lease is not None:
            problem = self._acknowledged(now)
        if problem is not None:
            self._hold_back(problem)
        elif self.lease is None:
            self.wants_lease = True
            self._set(State.WAITING, "asking the arms for the lease")
        else:
            if self.state is not State.RUNNING:
                self.planner.resume()
            self._set(State.RUNNING, self._running())
            self._deliver(now)
            if self.active:
                self._ask(now)

    @property
    def failing(self) -> bool:
        """Requests go out and come back without a chunk, again and again."""
        return self.state is State.RUNNING and self._failures > 1

    def _running(self) -> str:
        if self._failures < 2:
            return "running"
        return f"no chunk from the server for {self._failures} requests: {self._failure}"

    def problem(self) -> Problem | None:
        """What keeps the policy from being asked now."""
        return (
            self._arms_problem() or self._task_problem() or self._server_problem() or self._senses_problem()
        )

    def _hold_back(self, problem: Problem) -> None:
        self.wants_lease = False
        self._drop_requests(problem.text)  # their pictures are from before the trouble
        if problem.fatal:
            self.stop(problem.text, State.STOPPED)
        else:
            self._set(State.WAITING, problem.text)

    def _drop_requests(self, why: str) -> None:
        for _, answer in self._arrived:
            self._end(answer.seq, "dropped", why, answer)
        self._arrived.clear()
        for seq in self._open:
            self.client.cancel(seq)

    def _arms_problem(self) -> Problem | None:
        if self.arms is None:
            return Problem("no status from the arms: is the arms node up?")
        if time.monotonic() - self._arms_heard > ARMS_SILENT_S:
            return Problem("the arms node has fallen silent", fatal=self.lease is not None)
        if self._latched():
            text = f"arms {self.arms.state}: {self.arms.reason}; /arms/recover, then ~/start"
            return Problem(text, fatal=True)
        if self.arms.state == "HOMING":
            text = "the arms are homing"
            return Problem(f"{text}: ~/start goes on from there", True) if self.chunk else Problem(text)
        return None

    def _task_problem(self) -> Problem | None:
        if not self.task.strip():
            return Problem("no task: ros2 param set /policy task 'stack the cups'", fatal=True)
        return None

    def _server_problem(self) -> Problem | None:
        try:
            self.client.hello(0.0)
        except Mismatch as mismatch:
            return Problem(str(mismatch), fatal=True)
        except ServerUnavailable as error:
            return Problem(f"no policy server: {error}")
        return None

    def _senses_problem(self) -> Problem | None:
        now, newest_s = self._clock.now(), self._history.newest_s
        if self._wrong_clock_s is not None:
            return Problem(
                f"pictures are stamped {self._wrong_clock_s:.1f} s away from this clock: run the camera node "
                "on this machine, with the same robot file"
            )
        if newest_s is None:
            return Problem("no picture from the camera yet")
        if now - newest_s > self._config.camera_timeout_s:
            return Problem(f"camera lost: no picture for {self._config.camera_timeout_s:g} s")
        if self._history.pair() is not None:
            self._paired_s = newest_s
        elif newest_s - self._paired_s > self._config.camera_timeout_s:  # one dropped picture only delays
            seconds = self._embodiment.history_seconds
            return Problem(f"no picture from {seconds:.3f} s before the newest one: is the camera too slow?")
        for arm, states in self._joints.items():
            if not states or now - states[-1][0] > JOINTS_OLD_S:
                return Problem(f"no joint states from the {arm} arm")
        return None

    def _acknowledged(self, now: float) -> Problem | None:
        """What the arms say about the chunks they were sent."""
        arms = self.arms
        if arms.time_s > self._leased_at and arms.lease != self.lease:
            self.lease = None  # it ran out while nothing was sent, or the arms node was started again
            return Problem("the lease has ended; asking for another")
        for seq in [seq for seq in self._unacknowledged if seq <= arms.accepted_seq]:
            del self._unacknowledged[seq]
            self.counts.in_a_row = 0
        if arms.rejected != self._rejection:
            self._rejection = arms.rejected
            seq, _, text = arms.rejected.partition(" ")
            if seq.isdigit() and int(seq) in self._unacknowledged:
                return self._chunk_refused(int(seq), text)
        for seq, sent in self._unacknowledged.items():
            if now - sent > ACKNOWLEDGE_S:
                return self._chunk_refused(seq, "lost the arms did not answer")
        return None

    def _chunk_refused(self, seq: int, text: str) -> Problem | None:
        self._unacknowledged.pop(seq, None)
        if seq == self.commanded:  # what runs is the one before
            self.chunk, self.chunk_t_obs = self._chunk_before
        self._count_refusal()
        if self._append_mode:  # asked for what follows it
            for asked in self._open:
                self.client.cancel(asked)
        code, _, words = text.partition(" ")
        if code in ("lease", "epoch"):
            self.lease = None
        if code not in (*PASSING, "holding", "lease", "epoch", "lost") or self.counts.in_a_row >= GIVE_UP:
            return Problem(f"the arms refuse chunk {seq}: {code}: {words}", fatal=True)
        return None

    def _count_refusal(self, lasting: bool = True) -> None:
        """Ask again at once, and with other noise: the same would answer the same to what hardly changed."""
        self.counts.refused += 1
        self.counts.in_a_row += lasting
        self.seed += 1
        self.planner.refused()

    def _latched(self) -> bool:
        return self.arms is not None and self.arms.state in LATCHED

    # --- Server

    def _collect(self, now: float) -> None:
        """Outcomes from the server; chunks wait for the injected latency."""
        for outcome in self.client.poll():
            if outcome.seq not in self._open:
                continue
            if isinstance(outcome, protocol.Chunk) and self.active:
                self._failures = 0
                self._arrived.append((now + 1e-3 * self._config.inject_latency_ms, outcome))
            elif isinstance(outcome, protocol.Chunk):
                self._end(outcome.seq, "dropped", "not running", outcome)
            else:
                self._failed(outcome, now)

    def _failed(self, error: protocol.Error, now: float) -> None:
        self.planner.failed(error.seq, now)
        self._end(error.seq, error.code, error.message)
        if error.code == "cancelled":
            return
        self.counts.failures += 1
        if not self.active:
            return
        self._failures += 1
        self._failure = f"{error.code}: {error.message}"
        self.counts.in_a_row += error.code in ("inference_failed", "non_finite", "malformed")
        if error.code in HOPELESS or self.counts.in_a_row >= GIVE_UP:
            self.stop(f"the policy server refuses: {error.code}: {error.message}", State.STOPPED)

    def _deliver(self, now: float) -> None:
        """Chunks whose time has come, checked, to the arms."""
        while self._arrived and self._arrived[0][0] <= now and self.active:
            _, answer = self._arrived.popleft()
            timing = self.planner.received(answer.seq, now)
            if timing is None:
                self._end(answer.seq, "late", "nobody waits for it any more", answer)
                continue
            try:
                chunk = self._checked(answer, timing, now)
            except Rejected as error:
                self._end(answer.seq, "refused", f"{error.code}: {error}", answer)
                self._count_refusal(lasting=error.code != "jump")  # before long the arms rest
                if self.counts.in_a_row >= GIVE_UP:
                    self.stop(f"{GIVE_UP} chunks in a row were unsafe; the last: {error}", State.STOPPED)
                continue
            self._send(answer.seq, chunk)
            self.commanded = answer.seq
            self._unacknowledged[answer.seq] = now
            self._chunk_before = self.chunk, self.chunk_t_obs
            self.chunk, self.chunk_t_obs = chunk, answer.t_obs
            self.counts.chunks += 1
            self._end(answer.seq, "sent", "", answer, t0=chunk.t0, rate_hz=chunk.rate_hz, actions=len(chunk))

    def _checked(self, answer: protocol.Chunk, timing: Timing, now: float) -> Chunk:
        """The chunk as it may be sent. Raises Rejected."""
        actions = np.array(answer.actions[: timing.count], float)
        # the policy's range has a margin, an opening has none
        actions[:, self._gripper] = np.clip(actions[:, self._gripper], 0.0, 1.0)
        chunk = self._as_joints(answer, timing, actions, now)
        if (least := self._config.gripper_sustained_actions) > 1:
            chunk = chunk.sustained(least, self._openings_at(max(now, timing.t0)))
        try:
            self._gate.reset(self._state_at(now)[~self._hand], now)
        except ValueError as error:
            raise Rejected("start", str(error)) from error
        verdict = self._gate.check_chunk(chunk)
        if verdict.action != "pass":
            raise Rejected(verdict.code, verdict.reason)
        self._check_join(chunk, now)
        return chunk

    def _openings_at(self, t: float) -> np.ndarray | None:
        """Openings [G] the chunk sent last asks for at `t`; None before the first."""
        return None if self.chunk is None else self.chunk.grippers[max(self.chunk.index(t), 0)]

    def _as_joints(self, answer: protocol.Chunk, timing: Timing, actions: np.ndarray, now: float) -> Chunk:
        """The chunk of joints that `actions` [H, D] mean. Raises Rejected."""
        given = answer.seq, timing.t0, timing.rate_hz, actions, self._embodiment
        if self._embodiment.stateful:
            return Chunk.from_actions(*given)
        if self._appends(now):  # steps go on from where the chunk that runs will be then
            start = _position(self.chunk, timing.t0)
        else:
            start = self._state_at(answer.t_obs)[~self._hand]
        limits = self._gate.limits
        return joint_chunk(*given, self._gate.geometry, start, limits.soft_min, limits.soft_max)

    def _check_join(self, chunk: Chunk, now: float) -> None:
        """Raises Rejected for a chunk further from where the arms are than they would take over: jump where
        they move, start where they rest or align.

        To the arms that is a fault. One stray sample of a policy need not become one: the next answer is
        asked for at once. The first chunk is the arms' to judge.
        """
        if self.chunk is None:
            return
        if chunk.t0 <= now or self.chunk.end <= now:
            there, at = self._state_at(now)[~self._hand], max(now, chunk.t0)
        else:
            there, at = _position(self.chunk, chunk.t0), chunk.t0
        off = float(np.abs(_position(chunk, at) - there).max())
        safety = self._gate.safety
        resting = self.arms.state in ("HOLDING", "IDLE") and self.chunk.end <= now
        slowly = self.arms.state == "ALIGNING" or resting
        limit = JOIN_SHARE * (safety.start.refuse_error_rad if slowly else safety.join.fault_error_rad)
        if off > limit:
            where = "the arms" if slowly else "the running motion"
            raise Rejected(
                "start" if slowly else "jump", f"the chunk is {off:.3f} rad from {where}, limit {limit:.3f}"
            )

    def _prefetch(self, rgb: np.ndarray, now: float) -> None:
        """Send the newest picture ahead if the next request will show it as o_{t-1} and the server gains.

        The request goes through the same `fit` and JPEG encoder, so the server sees the same pixels again.
        """
        metadata, history_s = self.client.metadata, self._embodiment.history_seconds
        if self.state is not State.RUNNING or metadata is None or not metadata.supports_prefetch:
            return
        if self.planner.precedes_request(history_s, now):
            picture = images.fit(images.cut(rgb, metadata.crop), metadata.image_size)
            self.counts.prefetches += self.client.prefetch(picture, self.task)

    def _ask(self, now: float) -> None:
        pair = self._history.pair()
        if pair is None or self._open or self._arrived or not self.planner.should_request(now):
            return
        before, newest, t_obs = pair
        metadata = self.client.metadata
        cuts = (images.cut(picture, metadata.crop) for picture in (before, newest))
        pictures = np.stack([images.fit(picture, metadata.image_size) for picture in cuts])
        try:
            state = self._state_for(t_obs, now).astype(np.float32) if metadata.needs_state else None
        except Rejected:  # of before the joints were heard: the next picture is not
            return
        request = _Request(t_obs, now, self.seed, self.task)
        deadline_ms = 1e3 * self._config.deadline_s
        try:
            seq = self.client.submit(pictures, request.task, t_obs, request.seed, state, deadline_ms)
        except ValueError as error:
            self.stop(f"this cannot be asked: {error}", State.STOPPED)
            return
        self._open[seq] = request
        self.planner.sent(seq, t_obs, now)
        self.counts.requests += 1

    def _state_for(self, t_obs: float, now: float) -> np.ndarray:
        """The state [D] that a chunk relative to it shall start from.

        The one of the frame; with `append`, where a chunk begins where the last one ends, that very place.
        """
        if not self._appends(now):
            return self._state_at(t_obs)
        row = min(self._config.replan_after, len(self.chunk) - 1)
        state = np.empty(len(self._gripper))
        state[~self._gripper], state[self._gripper] = self.chunk.joints[row], self.chunk.grippers[row]
        return state

    def _appends(self, now: float) -> bool:
        """Whether the next chunk begins where the one that runs ends."""
        arms = self.arms
        stopped = arms is not None and arms.state == "HOLDING" and arms.accepted_seq >= self.commanded
        return self._append_mode and self.chunk is not None and self.chunk.end > now and not stopped

    @property
    def _append_mode(self) -> bool:
        return self._config.mode == "asynchronous" and self._config.anchor == "append"

    def _state_at(self, t: float) -> np.ndarray:
        """Measured joints and openings nearest to `t`, arm by arm. Raises Rejected if they are forgotten."""
        oldest = max(self._joints[name][0][0] for name in self._names)
        if t < oldest - JOINTS_OLD_S:
            raise Rejected(
                "stale", f"the picture is {self._clock.now() - t:.1f} s old, joints are not kept so long"
            )
        nearest = (min(self._joints[name], key=lambda item: abs(item[0] - t))[1] for name in self._names)
        return np.concatenate(list(nearest))

    def _end(
        self, seq: int, outcome: str, message: str, answer: protocol.Chunk | None = None, **more
    ) -> None:
        request = self._open.pop(seq)
        received = self._clock.now()
        self._record(
            {
                "seq": seq,
                "t_obs": request.t_obs,
                "sent": request.sent,
                "received": received,
                "latency_ms": 1e3 * (received - request.sent) if answer is not None else None,
                "timing": answer.timing.model_dump() if answer is not None else None,
                "outcome": outcome,
                "message": message,
                "task": request.task,
                "seed": request.seed,
                **more,
            }
        )

    def _set(self, state: State, reason: str) -> None:
        self.state, self.reason = state, reason


def hands(embodiment: Embodiment, arms: tuple[str, ...], joints: int) -> np.ndarray:
    """Which of the positions of `arms` with `joints` joints each are a hand's opening: bool."""
    parts = []
    for arm in arms:
        kinds = [embodiment.dimensions[n].kind for n in embodiment.by_arm[arm]]
        parts += [False] * joints + [True] * ("gripper" in kinds)
    return np.array(parts)


def _position(chunk: Chunk, t: float) -> np.ndarray:
    """Joints [J] rad that `chunk` asks for at `t` s, linear between actions."""
    row = min(max((t - chunk.t0) * chunk.rate_hz, 0.0), len(chunk) - 1.0)
    low = min(int(row), len(chunk) - 2)
    return chunk.joints[low] + (row - low) * (chunk.joints[low + 1] - chunk.joints[low])
