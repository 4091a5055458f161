"""Chunks -> one smooth reference for all arms: position, velocity and acceleration at any time.

Between actions runs the natural cubic spline through them (twice continuously differentiable, so jerk is
bounded); a new chunk takes over by adding its difference to the running reference as a decaying quintic that
matches position, velocity and acceleration; whatever comes last ends in a jerk-limited deceleration, so an
empty queue is a smooth stop.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from ruckig import ControlInterface, InputParameter, Result, Ruckig, Synchronization, Trajectory

from config.safety import Safety
from vipra_ros.execution.chunk import Chunk, Rejected
from vipra_ros.safety.limits import JointLimits

State = tuple[np.ndarray, np.ndarray, np.ndarray]  # q [J] rad, dq [J] rad/s, ddq [J] rad/s2


@dataclass(frozen=True)
class JoinInfo:
    """How a chunk took over."""

    seq: int
    at: float  # s, when it takes over
    size_rad: float  # largest |running reference - chunk| over the joints
    joint: int  # which joint that is, 0..J-1
    duration_s: float  # of the blend, or of the alignment
    first_index: int  # first action that is executed whole
    aligning: bool  # true: slow alignment first, then the join
    smoothed_rad: float  # how far actions were moved to keep within acceleration limits


@dataclass(frozen=True)
class Sample:
    """The reference at one tick."""

    q: np.ndarray  # [J] rad
    dq: np.ndarray  # [J] rad/s
    ddq: np.ndarray  # [J] rad/s2
    gripper: np.ndarray | None  # [G] opening of the latest due action; None before the first
    seq: int  # chunk whose action is due, -1: none
    index: int  # which action that is, -1: none
    starved: bool  # a chunk ran out and no other has come
    done: bool  # at rest with nothing left to do
    aligning: bool  # moving slowly towards the first chunk


class Reference:
    """The running reference. Times must not go backwards. Not thread-safe."""

    def __init__(self, safety: Safety, limits: JointLimits, q0: np.ndarray, t0: float):
        """At rest at `q0` [J] rad; the first chunk is joined with alignment."""
        self._safety, self._limits = safety, limits
        self._gripper: np.ndarray | None = None
        self.reseed(q0, t0)

    def reseed(self, q: np.ndarray, t: float) -> None:
        """Drop everything and rest at `q` [J] rad; the next chunk may have any seq, slow alignment first."""
        q = np.array(q, dtype=float)
        if q.shape != (self._limits.size,) or not np.isfinite(q).all():
            raise ValueError(f"reseed needs {self._limits.size} finite joint positions, got {q}")
        self._pieces = [_Piece(t, _Rest(q))]
        self._target: _Piece | None = None  # what alignment moves towards
        self._due: Chunk | None = (
            None  # the chunk whose action is due; a join begins before its chunk's first one
        )
        self._fresh = True
        self._seq = -1

    def start_over(self) -> None:
        """Another commander: its first chunk may have any seq and is aligned to slowly. Motion goes on till
        then.
        """
        self._fresh, self._seq = True, -1

    @property
    def end_time(self) -> float:
        """When the last accepted chunk stops being due, s; -inf: none."""
        chunk = (self._target or self._pieces[-1]).chunk
        return chunk.end if chunk else -math.inf

    @property
    def seq(self) -> int:
        """Last accepted chunk since the last reseed, -1: none."""
        return self._seq

    def at_rest(self, t: float) -> bool:
        """True when every joint's reference velocity is below the rest velocity."""
        return bool(np.abs(self._evaluate(t)[1]).max() < self._safety.stop.rest_velocity_rad_s)

    def add(self, chunk: Chunk, now: float) -> JoinInfo:
        """Let `chunk` take over: now, or one period before its first action where that lies in the future.

        Raises Rejected: shape; stale (seq not above the last); expired (all of it past); future (t0 too far
        ahead); position, velocity (beyond hard limits); rough (cannot be followed smoothly); jump (further
        from the running reference than `join.fault_error_rad`: hold); start (first chunk, further than
        `start.refuse_error_rad`). A chunk for arms that rest, out of actions, is a first one if it is that
        far: a policy that lost its way may find it again, slowly.
        """
        join, start = self._safety.join, self._safety.start
        if chunk.joints.shape[1] != self._limits.size:
            raise Rejected(
                "shape", f"{chunk.joints.shape[1]} joints in the chunk, {self._limits.size} on the robot"
            )
        if chunk.seq <= self._seq:
            raise Rejected("stale", f"seq {chunk.seq} is not newer than {self._seq}")
        if chunk.end <= now:
            raise Rejected("expired", f"ended {now - chunk.end:.3f} s ago")
        if chunk.t0 - now > self._safety.chunk_lead_s:
            raise Rejected(
                "future", f"begins {chunk.t0 - now:.3f} s ahead, limit {self._safety.chunk_lead_s} s"
            )

        broken = self._limits.broken_by(chunk.joints, chunk.rate_hz)
        if broken:
            code, row, joint, text = broken
            raise Rejected(code, f"action {row}: joint {joint + 1} of {self._limits.size} {text}")

        at = max(now, chunk.t0 - 1.0 / chunk.rate_hz)
        curve, smoothed = self._spline(chunk)
        if smoothed > join.fault_error_rad:
            text = f"keeping its acceleration within limits would move actions by {smoothed:.3f} rad"
            raise Rejected("rough", f"{text}, limit {join.fault_error_rad} rad")
        running = self._evaluate(at)
        error = np.abs(running[0] - curve(at)[0])
        joint = int(error.argmax())
        size = float(error[joint])
        first = max(0, math.ceil((at - chunk.t0) * chunk.rate_hz - 1e-6))
        text = f"joint {joint + 1} of {len(error)} is {size:.3f} rad from the chunk"
        lost = size > join.fault_error_rad and self._out_of_actions(now) and not running[1].any()
        if self._fresh or lost:
            if size > start.refuse_error_rad:
                raise Rejected(
                    "start", f"{text}, start limit {start.refuse_error_rad} rad: move closer first"
                )
            if size >= start.aligned_error_rad:
                duration = self._align(_Piece(at, curve, chunk), now)
                self._fresh, self._seq = True, chunk.seq
                return JoinInfo(chunk.seq, now, size, joint, duration, first, True, smoothed)
        elif size > join.fault_error_rad:
            raise Rejected("jump", f"{text}, limit {join.fault_error_rad} rad")
        blend = self._join(_Piece(at, curve, chunk), running)
        self._seq = chunk.seq
        return JoinInfo(chunk.seq, at, size, joint, blend.duration, first, False, smoothed)

    def sample(self, t: float) -> Sample:
        """The reference at `t`."""
        while len(self._pieces) > 1 and self._pieces[1].start <= t:
            del self._pieces[0]
        state = self._evaluate(t)
        if self._target is not None:
            goal = self._target.curve(max(t, self._target.start))[0]
            if np.abs(state[0] - goal).max() < self._safety.start.aligned_error_rad:
                target = self._target
                at = max(t, target.start)
                self._join(_Piece(at, target.curve, target.chunk), self._evaluate(at))
                while len(self._pieces) > 1 and self._pieces[1].start <= t:
                    del self._pieces[0]
            elif t >= self._target.chunk.end:  # its commander has fallen silent
                chunk = self._target.chunk
                self.stop(t, state=state)
                self._pieces[0].chunk = chunk
        piece = self._pieces[0]
        chunk = piece.chunk
        if chunk and chunk.index(t) >= 0:
            self._due = chunk
        due = self._due
        if due and due.grippers.shape[1]:
            self._gripper = due.grippers[due.index(t)]
        over = self._out_of_actions(t)
        return Sample(
            *state,
            gripper=self._gripper,
            seq=due.seq if due else -1,
            index=due.index(t) if due else -1,
            starved=bool(over and chunk),
            done=bool(over and not state[1].any()),
            aligning=self._target is not None,
        )

    def stop(self, t: float, deceleration: float | None = None, state: State | None = None) -> float:
        """Decelerate from now on, jerk-limited, then hold; drop all chunks. Returns how long it takes, s.

        deceleration: rad/s2, default `stop.deceleration_rad_s2`. state: begin here instead of at the
        reference, for instance at what the safety gate last let through.
        """
        state = self._evaluate(t) if state is None else state
        curve = self._decelerate(t, state, deceleration or self._safety.stop.deceleration_rad_s2)
        self._pieces, self._target, self._due = [_Piece(t, curve)], None, None
        return curve.duration

    def _out_of_actions(self, t: float) -> bool:
        """Nothing is due at `t` or after it."""
        chunk = self._pieces[0].chunk
        return len(self._pieces) == 1 and self._target is None and (chunk is None or t >= chunk.end - 1e-9)

    def _evaluate(self, t: float) -> State:
        piece = self._pieces[0]
        for later in self._pieces[1:]:
            if later.start > t:
                break
            piece = later
        return piece(t)

    def _spline(self, chunk: Chunk) -> tuple["_Spline", float]:
        """The chunk's curve, and how far (rad) actions were moved to keep within acceleration limits."""
        h, n = 1.0 / chunk.rate_hz, len(chunk)
        limit = self._safety.join.chunk_share * self._limits.acceleration * h * h
        actions = chunk.joints
        rough = _roughness(actions) > limit
        if rough.any():
            actions = actions.copy()
            for smoother in _smoothers(n):
                actions[:, rough] = smoother @ chunk.joints[:, rough]
                rough = _roughness(actions) > limit
                if not rough.any():
                    break
        spline = _Spline(chunk.t0 - h, h, _extended(actions))
        last = spline.inside(spline.end)
        spline.tail = self._decelerate(spline.end, last, self._safety.stop.deceleration_rad_s2)
        return spline, float(np.abs(actions - chunk.joints).max())

    def _decelerate(self, t: float, state: State, deceleration: float) -> "_Profile":
        request = InputParameter(self._limits.size)
        request.control_interface = ControlInterface.Velocity
        request.target_velocity = np.zeros(self._limits.size)
        request.max_acceleration = np.full(self._limits.size, deceleration)
        request.max_jerk = np.full(self._limits.size, self._safety.stop.jerk_rad_s3)
        return self._plan(t, state, request)

    def _align(self, target: "_Piece", now: float) -> float:
        """Head for where the chunk ends, under the start limits; `sample` joins once it is within reach, and
        stops when the chunk is over before that.
        """
        start = self._safety.start
        request = InputParameter(self._limits.size)
        request.target_position = target.curve.tail.rest.q
        request.max_velocity = np.full(self._limits.size, start.velocity_rad_s)
        request.max_acceleration = np.full(self._limits.size, start.acceleration_rad_s2)
        request.max_jerk = np.full(self._limits.size, start.jerk_rad_s3)
        state, pieces = self._evaluate(now), []
        calm = (np.abs(state[1]) <= 1.01 * start.velocity_rad_s) & (
            np.abs(state[2]) <= 1.01 * start.acceleration_rad_s2
        )
        if not calm.all():  # stop first: the start's low jerk would shed this motion only slowly
            halt = self._decelerate(now, state, self._safety.stop.deceleration_rad_s2)
            pieces.append(_Piece(now, halt))
            now += halt.duration
            state = halt.rest(now)
        profile = self._plan(now, state, request)
        self._pieces, self._target, self._due = [*pieces, _Piece(now, profile)], target, None
        return profile.duration

    def _plan(self, t: float, state: State, request: InputParameter) -> "_Profile":
        request.current_position, request.current_velocity, request.current_acceleration = state
        request.synchronization = Synchronization.No
        trajectory = Trajectory(self._limits.size)
        result = Ruckig(self._limits.size).calculate(request, trajectory)
        if result not in (Result.Working, Result.Finished):
            raise ArithmeticError(f"no motion profile from {state}: {result}")
        return _Profile(t, trajectory)

    def _join(self, piece: "_Piece", running: State) -> "_Blend":
        goal = piece.curve(piece.start)
        e, de, dde = (r - g for r, g in zip(running, goal, strict=True))
        piece.blend = _Blend(
            piece.start, e, de, dde, *self._join_durations(np.abs(e), np.abs(de), np.abs(dde))
        )
        self._pieces = [p for p in self._pieces if p.start < piece.start] + [piece]
        self._target, self._fresh = None, False
        return piece.blend

    def _join_durations(self, e: np.ndarray, de: np.ndarray, dde: np.ndarray) -> tuple[float, float]:
        """How long a difference of position and velocity and how long one of acceleration takes to decay, s.

        A quintic's own peaks are 5.8 |e| / T^2, 1.9 |e| / T, 4 |de| / T and, in jerk, 9 |dde| / T. The
        acceleration's share ends within 0.1 s at most: a long one would carry the arm away by |dde| T^2 / 58.
        """
        join, limits = self._safety.join, self._limits
        acceleration, velocity = join.share * limits.acceleration, join.share * limits.velocity
        duration = max(
            join.min_duration_s,
            float(np.sqrt(5.8 * e / acceleration).max()),
            float((1.9 * e / velocity).max()),
            float((4.0 * de / acceleration).max()),
        )
        return duration, min(0.1, max(0.02, float((9.0 * dde / limits.reference_jerk).max())))


