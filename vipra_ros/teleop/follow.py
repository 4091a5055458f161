"""When arms may follow their leaders, and the chunks that make them. Pure: no ROS, no clock of its own.

    OFF        nobody asked
    ALIGNING   the arms move to their leaders at no more than align_velocity_rad_s
    FOLLOWING  the arms do what the leaders did delay_s ago
    PAUSED     let go by the operator (clutch)
    LOST       let go because a leader is late, jumped, is not finite, or the arms refuse

Every knot of the leaders becomes one knot of the command, under limits of speed and acceleration; a chunk is
the last few of those, due delay_s later. Knots never change, so chunks agree where they overlap and a join
has next to nothing to blend. When samples stop the last chunk runs out and the arms come to rest.
"""

import enum
import math
from collections import deque

import numpy as np

from config.teleop import Teleop
from vipra_ros.execution.chunk import Chunk
from vipra_ros.teleop.leader import Samples

CATCH_UP_S = 0.2  # in which a small distance to the leader decays
ALIGN_S = 0.3  # the same while aligning
WIDE_OPEN = 0.95  # a hand this open holds nothing: 4 mm are left to its end


class State(enum.Enum):
    OFF = "OFF"
    ALIGNING = "ALIGNING"
    FOLLOWING = "FOLLOWING"
    PAUSED = "PAUSED"
    LOST = "LOST"


class Refused(ValueError):
    """The arms may not be coupled to their leaders now; the message says why."""


