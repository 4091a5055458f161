"""The commander on a clock of the test's own: what it asks, with which noise and pictures. No ROS."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.standin import StandIn
from config.embodiment import Embodiment
from config.loading import load
from config.robot import PolicyClient as PolicyConfig
from config.safety import Safety
from policy_server import keys
from policy_server.client import ServerUnavailable
from policy_server.protocol import Chunk as Answer
from policy_server.protocol import Error
from policy_server.router import Server
from vipra_ros.commander import ArmsStatus, Commander, State, connect
from vipra_ros.execution.chunk import Rejected
from vipra_ros.execution.planner import Planner
from vipra_ros.safety.supervisor import Supervisor

pytestmark = pytest.mark.live

BODY = load(Embodiment, "franka_bimanual")
HOME = np.tile([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398, 1.0], 2)
JOINTS = np.array([d.kind == "joint" for d in BODY.dimensions])
REST_S = 0.2  # from the last action of the last chunk to arms at rest
PERIOD_S, SIZE = 1 / 30, (48, 64)


class ScriptedClient:
    """Answers each request `latency_s` later with rest at home, where `stray(request number)` 0.2 rad off."""

    def __init__(self, clock, latency_s: float, stray=lambda number: False, **metadata):
        self.clock, self.latency_s, self.stray = clock, latency_s, stray
        self.metadata = StandIn("franka_bimanual", image_size=SIZE, **metadata).metadata
        self.requests: list[SimpleNamespace] = []
        self.states: list[np.ndarray | None] = []
        self.prefetched: list[np.ndarray] = []
        self._due: list[tuple[float, Answer]] = []

    def hello(self, timeout_s):
        return self.metadata

    def submit(self, pictures, task, t_obs, seed, state, deadline_ms):
        number = len(self.requests)
        self.requests.append(SimpleNamespace(pictures=pictures, seed=seed, at=self.clock.now()))
        rows = np.tile(HOME + 0.2 * JOINTS * self.stray(number), (14, 1)).astype(np.float32)
        answer = Answer(session="s", seq=number, t_obs=t_obs, actions=rows)
        self.states.append(state)
        latency_s = self.latency_s(number) if callable(self.latency_s) else self.latency_s
        self._due.append((self.clock.now() + latency_s, answer))
        return number

    def prefetch(self, picture, task):
        self.prefetched.append(picture)
        return True

    def poll(self):
        due = [answer for at, answer in self._due if at <= self.clock.now()]
        self._due = [(at, answer) for at, answer in self._due if at > self.clock.now()]
        return due

    def cancel(self, seq):
        pass


class Robot:
    """Commander, arms that accept everything, and a camera whose pictures are noise, each another."""

    def __init__(self, client_of, config: PolicyConfig, rest: str = "HOLDING"):
        self.rest, self.rejected = rest, ""  # "seq code message" of the last refusal
        self.refuse = -1  # the arms refuse this chunk
        self.clock = SimpleNamespace(t=100.0)
        self.clock.now = lambda: self.clock.t
        self.client = client_of(self.clock)
        self.sent: list[tuple[float, int]] = []
        self.ends: list[float] = []
        self.lines: list[dict] = []
        gate = Supervisor(load(Safety, "fr3"), ("left", "right"), None, HOME[JOINTS], self.clock.t)
        planner = Planner(config, BODY.horizon, PERIOD_S, lead_s=2.0)
        self.commander = Commander(
            config,
            BODY,
            ("left", "right"),
            self.client,
            planner,
            gate,
            self.clock,
            self._send,
            self.lines.append,
        )
        self.rng = np.random.default_rng(0)
        self._picture_at = self.clock.t
        self.commander.start()

    def _send(self, seq, chunk):
        if chunk is None:
            return
        lead_s = chunk.t0 - self.clock.t
        if lead_s > 2.0:
            self.rejected = f"{seq} future begins {lead_s:.3f} s ahead, limit 2.0 s"
        elif seq == self.refuse:
            self.rejected = f"{seq} rough too fast"
        else:
            self.sent.append((self.clock.t, seq))
            self.ends.append(chunk.end)

    def step(self) -> None:
        """10 ms of camera, arms and commander."""
        commander, now = self.commander, self.clock.t
        if now >= self._picture_at:
            picture = self.rng.integers(0, 256, (*SIZE, 3), np.uint8)
            commander.on_picture(picture, self._picture_at - 0.005)
            self._picture_at += PERIOD_S
        for arm, part in (("left", HOME[:8]), ("right", HOME[8:])):
            commander.on_joints(arm, now, part)
        accepted = self.sent[-1][1] if self.sent else -1
        state = "RUNNING" if self.ends and now < self.ends[-1] + REST_S else self.rest
        commander.on_arms(ArmsStatus(state, "", commander.lease or "", now, accepted, self.rejected))
        commander.tick()
        if commander.wants_lease:
            commander.granted("lease:0")
        self.clock.t += 0.01

    def run(self, seconds: float) -> "Robot":
        end = self.clock.t + seconds
        while self.clock.t < end:
            self.step()
        assert self.commander.state is State.RUNNING, self.commander.reason
        return self


def lost():
    raise ServerUnavailable("the connection was lost; trying again")


def simulated(
    seconds, latency_s=0.08, stray=lambda number: False, metadata=(), rest="HOLDING", **policy
) -> Robot:
    config = PolicyConfig(task="stack", **policy)
    made = Robot(lambda clock: ScriptedClient(clock, latency_s, stray, **dict(metadata)), config, rest)
    return made.run(seconds)


def test_every_request_of_a_run_carries_the_same_noise():
    robot = simulated(3.0, seed=7)
    assert len(robot.client.requests) > 5
    assert {request.seed for request in robot.client.requests} == {7}
    assert robot.commander.counts.refused == 0


def test_a_refused_chunk_is_asked_again_at_once_with_other_noise():
    robot = simulated(3.0, stray=lambda number: number == 4, seed=7)
    requests = robot.client.requests
    assert [line["seq"] for line in robot.lines if line["outcome"] == "refused"] == [4]
    assert [request.seed for request in requests[:5]] == [7] * 5
    assert {request.seed for request in requests[5:]} == {8}
    assert requests[5].at - requests[4].at == pytest.approx(0.08, abs=0.021), "as soon as it was refused"


def test_a_policy_that_lost_its_way_goes_on_from_rest():
    """Every chunk from the fifth on is 0.2 rad off: a fault for arms that move, and resting ones align."""
    robot = simulated(6.0, latency_s=0.25, stray=lambda number: number >= 4)
    outcomes = [(line["seq"], line["outcome"]) for line in robot.lines]
    assert outcomes[:6] == [(n, "sent") for n in range(4)] + [(4, "refused"), (5, "refused")]
    first = next(line for line in robot.lines if line["seq"] >= 4 and line["outcome"] == "sent")
    assert first["t0"] > robot.ends[3] + REST_S - 0.02, "at rest"
    assert robot.commander.counts.chunks > 6


APPEND = {"anchor": "append", "action_rate_hz": 22.0, "replan_after": 14}


@pytest.mark.parametrize("replan_after", [7, 14])
def test_one_slow_answer_makes_no_later_chunk_come_too_early(replan_after):
    """The next ones are asked for sooner by its latency; the arms take none more than 2 s ahead."""
    robot = simulated(20.0, lambda n: 2.2 if n == 3 else 0.1, **APPEND | {"replan_after": replan_after})
    assert not robot.rejected and robot.commander.counts.refused == 0
    assert robot.commander.counts.chunks > 8


def test_what_follows_a_refused_chunk_begins_where_the_arms_are():
    def stray(number):
        return np.linspace(0, 0.6, 14)[:, None] if number == 2 else 0.0  # ends .12 rad off

    config = PolicyConfig(task="stack", **APPEND)
    robot = Robot(lambda clock: ScriptedClient(clock, 0.1, stray, needs_state=True), config)
    robot.refuse = 2
    robot.run(6.0)
    assert robot.rejected == "2 rough too fast" and robot.commander.counts.chunks > 6
    assert max(np.abs(state - HOME).max() for state in robot.client.states) < 1e-6


def test_an_answer_under_way_when_the_arms_refuse_a_chunk_is_used():
    """At the gap-free rate the next request is out before they have said so."""
    config = PolicyConfig(task="stack")
    robot = Robot(lambda clock: ScriptedClient(clock, 0.4), config)
    robot.refuse = 3
    robot.run(8.0)
    outcomes = {line["seq"]: line["outcome"] for line in robot.lines}
    assert robot.rejected.startswith("3 ") and outcomes[4] == "sent"


def test_a_moment_without_the_server_in_motion_keeps_chunks_due_from_their_pictures():
    robot = simulated(1.5, latency_s=0.25)
    hello, robot.client.hello = robot.client.hello, lambda timeout_s: lost()
    robot.step()
    assert robot.commander.state is State.WAITING
    robot.client.hello = hello
    sent = len(robot.sent)
    robot.run(1.5)
    assert len(robot.sent) > sent
    late = [line["received"] - line["t0"] for line in robot.lines if line["outcome"] == "sent"]
    assert min(late[1:]) > 0.2, "only the first begins on its arrival"


def test_requests_that_all_fail_are_told():
    robot = simulated(1.0)
    config = robot.commander._config

    class Silent(ScriptedClient):
        def submit(self, *given):
            number = super().submit(*given)
            error = Error(code="timeout", message="no reply within 2.5 s", session="s", seq=number)
            self._due[-1] = (self.clock.now() + 2.5, error)
            return number

    silent = Robot(lambda clock: Silent(clock, 0.0), config).run(4.0)
    assert not silent.commander.failing
    silent.run(4.0)
    assert silent.commander.failing
    assert silent.commander.reason == (
        "no chunk from the server for 3 requests: timeout: no reply within 2.5 s"
    )
    assert robot.commander.reason == "running" and not robot.commander.failing


def test_joints_are_known_for_as_long_as_an_answer_may_take():
    """One relative to its picture begins where the arms were then."""
    robot = simulated(1.0, inject_latency_ms=1000.0)
    commander, begin = robot.commander, robot.clock.t
    for k in range(500):
        for arm in ("left", "right"):
            commander.on_joints(arm, begin + 0.01 * k, np.full(8, 0.01 * k))
    assert commander._state_at(begin + 2.0)[0] == pytest.approx(2.0)
    with pytest.raises(Rejected, match="joints are not kept so long"):
        commander._state_at(begin)


def test_a_picture_from_before_the_joints_were_heard_is_not_asked_about():
    robot = simulated(1.0, metadata={"needs_state": True}, camera_timeout_s=2.0)
    asked, commander = len(robot.client.requests), robot.commander
    for states in commander._joints.values():
        states.clear()
    robot.clock.t += 1.0
    for arm, part in (("left", HOME[:8]), ("right", HOME[8:])):
        commander.on_joints(arm, robot.clock.t, part)
    commander.planner.resume()
    commander.tick()
    assert commander.state is State.RUNNING and len(robot.client.requests) == asked
    assert len(robot.run(1.0).client.requests) > asked


def test_pictures_stamped_ahead_are_another_clocks():
    robot = simulated(1.0)
    robot.commander.on_picture(np.zeros((*SIZE, 3), np.uint8), robot.clock.t + 0.5)
    robot.commander.tick()
    assert robot.commander.state is State.WAITING
    assert "pictures are stamped -0.5 s away from this clock" in robot.commander.reason


def test_arms_that_were_brought_home_in_a_run_wait_for_a_person():
    robot = simulated(2.0)
    now, lease = robot.clock.t, robot.commander.lease
    robot.commander.on_arms(ArmsStatus("HOMING", "", lease, now, robot.sent[-1][1], ""))
    robot.commander.tick()
    assert robot.commander.state is State.STOPPED
    assert "the arms are homing: ~/start goes on from there" in robot.commander.reason


def test_arms_at_rest_are_aligned_to_whatever_they_call_their_rest():
    """0.2 rad off is too far for arms that move; IDLE, after home say, is as much rest as HOLDING."""
    robot = simulated(6.0, latency_s=0.25, stray=lambda number: number >= 4, rest="IDLE")
    assert robot.commander.counts.chunks > 6


def test_a_policy_that_is_lost_for_good_is_stopped():
    robot = simulated(2.0, latency_s=0.25, stray=lambda number: 0)
    robot.client.stray = lambda number: 2.0  # 0.4 rad
    with pytest.raises(AssertionError, match=r"5 chunks in a row were unsafe.* 0\.400 rad from the arms"):
        robot.run(6.0)


def test_at_the_gap_free_rate_nothing_starves_as_long_as_nothing_is_refused():
    robot = simulated(20.0, latency_s=0.51, replan_after=14)
    planner, lines = robot.commander.planner, [line for line in robot.lines if line["outcome"] == "sent"]
    assert (
        planner.rate_hz == pytest.approx(14 / (2 * planner.latency().p99 / 1000), rel=0.04)
        and planner.announcement
    )
    ends = [line["t0"] + line["actions"] / line["rate_hz"] for line in lines]
    arrivals = [at for at, _ in robot.sent]
    assert len(lines) > 20 and all(at < end for at, end in zip(arrivals[1:], ends, strict=False))


def test_a_hand_that_has_closed_does_not_open_for_two_actions():
    """Every chunk says: just arriving, closing in two actions. Only the first one is right."""

    class Arriving(ScriptedClient):
        def submit(self, *asked):
            number = super().submit(*asked)
            self._due[-1][1].actions[2:, ~JOINTS] = 0.0
            return number

    class Hands(Robot):
        chunks = ()

        def _send(self, seq, chunk):
            super()._send(seq, chunk)
            self.chunks += (chunk,)

    def sent(least: int) -> list[list[float]]:
        config = PolicyConfig(task="stack", gripper_sustained_actions=least)
        robot = Hands(lambda clock: Arriving(clock, 0.08), config).run(3.0)
        assert len(robot.chunks) > 5
        return [chunk.grippers[:3, 0].tolist() for chunk in robot.chunks]

    first, *others = sent(4)
    assert first == [1.0, 1.0, 0.0] and others == [[0.0, 0.0, 0.0]] * len(others)
    assert {tuple(openings) for openings in sent(1)} == {(1.0, 1.0, 0.0)}, "as the policy says"


def test_most_requests_find_their_earlier_picture_prefetched_pixel_for_pixel():
    robot = simulated(10.0, metadata={"supports_prefetch": True})
    requests, ahead = robot.client.requests, {picture.tobytes() for picture in robot.client.prefetched}
    hits = sum(request.pictures[0].tobytes() in ahead for request in requests)
    assert len(requests) > 25 and hits > 0.75 * len(requests)
    assert len(ahead) < 1.3 * len(requests) and robot.commander.counts.prefetches == len(
        robot.client.prefetched
    )


def test_a_server_that_gains_nothing_from_it_is_sent_nothing_ahead():
    assert simulated(3.0).client.prefetched == []


def test_prefetch_hits_through_curve_and_jpeg(tmp_path):
    for name in (keys.SERVER, "robot"):
        keys.generate(tmp_path, name)
    policy = StandIn("franka_bimanual", 0.02, image_size=SIZE, supports_prefetch=True)
    policy.actions = lambda request: np.tile(HOME, (14, 1)).astype(np.float32)
    with Server(lambda: policy, "tcp://127.0.0.1:*", keys=tmp_path) as server:
        assert server.ready.wait(10)
        config = PolicyConfig(
            task="stack",
            server=server.endpoint,
            server_public_key=str(tmp_path / "server.key"),
            client_secret_key=str(tmp_path / "robot.key_secret"),
            jpeg_quality=90,
        )
        with connect(config, BODY) as client:
            client.hello(10.0)
            robot = Robot(lambda clock: client, config)
            start = time.monotonic()
            while len(robot.sent) < 12 and time.monotonic() < start + 30:
                robot.step()
                time.sleep(max(0.0, robot.clock.t - 100.0 - (time.monotonic() - start)))
            counts = client.stats().counts
    assert counts["chunk"] >= 12 and counts["prefetch_hit"] >= 2  # how many is the machine's pace
    assert counts["prefetch"] == robot.commander.counts.prefetches
