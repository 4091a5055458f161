"""A trial on a running graph: refused for another policy, watched, filmed and saved."""

import itertools
from types import SimpleNamespace

import av
import numpy as np
import pytest
from sensor_msgs.msg import JointState

from config.safety import GripperLimits
from vipra_ros.evaluation import rig as rigs
from vipra_ros.evaluation.ledger import Key, Ledger
from vipra_ros.evaluation.motion import measure
from vipra_ros.evaluation.rig import GraphRig, grid, played, together
from vipra_ros.monitor import Status

HAND = GripperLimits()
SERVED = {"model": "mine", "checkpoint": "1a", "mode": "asynchronous", "action_rate_hz": "15"}


def test_joint_states_of_two_arms_come_onto_one_grid():
    left = [(t, np.full(7, t)) for t in np.arange(10.0, 12.0, 0.01)]
    right = [(t, np.full(7, -t)) for t in np.arange(10.3, 12.4, 0.013)]
    times = grid([left, right])
    joints = together(times, [left, right])
    assert joints.shape == (len(times), 2, 7) and times[0] == 10.3 and times[-1] <= 11.99
    assert np.allclose(joints[:, 0, 0], times) and np.allclose(joints[:, 1, 0], -times)
    assert len(grid([[], right])) == 0 and together(times, [[], right]).shape == (len(times), 2, 0)


class FakeMonitor:
    """Takes what `GraphRig` watches; `joints[arm, topic]` is called with what the test says they are."""

    def __init__(self):
        self.joints, self.calls, self.watchers = {}, [], {}
        self.statuses = {"policy": Status(0, "", SERVED)}

    def watch_status(self, name, callback):
        self.watchers[name] = callback

    def status(self, name):
        return self.statuses[name]

    def watch_images(self, callback):
        pass

    def watch_joints(self, arm, callback, topic="joint_states"):
        self.joints[arm, topic] = callback

    def set_task(self, task):
        pass

    def call(self, service, timeout_s):
        self.calls.append(service)


def test_a_server_that_serves_another_checkpoint_starts_no_trial(tmp_path):
    monitor, film = FakeMonitor(), tmp_path / "a.mp4"
    rig = GraphRig(monitor, ("left",), HAND, print, played(monitor.status("policy")))
    for checkpoint in ("2b", ""):
        monitor.statuses["policy"] = Status(0, "", SERVED | {"checkpoint": checkpoint})
        with pytest.raises(rig.errors, match=f"has checkpoint '{checkpoint}', this evaluation's has '1a'"):
            rig.start("stack", film)
    assert not monitor.calls and not film.exists()
    monitor.statuses["policy"] = Status(0, "", SERVED)
    rig.start("stack", film)
    rig.discard()
    assert monitor.calls == ["/policy/start"]