class _Piece:
    """A curve in charge from `start` on, and what is left of the step onto it."""

    def __init__(self, start: float, curve, chunk: Chunk | None = None):
        self.start, self.curve, self.chunk = start, curve, chunk
        self.blend: _Blend | None = None

    def __call__(self, t: float) -> State:
        q, dq, ddq = self.curve(t)
        if self.blend is not None and t < self.blend.start + self.blend.duration:
            e, de, dde = self.blend(t)
            return q + e, dq + de, ddq + dde
        return q, dq, ddq


class _Rest:
    def __init__(self, q: np.ndarray):
        self.q, self.zero = q, np.zeros_like(q)

    def __call__(self, t: float) -> State:
        return self.q, self.zero, self.zero


class _Profile:
    """A Ruckig trajectory as plain arrays; rests at its end."""

    def __init__(self, start: float, trajectory: Trajectory):
        self.start, self.duration = start, trajectory.duration
        self.rest = _Rest(np.asarray(trajectory.at_time(self.duration)[0]))
        pieces = [  # of constant jerk: two that bring the start within limits, seven, and the end
            (
                [*p.brake.t, *p.t, 0.0],
                [*p.brake.p, *p.p],
                [*p.brake.v, *p.v],
                [*p.brake.a, *p.a],
                [*p.brake.j, *p.j, 0.0],
            )
            for p in trajectory.profiles[0]
        ]
        lengths, self.q, self.dq, self.ddq, self.jerk = np.array(pieces).transpose(1, 0, 2)  # [J, 10] each
        self.begins = np.cumsum(lengths, axis=1) - lengths
        self.rows = np.arange(len(lengths))

    def __call__(self, t: float) -> State:
        t = max(t - self.start, 0.0)
        if t >= self.duration:
            return self.rest(t)
        at = self.rows, (self.begins <= t).sum(axis=1) - 1
        u = t - self.begins[at]
        q, dq, ddq, jerk = self.q[at], self.dq[at], self.ddq[at], self.jerk[at]
        return (
            q + u * (dq + u * (ddq / 2 + u * jerk / 6)),
            dq + u * (ddq + u * jerk / 2),
            ddq + u * jerk,
        )


