"""One trial recorded through the nodes and one made by the fast generator are demonstrations of one kind."""

import contextlib
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.recorder import measure
from config.loading import load
from config.robot import Robot
from config.safety import Safety
from config.task import Task
from config.teleop import Teleop
from episodes.demonstration import ACTION, CAMERA, CAPTURE, STATE, SYNC
from episodes.reader import Dataset
from vipra_ros.recording import generate as generator
from vipra_ros.recording.generate import ATTEMPTS, ExpertFailed, Wanted
from vipra_ros.teleop import expert
from vipra_ros.teleop.expert import Operator, watching_hands
from vipra_ros.teleop.follow import Teleoperation

pytestmark = pytest.mark.live

SECONDS = 4.5  # of each: the hand closes after 3.6


def generate(folder, name: str, *options: str) -> Dataset:
    argv = [sys.executable, "-P", "-m", "vipra_ros.cli", "dataset", "generate", "stack_cups", name]
    argv += ["--episodes", "1", "--seconds", str(SECONDS), *options]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return Dataset(folder / name)


def lag_s(data: Dataset) -> float:
    """By which the joints follow the reference: middle of all frames in motion that are well synchronised."""
    t, error = data.values(0, CAPTURE).ravel(), data.values(0, SYNC).ravel()
    state, action = (data.values(0, key)[:, :7].astype(float) for key in (STATE, ACTION))
    new = np.append(True, np.diff(t) > 0)
    t, error, state, action = t[new], error[new], state[new], action[new]
    speed = np.gradient(action, t, axis=0)
    moving = (np.linalg.norm(speed, axis=1) > 0.2) & (error <= np.quantile(error, 0.75))
    along = (speed * (action - state)).sum(1)[moving] / (speed**2).sum(1)[moving]
    return float(np.median(along))


def compare_actions(live: Dataset, fast: Dataset) -> None:
    """The joints are told to go through the same ranges, and the hand to close once, at about one time."""
    joints = [data.values(0, ACTION)[:, :7] for data in (live, fast)]
    np.testing.assert_allclose(joints[0].min(0), joints[1].min(0), atol=0.05)  # of up to 1.2 rad
    np.testing.assert_allclose(joints[0].max(0), joints[1].max(0), atol=0.05)
    closed = []
    for data in (live, fast):
        hand = data.values(0, ACTION)[:, 7]
        assert (hand[0], hand[-1]) == (1, 0) and (np.diff(hand) <= 0).all()
        assert ((hand > 0) & (hand < 1)).sum() <= 1  # a trigger that is just being pulled
        closed.append(int((hand < 0.5).argmax()))
    assert abs(closed[0] - closed[1]) <= 15  # 1 s: a busy machine begins late


@pytest.mark.timeout(900)
def test_the_fast_generator_writes_what_the_recorder_writes(tmp_path):
    live = generate(tmp_path, "live", "--real-path", "--keep-flagged")  # a busy machine loses pictures
    fast = generate(tmp_path, "fast", "--workers", "1")
    assert live.info["features"] == fast.info["features"]
    assert (live.fps, live.info["robot_type"]) == (fast.fps, fast.info["robot_type"]) == (15, "franka_single")
    assert live.names(ACTION) == fast.names(ACTION) and live.rows[0].tasks == fast.rows[0].tasks
    joints = load(Safety, load(Robot, "sim_single").safety).joints
    low, high = np.array(joints.position_min_rad), np.array(joints.position_max_rad)
    for data in (live, fast):
        state, action = data.values(0, STATE), data.values(0, ACTION)
        assert len(state) > SECONDS * 15 - 4  # a busy machine ends it late
        assert (state[:, :7] > low).all() and (state[:, :7] < high).all()
        assert (action[:, :7] > low).all() and (action[:, :7] < high).all()
        hand = np.concatenate([state[:, 7], action[:, 7]])
        assert hand.min() >= 0 and hand.max() <= 1
        assert np.ptp(action[:, :7], axis=0).max() > 0.1 and np.abs(action - state)[:, :7].max() < 0.1
        assert np.median(np.diff(data.values(0, CAPTURE).ravel())) == pytest.approx(1 / 15, abs=0.01)
        assert -0.02 < lag_s(data) < 0.06  # a whole step would be 0.067
    compare_actions(live, fast)
    found = measure(fast)
    assert (found["dropped_frames"], found["gaps"], found["sync_error_ms_max"]) == (0, 0, 0)
    assert found["rate_hz"] == pytest.approx(15, rel=0.02) and measure(live)["frames"] == live.rows[0].length
    # the same trial: on the table, in front of the arm, places and colours are the same
    pictures = [data.frames(0, CAMERA, [0])[0][230:].astype(int) for data in (live, fast)]
    assert (np.abs(pictures[0] - pictures[1]).max(-1) > 40).mean() < 0.002