def test_a_film_that_cannot_be_written_ends_alone(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *_):
            pass

        def add(self, *_):
            raise av.FFmpegError(28, "No space left on device")

    monkeypatch.setattr(rigs, "Video", Full)
    monitor, said = FakeMonitor(), []
    monitor.watch_images = lambda callback: setattr(monitor, "show", callback)
    rig = GraphRig(monitor, ("left",), HAND, said.append, {})
    rig.start("stack", tmp_path / "a.mp4")
    stamp = SimpleNamespace(sec=1, nanosec=0)
    picture = SimpleNamespace(header=SimpleNamespace(stamp=stamp), data=bytes(12), height=2, width=2)
    monitor.show(picture)
    monitor.show(picture)
    stamp.sec = 2
    monitor.show(picture)
    assert len(said) == 1 and "No space left" in said[0] and rig.newest_s == 2.0
    told = SimpleNamespace(header=SimpleNamespace(stamp=stamp), position=[0.0] * 8)
    monitor.joints["left", "joint_states"](told)
    (measured,), _ = rig.finish(tmp_path / "a.jpg")
    assert len(measured) == 1 and (tmp_path / "a.jpg").stat().st_size, "the whole trial is measured"
    monitor.joints["left", "joint_states"](told)
    assert len(rig.finish(tmp_path / "a.jpg")[0][0]) == 1, "and nothing after it"


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A rig whose trial runs since 10 s; look(...) 0.1 s after the last is what it makes of the statuses."""
    wall = itertools.count()
    monkeypatch.setattr(rigs, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    monitor, seconds = FakeMonitor(), [100.0]
    rig = GraphRig(monitor, ("left",), HAND, print, {})

    def begin():
        rig.start("stack", tmp_path / "a.mp4")
        seconds[0] += 10.0

    def look(state="RUNNING", reason="running", arms="RUNNING", silent=(), chunks=0):
        seconds[0] += 0.1
        time_s = str(next(wall) / 10)
        monitor.statuses["arms"] = Status(0, "moving", {"state": arms, "time_s": time_s})
        monitor.statuses["policy"] = Status(
            0, reason, {"state": state, "chunks": str(chunks), "refused": "0"}
        )
        for node in {"arms", "policy"} - set(silent):
            monitor.watchers[node](None)
        return rig.trouble()

    begin()
    look.begin = begin
    yield look
    rig.discard()


@pytest.mark.parametrize("node", ["arms", "policy"])
def test_a_node_that_falls_silent_voids_the_trial(watched, node):
    seen = [watched() for _ in range(5)] + [watched(silent=[node]) for _ in range(32)]
    assert seen[:30] == [None] * 30 and seen[-1] == (
        "void",
        f"no status from the {node} node for 3 s: is it up?",
    )


def test_a_policy_that_waits_voids_the_trial_and_one_that_goes_on_does_not(watched):
    for _ in range(3):
        seen = [watched("WAITING", "asking the arms for the lease") for _ in range(15)] + [watched()]
        assert seen == [None] * 16
    seen = [watched("WAITING", "camera lost: no picture for 0.3 s") for _ in range(22)]
    assert seen[:15] == [None] * 15 and seen[-1] == (
        "void",
        "the policy waits: camera lost: no picture for 0.3 s",
    )


def test_a_server_that_hangs_voids_the_trial_and_a_slow_one_does_not(watched):
    for number in range(3):
        assert {watched(arms="HOLDING", chunks=number) for _ in range(45)} == {None}
        assert {watched(arms="RUNNING", chunks=number) for _ in range(60)} == {None}
    seen = [watched(arms="HOLDING", chunks=3) for _ in range(55)]
    assert seen[0] is None and seen[-1] == ("void", "no chunk from the policy server for 5 s: does it hang?")
    watched.begin()  # of the next trial nothing is known yet
    assert {watched(arms="IDLE", chunks=3) for _ in range(45)} == {None}


def test_faults_are_told_from_what_is_not_the_policys_doing(watched):
    assert watched("STOPPED", "the arms refuse chunk 3")[0] == "fault" == watched(arms="STOPPED")[0]
    assert watched("WAITING", "no policy server: gone")[0] == "void"
    assert watched("STOPPED", "the arms node has fallen silent")[0] == "void"


def test_measured_and_commanded_joints_and_hands_are_saved(tmp_path):
    monitor, key = FakeMonitor(), Key("seen", 0)
    rig, ledger = (
        GraphRig(monitor, ("left", "right"), HAND, print, {}),
        Ledger(tmp_path, {"task": "stack_cups"}),
    )
    rig.start("stack", ledger.file(key, ".mp4"))
    for n in range(100):
        for number, arm in enumerate(("left", "right")):
            for offset, topic in enumerate(("joint_states", "joint_reference")):
                opening = float(n // 25 % 2) if topic == "joint_reference" and arm == "left" else 0.01 * n
                position = [0.01 * n + number + 10 * offset] * 7 + [opening]
                message = JointState(position=position)
                message.header.stamp.sec, message.header.stamp.nanosec = 7, n * 10_000_000
                monitor.joints[arm, topic](message)
    measured = rig.save(ledger, key)
    with np.load(ledger.file(key, ".npz")) as saved:
        assert list(saved["arms"]) == ["left", "right"] and saved["time_s"][0] == 0.0
        state, commanded, seconds = saved["state"], saved["commanded"], saved["time_s"]
    assert state.shape == commanded.shape == (len(seconds), 2, 8) and len(seconds) == 15
    assert measured == measure(state[:, :, :7].reshape(-1, 14), commanded[:, :, 7], 15.0, HAND)
    assert measured["jerk_rms"] < 1e-6 and measured["retries"] == 0
    assert np.allclose(commanded[:, :, :7], state[:, :, :7] + 10)
    assert np.allclose(commanded[:, 1, 7], seconds) and np.allclose(state[:, :, 7], seconds[:, None])


def test_arms_that_told_nothing_leave_nothing_to_measure(tmp_path):
    rig, ledger = GraphRig(FakeMonitor(), ("left", "right"), HAND, print, {}), Ledger(tmp_path, {"task": "a"})
    assert set(rig.save(ledger, Key("seen", 0)).values()) == {None}