class _Spline:
    """Natural cubic spline through equidistant knots, then `tail`."""

    def __init__(self, start: float, step: float, knots: np.ndarray):
        self.start, self.step = start, step
        self.coefficients = np.tensordot(_natural_spline(len(knots)), knots, axes=1)  # [n - 1, 4, J]
        self.end = start + (len(knots) - 1) * step
        self.tail: _Profile | None = None

    def __call__(self, t: float) -> State:
        if t >= self.end and self.tail is not None:
            return self.tail(t)
        return self.inside(t)

    def inside(self, t: float) -> State:
        x = max((t - self.start) / self.step, 0.0)
        i = min(int(x), len(self.coefficients) - 1)
        u, r = x - i, 1.0 / self.step
        powers = np.array(
            [
                [1.0, u, u * u, u * u * u],
                [0.0, r, 2 * u * r, 3 * u * u * r],
                [0.0, 0.0, 2 * r * r, 6 * u * r * r],
            ]
        )
        q, dq, ddq = powers @ self.coefficients[i]
        return q, dq, ddq


def _extended(actions: np.ndarray) -> np.ndarray:
    """[H + 2, J]: one more knot before and after, at constant velocity."""
    if len(actions) == 1:
        return np.repeat(actions, 3, axis=0)
    return np.vstack([2 * actions[0] - actions[1], actions, 2 * actions[-1] - actions[-2]])


