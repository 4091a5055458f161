"""The one loop that moves the arms: chunks in, a 200 Hz reference out, and every reaction to trouble.

All arms of the robot are streamed to from one thread on absolute deadlines of the executor clock. The methods
are called from other threads; they leave requests that the loop serves at its next tick, and never touch the
arms themselves (`recover` excepted, which touches only arms that are not streamed to).

Faults latch: both arms decelerate at once, the lease ends, and only `recover` leads back. Running out of
actions does not: the arms come to rest and hold until the next chunk.
"""

import contextlib
import enum
import os
import threading
import time
from collections import deque
from collections.abc import Mapping

import numpy as np

from config.loading import ConfigError
from config.robot import Control
from config.safety import Safety
from config.workcell import Workcell
from vipra_ros.clock import Clock, ClockStopped
from vipra_ros.execution.chunk import Chunk, Rejected
from vipra_ros.execution.home import home_chunk
from vipra_ros.execution.reference import Reference, Sample
from vipra_ros.robot.arm import Arm, ArmFault, ArmState, Hand
from vipra_ros.robot.commands import Lease, Tag
from vipra_ros.robot.counters import Counters
from vipra_ros.robot.hands import Hands
from vipra_ros.robot.runlog import RunLog
from vipra_ros.robot.side import Side
from vipra_ros.safety.limits import JointLimits
from vipra_ros.safety.supervisor import Supervisor, Verdict

# What a commander that still makes sense never sends: stop it, rather than wait for its next idea.
COMMAND_FAULTS = frozenset(
    ("names", "shape", "non_finite", "times", "rate", "gripper", "mismatch", "jump", "position", "velocity")
)


class State(enum.Enum):
    IDLE = "IDLE"  # holding, nobody commands
    ALIGNING = "ALIGNING"  # slowly towards a first chunk
    RUNNING = "RUNNING"
    HOLDING = "HOLDING"  # out of actions, or stopped by the safety gate; the next chunk goes on
    STOPPING = "STOPPING"  # latched stop, still moving
    STOPPED = "STOPPED"  # latched stop, at rest
    FAULT = "FAULT"  # latched
    RECOVERING = "RECOVERING"
    HOMING = "HOMING"


STATES = [s.value for s in State]
_INDEX = {s: i for i, s in enumerate(State)}
_LATCHED = (State.STOPPING, State.STOPPED, State.FAULT, State.RECOVERING)


