"""When to ask the policy, and when the chunk it sends back is due. Pure arithmetic on the times passed in.

H actions in a chunk, rate r, one request in flight; L is the time from a frame's capture to its chunk
running, R the part of it from sending to running.

observation
    Chunk k is due from t_obs(k), so it starts L late and runs out at t_obs(k) + H / r; the first one after a
    rest is due from its arrival, since its picture still holds. The next request cannot leave before k has
    come, and its chunk runs R <= L after that: gap-free when L + R <= H / r, for certain when 2 L <= H / r.
    The highest gap-free rate is H / (2 L_p99), whatever `replan_after` is. It leaves no time to ask again for
    a chunk that is refused; once that has happened, the rate leaves it for the next WINDOW: H / (3 L_p99).
    With n = `replan_after`, the next chunk is planned to take over n actions after this one did (by the
    median of R, and by its p99 before this one ends). That needs L <= n / r (asked and answered within n
    actions) and L <= (H - n) / r (n are left when this one starts); for n = 7 of 14 both say L <= H / (2 r).
    Where they fail the next chunk takes over later, at the latest when this one ends.
append
    A chunk begins where the last one ends, n actions after that began, so only R counts: H / R_p99, and
    H / (2 R_p99) after a refusal.
synchronous
    The arms rest while the policy thinks; every rate is gap-free within a chunk.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from config.robot import PolicyClient

DELIVERY_S = 0.02  # from an answer's arrival to the first tick that follows it: transport and two ticks
SETTLE_S = 0.15  # synchronous: from the last action to an arm at rest, 0.5 rad/s at 5 rad/s2 and a margin
TICK_S = 0.01  # about how often `should_request` is asked
RETRY_S = 0.1  # after a failed request
LEAD_MARGIN_S = 0.1  # a chunk is answered for this much less than the furthest ahead that the arms take one
WINDOW = 100  # answers whose latencies and refusals are remembered


@dataclass(frozen=True)
class Timing:
    """When and how an answered chunk runs."""

    t0: float  # s, executor clock: action 0 is due
    rate_hz: float
    count: int  # send this many of the chunk's actions


@dataclass(frozen=True)
class Latency:
    """Quantiles of the remembered latencies, ms, from capture to running."""

    p50: float
    p95: float
    p99: float
    samples: int


class Planner:
    """One policy's schedule. Ask `should_request` often; report `sent`, then `received` or `failed`."""

    def __init__(self, policy: PolicyClient, horizon: int, frame_period_s: float, lead_s: float = math.inf):
        """lead_s: a chunk may begin at most this far ahead. Raises ValueError for a horizon too short."""
        if policy.replan_after > horizon:
            raise ValueError(f"replan_after {policy.replan_after} is more than the horizon {horizon}")
        self._policy, self._horizon, self._frame_period = policy, horizon, frame_period_s
        self._lead_s = lead_s
        self._answer: deque[float] = deque(maxlen=WINDOW)  # s, sent to running: R
        self._age: deque[float] = deque(maxlen=WINDOW)  # s, captured to sent
        self._unrefused = WINDOW  # answers since the last refused chunk
        self._rate = math.inf  # Hz, gap-free
        self._announcement: str | None = None
        self.restart()

    def restart(self) -> None:
        """Forget chunks and requests (start, recovery); keep the latencies."""
        self._in_flight: tuple[int, float, float] | None = None  # seq, t_obs, sent
        self._current: Timing | None = None
        self._before: Timing | None = None  # the chunk before the current one
        self._next = -math.inf  # no request before this
        self._last_sent = -math.inf

    def resume(self) -> None:
        """Ask again at once, after something was missing for a while; the chunk that runs may run still."""
        self._in_flight, self._next = None, self._soonest()

    def refused(self) -> None:
        """The chunk just received does not run: the one before it does, and the next request may leave.

        A younger request that is out already is waited for, unless it asked for what follows that chunk.
        """
        self._current, self._unrefused = self._before, 0
        if self._appends or self._in_flight is None:
            self._in_flight, self._next = None, self._soonest()

    @property
    def _appends(self) -> bool:
        return self._policy.mode == "asynchronous" and self._policy.anchor == "append"

    def _follows(self) -> float:
        """append: when the next chunk takes over."""
        current = self._current
        return current.t0 + self._policy.replan_after / current.rate_hz if current else -math.inf

    def _soonest(self) -> float:
        """An answer to a request before this might be for too far ahead."""
        return self._follows() - self._lead_s + LEAD_MARGIN_S if self._appends else -math.inf

    @property
    def rate_hz(self) -> float:
        """Rate of the next chunk: the configured one, or the highest gap-free one where that is lower.

        It falls at once and rises only when there is 5 % to gain, so that it does not follow every latency.
        """
        return min(self._policy.action_rate_hz, self._rate)

    @property
    def gap_free_rate_hz(self) -> float:
        """Highest gap-free rate by the latencies so far, rounded down to 0.1 Hz; infinite while nothing
        limits it.
        """
        if self._policy.mode == "synchronous" or not self._answer:
            return math.inf
        answer, again = self._quantile(self._answer, 0.99), self._asks_again
        if self._policy.anchor == "append":
            rate = self._horizon / ((1 + again) * answer)
        else:
            latency = answer + max(self._quantile(self._age, 0.99), self._frame_period)
            rate = self._horizon / ((2 + again) * latency)
        return max(0.5, math.floor(10.0 * rate) / 10.0)

    @property
    def _asks_again(self) -> bool:
        """Whether there shall be time for a second request before a chunk runs out."""
        return self._unrefused < WINDOW

    @property
    def announcement(self) -> str | None:
        """One line for the operator when the rate had to be lowered, else None."""
        return self._announcement

    def latency(self) -> Latency:
        """Latencies from capture to running; zeros before the first answer."""
        if not self._answer:
            return Latency(0.0, 0.0, 0.0, 0)
        total = 1e3 * (np.array(self._answer) + np.array(self._age))
        p50, p95, p99 = np.quantile(total, (0.5, 0.95, 0.99), method="higher").tolist()
        return Latency(p50, p95, p99, len(total))

    def precedes_request(self, history_s: float, now: float) -> bool:
        """Whether the picture that arrived at `now` should be the o_{t-1} of the next request.

        That request will take the newest picture there is when it is due, and this one must lie `history_s`
        before it. False while none is scheduled, or the next one leaves at once.
        """
        if self._in_flight is not None or not now < self._next < math.inf:
            return False
        following = math.floor((self._next + TICK_S / 2 - now) / self._frame_period)
        return following == round(history_s / self._frame_period) > 0

    def should_request(self, now: float) -> bool:
        """Whether to send a request with the newest frame now."""
        return self._in_flight is None and now >= self._next

    def sent(self, seq: int, t_obs: float, now: float) -> None:
        """Request `seq` for the frame captured at `t_obs` left at `now`."""
        if self._in_flight is not None:
            raise RuntimeError(f"request {self._in_flight[0]} is still in flight")
        self._in_flight = seq, t_obs, now
        self._last_sent = now

    def failed(self, seq: int, now: float) -> None:
        """Request `seq` will not be answered (error, expired, lost): ask again shortly."""
        if self._in_flight is not None and self._in_flight[0] == seq:
            self._in_flight, self._next = None, now + RETRY_S

    def received(self, seq: int, now: float) -> Timing | None:
        """The answer to `seq` came at `now`: when it runs; None when nobody waits for it any more."""
        if self._in_flight is None or self._in_flight[0] != seq:
            return None
        _, t_obs, sent = self._in_flight
        self._in_flight = None
        self._answer.append(now - sent + DELIVERY_S)
        self._age.append(max(0.0, sent - t_obs))
        self._unrefused += 1
        self._adapt()
        policy, rate, horizon = self._policy, self.rate_hz, self._horizon
        n, period = policy.replan_after, 1.0 / self.rate_hz
        answer = self._quantile(self._answer, 0.99)
        if policy.mode == "synchronous":
            timing = Timing(now + DELIVERY_S, rate, n)
            self._next = max(timing.t0 + n * period + SETTLE_S, self._last_sent + policy.min_cycle_s)
        elif policy.anchor == "append":
            timing = Timing(max(self._follows(), now + DELIVERY_S), rate, horizon)
            # joins begin one period before the first action
            self._next = timing.t0 + (n - 1) * period - (1 + self._asks_again) * answer
        else:
            # A picture of resting arms is still true when its chunk comes: that one starts with its action 0.
            rested = self._current is None or self._ends(self._current) < t_obs
            timing = Timing(now + DELIVERY_S if rested else t_obs, rate, horizon)
            # In the middle of a chunk a late answer starves nobody: ask for the usual one, not the slowest.
            usual = now + DELIVERY_S + n * period - self._quantile(self._answer, 0.5)
            self._next = min(usual, self._ends(timing) - (1 + self._asks_again) * answer)
        self._before, self._current = self._current, timing
        self._next = max(self._next, self._soonest())
        return timing

    def _adapt(self) -> None:
        rate, wanted = self.gap_free_rate_hz, self._policy.action_rate_hz
        if self._rate <= rate <= 1.05 * self._rate:
            return
        self._rate, self._announcement = rate, None
        if rate < wanted:
            room = " with time to ask again for a refused chunk" if self._asks_again else ""
            self._announcement = (
                f"{wanted:g} Hz would leave gaps at {self.latency().p99:.0f} ms latency (p99): "
                f"running at {rate:g} Hz, the highest gap-free rate{room}"
            )

    @staticmethod
    def _ends(timing: Timing) -> float:
        return timing.t0 + (timing.count - 1) / timing.rate_hz

    @staticmethod
    def _quantile(values: deque[float], p: float) -> float:
        return float(np.quantile(np.array(values), p, method="higher"))