class Hand:
    """A world whose hand begins to move some samples after it was told."""

    arms = ("right",)

    def __init__(self, late: int):
        self._left = late

    def opening(self, arm: str) -> float:
        self._left -= 1
        return 1.0 if self._left > 0 else 0.8


def test_the_arm_waits_for_a_hand_that_was_told_to_move():
    def at(x, opening):
        return {"right": np.full(7, x)}, {"right": opening}

    told = [at(0.0, 1.0), at(0.1, 1.0), at(0.1, 0.0), at(0.1, 0.0), at(0.2, 0.0), at(0.3, 0.0)]
    seen = list(watching_hands(told, Hand(5), 25.0))
    positions = [float(joints["right"][0]) for joints, _ in seen]
    assert positions == [0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3]
    stuck = list(watching_hands(told, Hand(10_000), 25.0))  # a hand that does nothing is not waited for long
    assert len(told) + 29 <= len(stuck) <= len(told) + 31 and stuck[-1] == told[-1]


class Scripted(Operator):
    """Whose attempts all succeed; the recorder flags those that `flagged` names."""

    def __init__(self, flagged: set[int], keep_flagged: bool):
        self._wanted = Wanted(
            load(Task, "stack_cups"), load(Robot, "sim_single"), 1, keep_flagged=keep_flagged
        )
        self._flagged, self.done = flagged, []

    def _demonstrate(self, trial, style):
        self._attempt = style
        return SimpleNamespace(success=True)

    def _values(self, node):
        flagged = str(self._attempt in self._flagged).lower()
        return {"flagged": flagged, "last_length_s": "9.0", "last_findings": ""}

    def _keep(self):
        self.done.append("kept")

    def _discard(self):
        self.done.append("dropped")


def test_a_flagged_episode_is_kept_where_asked_for_only():
    said: list[str] = []
    operator = Scripted({0, 1}, keep_flagged=False)
    operator.record(0, said.append)
    assert operator.done == ["dropped", "dropped", "kept"]
    assert said == [*["episode 0: once more: flagged; 9.0 s"] * 2, "episode 0: 9.0 s"]
    operator = Scripted(set(range(ATTEMPTS)), keep_flagged=False)
    with pytest.raises(ExpertFailed, match=r"no episode in 3 attempts: .*--keep-flagged"):
        operator.record(0, said.append)
    assert operator.done == ["dropped"] * ATTEMPTS
    operator = Scripted({0}, keep_flagged=True)
    operator.record(0, said.append)
    assert operator.done == ["kept"] and said[-1] == "episode 0: flagged; 9.0 s"


def test_a_hand_that_stayed_closed_is_opened_before_the_next_episode():
    operator, played = Scripted(set(), False), []
    held = {"right": np.zeros(7)}, {"right": 1.0}
    operator._leaders = SimpleNamespace(
        held=held,
        rate_hz=25.0,
        play=lambda motion, _: played.extend(opening["right"] for _, opening in motion),
    )
    said = SimpleNamespace(message="following")
    operator._monitor = SimpleNamespace(status=lambda node: said)
    operator._free_hands()
    assert played == []
    config = load(Teleop, "gello_single")
    teleop = Teleoperation(config, ("right",), (True,), np.full(7, -3.0), np.full(7, 3.0))

    def lead(k: int, opening: float) -> None:
        teleop.add("right", k / config.rate_hz, np.zeros(7), opening)

    for k in range(10):
        lead(k, 1.0)
    teleop.engage(9 / config.rate_hz, np.zeros(7), told=np.zeros(1))  # it was closed last
    lead(10, 1.0), lead(11, 1.0)
    teleop.tick(11 / config.rate_hz)
    assert teleop.waiting_triggers == ("right",)  # what the node then says:
    said.message = "following; move the trigger to take over the right hand"
    operator._free_hands()
    for k, opening in enumerate(played, 12):
        lead(k, opening)
        chunk = teleop.tick(k / config.rate_hz)
    assert teleop.waiting_triggers == () and chunk.grippers[-1, 0] == 1.0