def _roughness(actions: np.ndarray) -> np.ndarray:
    """[J]: largest second derivative of the spline through `actions` [H, J] at unit spacing (it peaks at
    knots).
    """
    return np.abs(_curvature(len(actions) + 2) @ _extended(actions)).max(axis=0)


@lru_cache(maxsize=64)
def _smoothers(n: int) -> list[np.ndarray]:
    """Ever stronger smoothing matrices [n, n] (Whittaker 1923: least squares with penalised second
    differences).
    """
    second = np.diff(np.eye(n), 2, axis=0)
    return [np.linalg.inv(np.eye(n) + 0.05 * 3.0**k * second.T @ second) for k in range(16)]


@lru_cache(maxsize=64)
def _curvature(n: int) -> np.ndarray:
    """[n, n]: knots at unit spacing -> second derivative of their natural cubic spline at each knot."""
    second = np.diff(np.eye(n), 2, axis=0)
    inner = 4.0 * np.eye(n - 2) + np.eye(n - 2, k=1) + np.eye(n - 2, k=-1)
    return np.vstack([np.zeros(n), np.linalg.solve(inner, 6.0 * second), np.zeros(n)])


@lru_cache(maxsize=64)
def _natural_spline(n: int) -> np.ndarray:
    """[n - 1, 4, n]: knots at unit spacing -> coefficients of each interval's cubic, lowest power first."""
    knots, curvature = np.eye(n), _curvature(n)
    a, m0, m1 = knots[:-1], curvature[:-1], curvature[1:]
    return np.stack([a, knots[1:] - a - (2 * m0 + m1) / 6, m0 / 2, (m1 - m0) / 6], axis=1)