class ArmsExecutor:
    """Owns every arm of the robot. `start`, then any request; `shutdown` at the end, from any state."""

    def __init__(
        self,
        arms: Mapping[str, Arm],
        grippers: Mapping[str, Hand],
        homes: Mapping[str, np.ndarray],
        clock: Clock,
        control: Control,
        safety: Safety,
        workcell: Workcell | None,
        realtime: bool = False,
        log_minutes: int = 60,
    ):
        """`arms` in embodiment order; `homes` [n] rad by arm; no `workcell`: no geometry checks.

        Raises ConfigError where `safety` is for arms with another number of joints, or a home is beyond it.
        """
        self.names = tuple(arms)
        self._clock, self._control, self._config = clock, control, safety
        self._workcell, self._realtime = workcell, realtime
        self._limits = JointLimits.of(safety, len(arms))
        each, joints = self._limits.size // len(arms), self._limits.size
        for name in arms:
            if len(homes[name]) != each:
                raise ConfigError(
                    f"the safety limits are for arms of {each} joints, {name} has {len(homes[name])}"
                )
        self._sides = [
            Side(name, arm, slice(each * i, each * (i + 1))) for i, (name, arm) in enumerate(arms.items())
        ]
        self._hands = Hands({name: grippers[name] for name in arms if name in grippers}, safety.gripper)
        self._home = np.concatenate([homes[name] for name in arms])
        beyond = (self._home < self._limits.soft_min) | (self._home > self._limits.soft_max)
        if beyond.any():
            k = int(beyond.argmax())
            low, high = self._limits.soft_min[k], self._limits.soft_max[k]
            raise ConfigError(
                f"{self.names[k // each]}: home_rad of joint {k % each + 1} is {self._home[k]:.3f} rad, "
                f"commands stay within {low:.3f} to {high:.3f}"
            )
        self._q, self._dq = np.zeros(joints), np.zeros(joints)  # measured
        self._reference: Reference | None = None
        self._gate: Supervisor | None = None  # its `state` is what was last sent
        self._gripper_action = (-1, -1)
        self._measured_at = 0.0
        self._commanded: tuple[float, np.ndarray, np.ndarray] | None = None  # executor time, q, dq
        self._sent_at = -np.inf  # when the gate last let something through
        self._new_holder = False

        self.counters = Counters()
        self.log = RunLog(joints, log_minutes)
        self.changes = 0  # goes up with every change worth telling at once
        self.phase: tuple[State, str, str] = (State.IDLE, "", "holding, nobody commands")
        self.rejected = ""  # "seq code message" of the last refusal
        self.faults: list[dict] = []
        self.accepted_seq = -1
        self.lease = Lease(control.lease_timeout_s)

        self._inbox: deque[tuple[Tag, Chunk | None]] = deque(maxlen=16)
        self._command_fault: tuple[str, str] | None = None
        self._stop_request = ""
        self._open_request = False
        self._home_request = False
        self._reseed: threading.Event | None = None
        self._resume: threading.Event | None = None
        self._busy = threading.Lock()  # recover
        self._lease_lock = threading.Lock()
        self._closing = threading.Event()
        self._closed_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="reference", daemon=True)

    # --- requests, from any thread
    # -------------------------------------------------------------------------------

    def start(self) -> None:
        """Take control of every arm, hold, and start the loop.

        An arm in a reflex or user stop is left alone: the executor begins in FAULT and `recover` leads on.
        Raises ArmFault when an arm cannot be used at all; none is left under control then.
        """
        faults = []
        for side in self._sides:
            try:
                self._q[side.rows] = side.arm.start()
            except ArmFault as fault:
                state = side.arm.read()
                if state is None or state.fault is None:
                    self.shutdown()
                    raise
                self._q[side.rows] = state.q
                faults.append((side, fault))
        now = self._clock.now()
        self._reference = Reference(self._config, self._limits, self._q, now)
        try:
            self._gate = Supervisor(self._config, self.names, self._workcell, self._q, now)
        except ValueError as error:
            self.shutdown()
            raise ArmFault("start", str(error)) from error
        for side, fault in faults:
            self._arm_fault(side, fault)
        self._hands.start()
        self._thread.start()

    def acquire_lease(self) -> str:
        """`lease:epoch` of a new lease. Raises Rejected while latched, busy, or another holds it."""
        with self._lease_lock:
            if self.state in _LATCHED:
                raise Rejected("latched", f"{self.state.value}: {self.reason}; recover first")
            if self.state is State.HOMING:
                raise Rejected("busy", "the arms are homing")
            text = self.lease.acquire(self._clock.now())
            self.accepted_seq = -1
            self._new_holder = True
        self.changes += 1
        return text

    def submit(self, tag: Tag, chunk: Chunk | None) -> None:
        """Hand over a complete chunk, or None to let go. What becomes of it shows in `accepted_seq` and
        `rejected`.
        """
        self._inbox.append((tag, chunk))

    def reject(self, tag: Tag | None, error: Rejected) -> None:
        """A command that could not even be read. From the lease's holder that is a fault: it no longer makes
        sense.
        """
        if tag is not None and error.code in COMMAND_FAULTS and self._is_holder(tag):
            self._command_fault = (error.code, f"command {tag.seq}: {error}")
        self._refuse(tag.seq if tag else -1, error)

    def stop(self, reason: str = "stop requested") -> None:
        """Latched stop: decelerate, hold, refuse commands until `recover`."""
        self._stop_request = reason

    def home(self) -> str:
        """Begin to move every arm to its home position. Raises Rejected unless the arms are idle."""
        if self.state not in (State.IDLE, State.HOLDING) or self.lease.held(self._clock.now()):
            raise Rejected("busy", f"home needs idle arms and no commander; state {self.state.value}")
        if any(not side.arm.streaming for side in self._sides):
            raise Rejected("fault", "an arm is not under control; recover first")
        if self._moving():
            raise Rejected("moving", "the arms have not come to rest yet; ask again")
        self._home_request = True
        return "homing; ~/status tells when it is done"

    def open_hands(self) -> str:
        """Open every hand where it is. Raises Rejected while a commander may command them, or latched."""
        if self.state not in (State.IDLE, State.HOLDING) or self.lease.held(self._clock.now()):
            raise Rejected("busy", f"hands open while the arms are idle; state {self.state.value}")
        self._open_request = True
        return "opening the hands"

    def recover(self) -> str:
        """Lead back from a latched stop or fault: clear the arms' errors, void every lease, hold. Blocks for
        seconds.

        Raises Rejected with the reason when that cannot be done (yet).
        """
        if not self._busy.acquire(blocking=False):
            raise Rejected("busy", "a recovery is under way")
        try:
            if self.state not in (State.STOPPED, State.FAULT):
                raise Rejected("state", f"nothing to recover from: {self.state.value}")
            if not self._thread.is_alive():
                raise Rejected("dead", "the reference loop has ended; restart the arms node")
            before, cause = self.state, (self.code, self.reason)
            # An arm behind a broken link is asked again once it is connected.
            speeds = [
                float(np.abs(s.state.dq).max()) for s in self._sides if s.state and not s.arm.link_error
            ]
            if max(speeds, default=0.0) >= self._config.stop.rest_velocity_rad_s:
                raise Rejected(
                    "moving", f"the arms still move at {max(speeds):.3f} rad/s; wait until they rest"
                )
            problem = self._gate.check_start(self._q)
            if problem:
                raise Rejected("limits", problem)
            self._set(State.RECOVERING, "", "recovering")
            try:
                self._recover()
            except ArmFault as fault:
                if self.state is State.RECOVERING:
                    self._set(before, *cause)
                raise Rejected(fault.code, str(fault)) from fault
            return "recovered; acquire a new lease"
        finally:
            self._busy.release()

    def _recover(self) -> None:
        down = [side for side in self._sides if not side.arm.streaming]
        for side in down:
            side.arm.recover()
            speed = float(np.abs(side.arm.read().dq).max())
            if speed >= self._config.stop.rest_velocity_rad_s:
                raise ArmFault(
                    "moving", f"{side.name}: still moves at {speed:.3f} rad/s; wait until it rests"
                )
        with self._lease_lock:
            self.lease.next_epoch()
        self._inbox.clear()
        self._command_fault = None
        reseeded = self._reseed = threading.Event()
        if not reseeded.wait(2.0):
            raise ArmFault("clock", "the reference loop does not run: is the simulator alive?")
        for side in down:
            side.arm.start()
            side.alive(self._clock.now())
        self._hands.reset()
        resumed = self._resume = threading.Event()
        if not resumed.wait(2.0) or self.state in _LATCHED:
            raise ArmFault(self.code or "clock", self.reason)

    def shutdown(self, timeout_s: float = 1.2) -> bool:
        """Decelerate, stop every motion, end the loop and the hands' threads. Bounded by about 3 s, raises
        nothing.

        False when a thread is still stuck in a call of libfranka; the process should then end without
        ceremony.
        """
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        enders = [threading.Thread(target=side.arm.shutdown, daemon=True) for side in self._sides]
        enders += self._hands.enders(0.8)
        for ender in enders:
            ender.start()
        deadline = time.monotonic() + 1.5
        for ender in enders:
            ender.join(max(0.0, deadline - time.monotonic()))
        return not (self._thread.is_alive() or any(e.is_alive() for e in enders))

    # --- what others may look at
    # ---------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self.phase[0]

    @property
    def code(self) -> str:
        """One word for the reason, "" when there is nothing to explain."""
        return self.phase[1]

    @property
    def reason(self) -> str:
        return self.phase[2]

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    def measured(self) -> tuple[float, dict[str, tuple[ArmState, float | None]]]:
        """Executor time of the last reading; state and hand opening by arm."""
        states = {s.name: (s.state, self._hands.measured(s.name)) for s in self._sides if s.state}
        return self._measured_at, states

    def commanded(self) -> tuple[float, dict[str, tuple[np.ndarray, np.ndarray, float | None]]] | None:
        """What the arms were last told, by arm: q, dq [n] and the hand's opening, and when, executor time.

        The opening is the action's, before hysteresis; until a first action it is the measured one. None for
        an arm without a hand; all is None before the first tick.
        """
        if self._commanded is None:
            return None
        now, q, dq = self._commanded
        return now, {s.name: (q[s.rows], dq[s.rows], self._hands.told(s.name)) for s in self._sides}

    def gripper_faults(self) -> dict[str, str]:
        """What is wrong with the hands, by arm; empty if nothing."""
        return self._hands.faults

    def gripper_report(self) -> dict[str, dict]:
        """Opening, outcome of the last grasp, running command and fault of every hand, by arm."""
        return self._hands.report()

    # --- the loop
    # ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._realtime:
            with contextlib.suppress(PermissionError):  # the real-time kernel's user limits decide
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(60))
        period = 1.0 / self._control.reference_rate_hz
        last = self._clock.now()
        deadline = last + period
        self._reseed_at(self._q, last)
        for side in self._sides:
            side.alive(last)
        while True:
            try:
                self._clock.sleep_until(deadline)
            except ClockStopped as error:
                self._fault("clock", str(error))
                if self._closing.is_set():
                    return
                last, deadline = self._clock.now(), self._clock.now() + period
                continue
            now = self._clock.now()
            try:
                self._tick(now, now - deadline, now - last)
            except (
                Exception
            ) as error:  # a defect of ours must not leave arms moving: the dead-man would, later
                self._fault("internal", f"{type(error).__name__}: {error}")
                if self._reference is not None and self._closing.is_set():
                    return
            if self._closing.is_set() and self._may_close(now):
                return
            last = now
            deadline += period
            if deadline <= now:  # skipped deadlines are late ticks that never ran
                skipped = int((now - deadline) / period) + 1
                self.counters.late_ticks += skipped
                deadline += skipped * period

    def _tick(self, now: float, late: float, gap: float) -> None:
        self.counters.tick(late)
        stalled = gap > self._config.watchdogs.tick_gap_s
        self._measure(now, stalled)
        if stalled:
            self._after_stall(now, gap)
        self._serve(now)

        sample = self._reference.sample(now)
        verdict = self._gate.check(now, sample.q, sample.dq, self._expected())
        self._sent_at = now
        self.counters.intervene(verdict.interventions)
        if verdict.action != "pass":
            self._on_verdict(now, verdict)
        q, dq = verdict.q, verdict.dq
        skew = self._send(q, dq, now, stalled)
        self._commanded = (now, q, dq)
        self._advance(now, sample)
        self._move_grippers(sample)
        self._account(sample, q)
        self.log.add(
            now,
            late,
            q,
            dq,
            self._q,
            self._dq,
            _INDEX[self.state],
            sample.seq,
            sample.index,
            sample.starved,
            skew,
        )

    def _measure(self, now: float, stalled: bool) -> None:
        """Read every arm; a reflex, a lost connection or a frozen state is a fault."""
        frozen_s, rest = self._config.watchdogs.state_time_s, self._config.stop.rest_velocity_rad_s
        self._measured_at = now
        for side in self._sides:
            fault = side.measure(now, stalled, frozen_s, rest)
            self._q[side.rows], self._dq[side.rows] = side.state.q, side.state.dq
            if fault is not None:
                self._arm_fault(side, fault)

    def _expected(self) -> np.ndarray:
        """Measured positions [J] for the gate; an arm that is out of control is no evidence against the
        reference.
        """
        measured = self._q
        for side in self._sides:
            if not side.arm.streaming:
                measured = measured.copy() if measured is self._q else measured
                measured[side.rows] = self._gate.state[0][side.rows]
        return measured

    def _after_stall(self, now: float, gap: float) -> None:
        """The loop did not run for a while: never jump to where the reference would be now, brake from where
        we are.
        """
        moving = float(np.abs(self._dq).max()) > self._config.stop.rest_velocity_rad_s
        self.log.events.append((now, "stall", f"{1000 * gap:.0f} ms"))
        dq = self._dq if moving else np.zeros_like(self._dq)
        self._reseed_at(self._q, now, dq)
        self._brake(now)
        self._inbox.clear()
        if self.state in (State.RUNNING, State.ALIGNING, State.HOMING) or (
            moving and self.state is State.IDLE
        ):
            self._set(State.HOLDING, "stall", f"the reference loop stood still for {1000 * gap:.0f} ms")

    def _reseed_at(self, q: np.ndarray, now: float, dq: np.ndarray | None = None) -> None:
        """Reference and gate forget everything and go on from `q` [J]. Raises ValueError outside the hard
        limits.
        """
        self._gate.reset(q, now, dq)
        self._sent_at = now
        self._reference.reseed(q, now)

    def _serve(self, now: float) -> None:
        """Requests of other threads."""
        if self._command_fault is not None:
            (code, reason), self._command_fault = self._command_fault, None
            self._fault(code, reason)
        if self._closing.is_set() and self._closed_at is None:
            self._closed_at = now
            self._stop_request = "shutting down"
        if self._resume is not None:  # by the loop, so that no fault of this moment is overwritten
            if self.state is State.RECOVERING:
                self._set(State.IDLE, "", "recovered, holding")
            resumed, self._resume = self._resume, None
            resumed.set()
        if self._stop_request and self.state is not State.RECOVERING:
            reason, self._stop_request = self._stop_request, ""
            if self.state not in _LATCHED:
                self._brake(now)
                self._drop_commands()
                self._set(State.STOPPING, "stop", reason)
        if self._reseed is not None:
            # Arms under control go on from their own reference, the others from where they are.
            q = self._q.copy()
            for side in self._sides:
                if side.arm.streaming:
                    q[side.rows] = self._gate.state[0][side.rows]
            self._reseed_at(q, now)
            reseeded, self._reseed = self._reseed, None
            reseeded.set()
        with self._lease_lock:
            if self.lease.holder and not self.lease.held(now):
                self.lease.release()
                self.changes += 1
        if self._open_request:
            self._open_request = False
            if self.state in (State.IDLE, State.HOLDING) and not self.lease.held(now):
                self._hands.open()
        if self._home_request:
            self._home_request = False
            self._begin_home(now)
        while self._inbox:
            tag, chunk = self._inbox.popleft()
            try:
                self._accept(tag, chunk, now)
            except Rejected as error:
                self._refuse(tag.seq, error)
                if error.code in COMMAND_FAULTS and self._is_holder(tag):
                    self._fault(error.code, f"command {tag.seq}: {error}")

    def _accept(self, tag: Tag, chunk: Chunk | None, now: float) -> None:
        if self.state in _LATCHED or self.state is State.HOMING:
            raise Rejected("latched", f"{self.state.value}: {self.reason}")
        if self._gate.held:
            raise Rejected("holding", self._gate.held)
        with self._lease_lock:
            self.lease.check(tag, now)
            if chunk is None:
                self.lease.release()
            else:
                if self._new_holder:  # counts from its own number, and aligns
                    self._reference.start_over()
                    self._new_holder = False
                join = self._reference.add(chunk, now)
                self.lease.feed(tag.seq, max(now, chunk.end))
        if chunk is None:
            self._brake(now)
            self._hands.forget()
            self._set(State.HOLDING, "let_go", "the commander let go")
            return
        self.accepted_seq = tag.seq
        self.log.chunks.append((tag.seq, chunk.t0, chunk.rate_hz, now, join.size_rad, join.aligning))
        if join.aligning and self.state is not State.ALIGNING:
            self._set(State.ALIGNING, "", f"aligning, {join.size_rad:.3f} rad to go")

    def _begin_home(self, now: float) -> None:
        if self.state not in (State.IDLE, State.HOLDING) or self._moving() or self.lease.held(now):
            return  # since it was granted
        start = self._gate.state[0]
        self._reseed_at(start, now)
        chunk = home_chunk(start, self._home, now)
        self._reference.add(chunk, now)
        self._set(State.HOMING, "", f"homing, {chunk.end - now:.1f} s")

    def _on_verdict(self, now: float, verdict: Verdict) -> None:
        """The gate brakes by itself and lets nothing pass until it is reset."""
        if verdict.action == "fault":
            if self.state is not State.FAULT:
                self._fault(verdict.code, verdict.reason)
        elif self.state not in _LATCHED:
            if (self.state, self.reason) != (State.HOLDING, verdict.reason):
                self._brake(now)
                self._set(State.HOLDING, verdict.code, verdict.reason)
            if not verdict.dq.any() and self._slow():
                # Off its reference, an arm pushes against something: let go of the distance.
                self._reseed_at(self._q if verdict.code == "tracking" else verdict.q, now)

    def _send(self, q: np.ndarray, dq: np.ndarray, now: float, fresh: bool) -> float:
        """Give every arm its share; the time between the first and the last one, s."""
        first = None
        for side in self._sides:
            if not side.arm.streaming:
                continue
            try:
                side.arm.set_target(q[side.rows], dq[side.rows], now, fresh)
            except ArmFault as fault:
                self._arm_fault(side, fault)
            applied = time.perf_counter()
            first = applied if first is None else first
        skew = applied - first if first is not None else 0.0
        self.counters.max_skew_s = max(self.counters.max_skew_s, skew)
        return skew

    def _advance(self, now: float, sample: Sample) -> None:
        """State changes that follow from the reference."""
        aligned = self.state is State.ALIGNING and not sample.aligning
        if aligned and sample.starved:
            self._set(State.HOLDING, "starved", "out of actions before the arms were there")
        elif aligned or (
            self.state in (State.IDLE, State.HOLDING) and sample.seq >= 0 and not sample.starved
        ):
            self._set(State.RUNNING, "", "running")
        elif self.state is State.RUNNING and sample.starved and sample.done:
            self._set(State.HOLDING, "starved", "out of actions, waiting for the next chunk")
        elif self.state is State.HOLDING and self.code == "let_go" and sample.done:
            self._set(State.IDLE, "", "holding, nobody commands")
        elif self.state is State.HOMING and sample.done and not self._moving():
            self._reseed_at(self._gate.state[0], now)
            self._set(State.IDLE, "", "at home, holding")
        elif self.state is State.STOPPING and sample.done and self._slow():
            self._set(State.STOPPED, self.code, self.reason)

    def _move_grippers(self, sample: Sample) -> None:
        """Once per action: the opening of every hand through its hysteresis into its mailbox."""
        action = (sample.seq, sample.index)
        if sample.gripper is None or self.state is not State.RUNNING or action == self._gripper_action:
            return
        self._gripper_action = action
        self._hands.move(sample.gripper)

    def _account(self, sample: Sample, q: np.ndarray) -> None:
        if sample.starved and self.state in (State.RUNNING, State.HOLDING) and self.lease.holder:
            self.counters.starved_ticks += 1
        if self.state in (State.RUNNING, State.ALIGNING, State.HOMING):
            self.counters.track(q - self._q)

    # --- reactions
    # -----------------------------------------------------------------------------------------------

    def _arm_fault(self, side: Side, fault: ArmFault) -> None:
        side.arm.abort()
        self._fault(fault.code, str(fault), side.name)

    def _fault(self, code: str, reason: str, arm: str = "") -> None:
        """Latch: decelerate every arm that can, void the lease. The first cause stays the reason."""
        now = self._clock.now()
        if self.state is State.FAULT and self.faults[-1]["reason"] == reason:
            return
        self.faults = [*self.faults[-19:], {"t": round(now, 3), "code": code, "arm": arm, "reason": reason}]
        self.log.events.append((now, "fault", f"{code}: {reason}"))
        if self.state is State.FAULT:
            self.changes += 1
            return
        self._brake(now)
        self._drop_commands()
        self._set(State.FAULT, code, reason)

    def _brake(self, now: float) -> None:
        """Decelerate from what was last sent, and from when it was sent, then hold."""
        since = max(self._sent_at, now - 2.0 / self._control.reference_rate_hz)
        self._reference.stop(min(since, now), state=self._gate.state)

    def _drop_commands(self) -> None:
        self._inbox.clear()
        self._hands.forget()
        with self._lease_lock:
            self.lease.release()

    def _refuse(self, seq: int, error: Rejected) -> None:
        self.rejected = f"{seq} {error.code} {error}"
        self.log.events.append((self._clock.now(), "rejected", self.rejected))
        self.changes += 1

    def _is_holder(self, tag: Tag) -> bool:
        return bool(self.lease.holder) and (tag.lease, tag.epoch) == (self.lease.holder, self.lease.epoch)

    def _moving(self) -> bool:
        """Whether the arms move, or are told to."""
        return bool(self._gate.state[1].any()) or not self._slow()

    def _slow(self) -> bool:
        return float(np.abs(self._dq).max()) < self._config.stop.rest_velocity_rad_s

    def _may_close(self, now: float) -> bool:
        done = self._reference.sample(now).done and self._slow()
        return done or now - (self._closed_at or now) > 1.0 or not any(s.arm.streaming for s in self._sides)

    def _set(self, state: State, code: str, reason: str) -> None:
        if state is not self.state or reason != self.reason:
            self.log.events.append((self._clock.now(), "state", f"{state.value}: {reason}"))
        self.phase = (state, code, reason)  # at once: other threads read it
        self.changes += 1