@pytest.fixture
def quick(monkeypatch):
    """The generator with threads for workers and pictures of 48x64; what they made, in order."""
    import simulation.render as render

    made: list[int] = []

    def make(wanted, number):
        made.append(number)
        values = np.full((4, 8), float(number))
        frames = np.full((4, 48, 64, 3), 10 * number, np.uint8)
        return generator.Episode(f"trial {number}", np.arange(4) / 15, frames, values, values)

    monkeypatch.setattr(render, "live_meshes", lambda cache: None)
    monkeypatch.setattr(generator, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(generator, "_make", make)
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    return made


def wanted(episodes: int) -> Wanted:
    robot = load(Robot, "sim_single")
    camera = robot.camera.model_copy(update={"width": 64, "height": 48})
    return Wanted(load(Task, "stack_cups"), robot.model_copy(update={"camera": camera}), episodes)


def test_an_interrupted_run_goes_on_and_the_queue_stays_short(tmp_path, quick, monkeypatch):
    make, root = generator._make, tmp_path / "d"

    def fails_at_2(wanted, number):
        if number == 2:
            raise ExpertFailed("trial 10002: the expert failed")
        return make(wanted, number)

    monkeypatch.setattr(generator, "_make", fails_at_2)
    with pytest.raises(ExpertFailed, match="trial 10002"):
        generator.generate(wanted(3), root, tmp_path, workers=1)
    assert len(Dataset(root)) == 2
    monkeypatch.setattr(generator, "_make", make)
    quick.clear()
    ahead: list[int] = []
    done = generator.generate(wanted(7), root, tmp_path, 1, lambda n: ahead.append(2 + len(quick) - n))
    assert done == 5 and quick == list(range(2, 7))
    assert max(ahead) <= 2  # of two a worker
    assert [row.tasks for row in Dataset(root).rows] == [(f"trial {n}",) for n in range(7)]
    assert generator.generate(wanted(7), root, tmp_path) == 0 and len(quick) == 5


def test_an_expert_that_fails_tries_every_style_and_says_which_trial(monkeypatch):
    styles: list[int] = []
    judge = SimpleNamespace(success=False)
    monkeypatch.setattr(generator, "_stage", SimpleNamespace(world=SimpleNamespace(judge=judge)))
    monkeypatch.setattr(generator, "_play", lambda stage, wanted, number, style: styles.append(style))
    with pytest.raises(ExpertFailed, match="stack_cups, trial 10007: the expert failed 3 times"):
        generator._make(wanted(8), 7)
    assert styles == [0, 1, 2]
    judge.success = True
    generator._make(wanted(8), 7)
    assert styles == [0, 1, 2, 0]


def test_another_graph_is_started_where_the_objects_shapes_are_others(tmp_path, monkeypatch):
    wanted = Wanted(load(Task, "cover_object"), load(Robot, "sim_single"), 6)
    shapes = [wanted.trial(n).workcell.shapes for n in range(6)]
    started: list[list[int]] = []

    @contextlib.contextmanager
    def graph(wanted, robot, task_file, root, first, tell):
        assert (robot, task_file) == ("sim_single", "mine.yaml")
        started.append([])
        yield SimpleNamespace(record=lambda number, tell: started[-1].append(number))

    monkeypatch.setattr(expert, "_operator", graph)
    assert expert.demonstrate(wanted, "sim_single", "mine.yaml", tmp_path / "new", print) == 6
    assert list(itertools.chain(*started)) == list(range(6)) and len(started) > 1
    for numbers in started:
        assert all(shapes[n] == shapes[numbers[0]] for n in numbers)
    assert all(shapes[a[-1]] != shapes[b[0]] for a, b in itertools.pairwise(started))