class _Blend:
    """What is left of a step: position and velocity difference gone after `duration` s, that of acceleration
    after `settle` s.
    """

    def __init__(
        self, start: float, e: np.ndarray, de: np.ndarray, dde: np.ndarray, duration: float, settle: float
    ):
        self.start, self.duration, self.settle = start, duration, settle
        de, dde = de * duration, dde * settle**2
        zero = np.zeros_like(
            e
        )  # coefficients [6, J], lowest power first, in (t - start) / duration or / settle
        self.step = np.stack([e, de, zero, -10 * e - 6 * de, 15 * e + 8 * de, -6 * e - 3 * de])
        self.bend = np.stack([zero, zero, dde / 2, -1.5 * dde, 1.5 * dde, -0.5 * dde])

    def __call__(self, t: float) -> State:
        e, de, dde = _powers(t - self.start, self.duration) @ self.step
        if t < self.start + self.settle:
            bend = _powers(t - self.start, self.settle) @ self.bend
            return e + bend[0], de + bend[1], dde + bend[2]
        return e, de, dde


def _powers(t: float, duration: float) -> np.ndarray:
    """[3, 6]: powers 0..5 of s = t / duration and their first and second time derivatives."""
    r = 1.0 / duration
    s = max(t, 0.0) * r
    s2, s3, s4 = s * s, s**3, s**4
    return np.array(
        [
            [1.0, s, s2, s3, s4, s4 * s],
            [0.0, r, 2 * s * r, 3 * s2 * r, 4 * s3 * r, 5 * s4 * r],
            [0.0, 0.0, 2 * r * r, 6 * s * r * r, 12 * s2 * r * r, 20 * s3 * r * r],
        ]
    )