class Teleoperation:
    """Arms A with J = 7A joints and G hands. `low`, `high` [J] rad: where the arms may be sent."""

    def __init__(
        self,
        config: Teleop,
        arms: tuple[str, ...],
        hands: tuple[bool, ...],
        low: np.ndarray,
        high: np.ndarray,
        half_open: float = 0.5,
    ):
        """`half_open`: an opening that neither opens nor closes a hand."""
        self.config, self.arms = config, arms
        self.state, self.reason = State.OFF, "off: ~/start couples the arms to their leaders"
        self.samples = {arm: Samples(config) for arm in arms}
        self._hands = np.array(hands)
        self._low, self._high = low, high
        self._half_open = half_open
        self._seq = 0
        self._k = 0
        self._q = self._v = self._before = np.zeros(len(low))
        self._knots: deque[np.ndarray] = deque(maxlen=config.knots)  # [J]
        self._openings: deque[np.ndarray] = deque(maxlen=config.knots)  # [G]
        self._told = np.zeros(sum(hands))  # [G] what the hands were told last
        self._taken = np.zeros(sum(hands), bool)

    @property
    def active(self) -> bool:
        """The arms are commanded."""
        return self.state in (State.ALIGNING, State.FOLLOWING)

    def add(self, arm: str, t: float, joints, opening: float | None) -> None:
        """A sample of the leader of `arm`, see `Samples.add`."""
        problem = self.samples[arm].add(t, joints, opening)
        if problem and self.active:
            self.lose(f"{arm} leader: {problem}")

    # --- the operator

    def difference(self, measured: np.ndarray) -> tuple[float, str]:
        """Largest distance (rad) between leaders and `measured` [J] rad, and which joint. NaN, "" unknown."""
        leaders = [self.samples[arm].joints for arm in self.arms]
        if any(joints is None for joints in leaders):
            return math.nan, ""
        return self._worst(np.abs(self._within(np.concatenate(leaders)) - measured))

    def check(self, now: float, measured: np.ndarray) -> None:
        """Raises Refused unless every leader is alive and near its arm at `measured` [J] rad."""
        for arm in self.arms:
            if stale := self._stale(arm, now):
                raise Refused(stale)
        size, joint = self.difference(measured)
        limit = self.config.engage_error_rad
        if not size < limit:
            raise Refused(f"{joint} is {size:.2f} rad from its leader, limit {limit:g}: bring it closer")

    def engage(self, now: float, measured: np.ndarray, told: np.ndarray) -> None:
        """Couple the arms, at rest at `measured` [J] rad. Raises Refused.

        `told` [G]: what the arms say their hands were told last, as long as nobody told them anything what
        they measure. So one between half and wide open may hold something: it is told nothing, and only a
        squeezed trigger takes it over.
        """
        self.check(now, measured)
        self._q = self._within(measured)
        self._v = np.zeros_like(self._q)
        self._before = self._q
        self._k = min(samples.knots[-1][0] for samples in self.samples.values())
        holding = (told > self._half_open) & (told < WIDE_OPEN)
        self._told = np.where(holding, self._half_open, told)
        self._taken[:] = False
        self._knots.extend([self._q] * self.config.knots)
        self._openings.extend([self._told] * self.config.knots)
        self._seq = 0
        self._set(State.ALIGNING, "aligning: hold the leaders still")

    def pause(self) -> None:
        """Clutch: the arms come to rest and stay; the leaders are free."""
        if self.active:
            self._set(State.PAUSED, "paused: ~/start or ~/pause couples again")

    def stop(self, reason: str = "off: ~/start couples the arms to their leaders") -> None:
        self._set(State.OFF, reason)

    def lose(self, reason: str) -> None:
        """Let go for a reason the operator should see."""
        self._set(State.LOST, reason)

    # --- the loop

    def tick(self, now: float) -> Chunk | None:
        """The next chunk, when a leader's samples have brought a new knot."""
        if not self.active:
            return None
        for arm in self.arms:
            if stale := self._stale(arm, now):
                self.lose(stale)
                return None
        fresh = False
        while self.active and (rows := self._rows(self._k + 1)) is not None:
            self._k += 1
            self._step(rows)
            fresh = True
        return self._chunk() if fresh and self.active else None

    def _stale(self, arm: str, now: float) -> str:
        samples = self.samples[arm]
        if samples.newest_s == -math.inf:
            return f"no sample from the {arm} leader yet"
        age = now - samples.newest_s
        if age > self.config.lost_after_s:
            return f"{arm} leader lost: no sample for {age:.2f} s, limit {self.config.lost_after_s:g}"
        if not samples.knots:
            return f"{arm} leader: too few samples yet"
        missed = self.active and samples.knots[0][0] > self._k + 1
        return f"{arm} leader lost: samples are missing" if missed else ""

    def _rows(self, k: int) -> np.ndarray | None:
        """Knot `k` of every leader [A, 8]; None while one is missing."""
        rows = [self.samples[arm].at(k) for arm in self.arms]
        return None if any(row is None for row in rows) else np.array(rows)

    def _step(self, rows: np.ndarray) -> None:
        """One knot of the leaders [A, 8] -> one of the command."""
        config, h = self.config, 1.0 / self.config.rate_hz
        leader = self._within(rows[:, :7].ravel())
        if self.state is State.ALIGNING:
            wish = _approach(leader - self._q, ALIGN_S, config.align_acceleration_rad_s2)
            fastest, acceleration = config.align_velocity_rad_s, config.align_acceleration_rad_s2
        else:
            wish = (leader - self._before) / h
            wish += _approach(self._before - self._q, CATCH_UP_S, 0.5 * config.acceleration_rad_s2)
            fastest, acceleration = config.velocity_rad_s, config.acceleration_rad_s2
        wish = np.clip(wish, -fastest, fastest)
        velocity = self._v + np.clip(wish - self._v, -acceleration * h, acceleration * h)
        command = self._within(self._q + velocity * h)
        self._v, self._q, self._before = (command - self._q) / h, command, leader
        self._knots.append(command)
        self._openings.append(self._hand(rows[self._hands, 7]))
        size, joint = self._worst(np.abs(leader - command))
        if size > config.engage_error_rad:
            self.lose(f"{joint} is {size:.2f} rad behind its leader, limit {config.engage_error_rad:g}")
        elif self.state is State.ALIGNING and size < config.aligned_error_rad:
            self._set(State.FOLLOWING, "following")

    def _hand(self, trigger: np.ndarray) -> np.ndarray:
        """Openings [G] for the triggers' [G]: each takes over once it is on the side where its hand is."""
        there = np.isfinite(trigger)
        self._taken |= there & ((trigger > self._half_open) == (self._told > self._half_open))
        self._told = np.where(self._taken & there, trigger, self._told)
        return self._told

    def _chunk(self) -> Chunk:
        config = self.config
        t0 = (self._k - len(self._knots) + 1) / config.rate_hz + config.delay_s
        chunk = Chunk(self._seq, t0, config.rate_hz, np.array(self._knots), np.array(self._openings))
        self._seq += 1
        return chunk

    @property
    def waiting_triggers(self) -> tuple[str, ...]:
        """Arms whose hand the leader's trigger has not taken over yet."""
        hands = [arm for arm, hand in zip(self.arms, self._hands, strict=True) if hand]
        return tuple(a for a, taken in zip(hands, self._taken, strict=True) if self.active and not taken)

    def _within(self, q: np.ndarray) -> np.ndarray:
        return np.clip(q, self._low, self._high)

    def _worst(self, error: np.ndarray) -> tuple[float, str]:
        j = int(error.argmax())
        return float(error[j]), f"{self.arms[j // 7]} joint {j % 7 + 1}"

    def _set(self, state: State, reason: str) -> None:
        self.state, self.reason = state, reason


def _approach(error: np.ndarray, time_s: float, deceleration: float) -> np.ndarray:
    """Speed towards what is `error` away that can still brake there: |e| / T, at most sqrt(2 a |e|)."""
    distance = np.abs(error)
    return np.sign(error) * np.minimum(distance / time_s, np.sqrt(2 * deceleration * distance))
