"""A sitting from start to dataset: what is kept, what is flagged, what survives trouble."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import yaml

from config.loading import ConfigError, load
from config.recording import Quality, Recording
from config.robot import Robot
from config.task import Region, Task
from episodes import demonstration
from episodes.layout import EpisodesError
from episodes.reader import Dataset
from simulation.tasks.trial import make_trial, placing
from tests.vipra_ros.recording.streams import (
    CAMERA_HZ,
    HANDS,
    NAMES,
    SIZE,
    Streams,
    capture_of,
    commanded,
    measured,
    picture,
)
from vipra_ros.process import wait_for
from vipra_ros.recording import setups
from vipra_ros.recording.session import Refused, Session, State
from vipra_ros.recording.synchronizer import Synchronizer
from vipra_ros.recording.worker import Worker, open_writer

FRANKA = load(Robot, "franka_single")


def words(task: str) -> setups.Setups:
    return setups.read(Recording(task=task), FRANKA)


class Rig:
    """Streams, session and dataset in one folder."""

    def __init__(self, root, **config):
        self.root, self.free = root, 10e9
        said = {"task": "stack the cups", "queue_frames": 1000} | config
        self.config = Recording(dataset=str(root), **said)
        self.synchronizer = Synchronizer(15.0, CAMERA_HZ, HANDS)
        self.streams = Streams(self.synchronizer, jitter_s=0.002)
        writer = open_writer(root, NAMES, "test_arm", 15, SIZE, crf=10)
        self.worker = Worker(writer, Quality(), self.config.queue_frames)
        self.session = Session(
            self.config,
            setups.read(self.config, FRANKA),
            self.synchronizer,
            self.worker,
            root,
            lambda _: int(self.free),
        )
        self.run(0.2)

    def run(self, seconds: float) -> None:
        self.streams.run(seconds, self.session.poll)

    def settle(self) -> State:
        """Until the worker has nothing left to do."""

        def settled() -> bool:
            self.session.poll(self.streams.now)
            return self.session.state not in (State.FINISHING, State.SAVING)

        wait_for(settled, 60, "the writer", poll_s=0.002)
        return self.session.state

    def record(self, seconds: float) -> State:
        self.session.start(self.streams.now)
        self.run(seconds)
        self.session.stop()
        return self.settle()

    def keep(self) -> State:
        self.session.keep()
        return self.settle()


def test_it_is_ready_once_every_stream_has_come(rig):
    assert rig.session.message == "ready"
    early = Session(
        rig.config,
        setups.read(rig.config, FRANKA),
        Synchronizer(15.0, CAMERA_HZ, HANDS),
        rig.worker,
        rig.root,
    )
    early.poll(rig.streams.now)
    assert early.message == "waiting for camera and arms"
    with pytest.raises(Refused, match="nothing comes on front camera"):
        early.start(rig.streams.now)


@contextlib.contextmanager
def full_disk():
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most[1]))  # as a full disk does
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path / "cups")
    yield rig
    rig.worker.close()


def test_an_episode_comes_back_with_action_i_at_frame_i(rig):
    assert rig.record(3.0) is State.PENDING
    assert rig.session.last[1] == []
    assert rig.keep() is State.IDLE
    assert rig.session.message == "kept episode 1, number 0 in the dataset"
    data = Dataset(rig.root)
    assert (data.fps, data.info["robot_type"], data.names("action")) == (15, "test_arm", NAMES)
    length = data.rows[0].length
    assert length == rig.session.frames >= 43
    assert set(data.tasks(0)) == {"stack the cups"}
    pictures = data.frames(0, demonstration.CAMERA, range(length))
    captured = data.values(0, demonstration.CAPTURE)
    states, actions = data.values(0, demonstration.STATE), data.values(0, demonstration.ACTION)
    for i in range(length):
        assert capture_of(pictures[i]) == pytest.approx(captured[i], abs=6e-4)
    np.testing.assert_allclose(states, [measured(t) for t in captured], atol=3e-4)
    wanted = np.array([commanded(t) for t in captured])
    np.testing.assert_allclose(actions[:, :7], wanted[:, :7], atol=3e-4)
    # no shift fits better than none: a tick moves the joints by up to 0.05 rad
    errors = {k: np.abs(np.roll(actions, k, 0)[2:-2, :7] - wanted[2:-2, :7]).max() for k in (-1, 0, 1)}
    assert errors[0] < 0.02 * min(errors[-1], errors[1])
    due = data.values(0, "timestamp") + captured[0]
    assert np.abs(due - captured).max() < 0.01
    assert data.values(0, demonstration.SYNC).max() < 0.01
    assert rig.session.sync_p99_ms() < 10


def test_a_camera_frozen_in_the_middle_is_never_kept_silently(tmp_path):
    rig = Rig(tmp_path / "cups", keep_clean=True)
    rig.streams.freeze = lambda t: min(t, 101.2) if t < 102.2 else t
    assert rig.record(3.0) is State.PENDING
    assert [f.kind for f in rig.session.flags] == ["frozen"]
    with pytest.raises(Refused, match=r"camera frozen at .* while an arm moved .*keep again"):
        rig.session.keep()
    assert rig.worker.episodes == 0
    assert rig.keep() is State.IDLE
    assert rig.worker.episodes == 1
    assert rig.record(2.0) is State.IDLE  # a clean one is kept at once here
    assert rig.worker.episodes == 2
    rig.worker.close()


def test_lost_pictures_and_a_stopped_arm_flag_the_episode(rig):
    rig.streams.lose = lambda t: 101.0 < t < 101.3
    rig.session.start(rig.streams.now)
    rig.run(2.0)
    rig.session.on_arms("FAULT", "collision: right")
    assert rig.settle() is State.PENDING
    assert {f.kind for f in rig.session.flags} == {"dropped", "stopped"}
    assert "collision: right" in rig.session.message
    with pytest.raises(Refused, match=r"arms are stopped \(collision: right\): vipra recover"):
        rig.session.retry(rig.streams.now)


@pytest.mark.parametrize(
    ("arms", "teleop", "flagged"),
    [
        ("HOLDING", ("LOST", "right leader silent"), "arms held: LOST: right leader silent"),
        ("HOLDING", ("FOLLOWING", "following"), "arms held: HOLDING: let go"),  # its node died
        ("IDLE", ("", ""), "arms held: IDLE: let go"),  # no teleoperation runs
        ("IDLE", ("PAUSED", "clutch"), ""),
        ("RUNNING", ("LOST", "right leader silent"), ""),  # another commander
    ],
)
def test_arms_that_lost_their_commands_flag_the_episode(rig, arms, teleop, flagged):
    rig.session.on_arms("RUNNING", "running")
    rig.session.start(rig.streams.now)
    rig.run(0.2)
    rig.session.on_arms("HOLDING", "out of actions")  # for the length of a late chunk: the arms go on
    rig.run(0.3)
    rig.session.on_arms("RUNNING", "running")
    rig.run(0.1)
    rig.session.on_teleop(*teleop)
    rig.session.on_arms(arms, "let go")
    rig.run(0.6)
    assert rig.session.warnings(rig.streams.now) == ([flagged] if flagged else [])
    rig.session.stop()
    assert rig.settle() is State.PENDING
    assert [f.text for f in rig.session.flags] == ([flagged] if flagged else [])
    if flagged:
        with pytest.raises(Refused, match="keep again"):
            rig.session.keep()
    assert rig.keep() is State.IDLE


def test_discard_undo_retry_and_pause(rig):
    rig.record(1.5)
    rig.session.discard()
    rig.session.undo()
    assert rig.keep() is State.IDLE
    rig.session.start(rig.streams.now)
    rig.run(0.7)
    rig.session.retry(rig.streams.now)
    rig.run(0.7)
    rig.session.pause()
    rig.run(1.0)
    rig.session.pause()
    rig.run(0.7)
    rig.session.stop()
    rig.settle()
    assert 18 <= rig.session.frames <= 22
    assert [f.kind for f in rig.session.flags] == ["gap"]  # the arm went on while it was left out
    rig.session.discard()
    assert rig.worker.episodes == 1
    with pytest.raises(Refused, match="start first"):
        rig.session.stop()


def test_a_task_files_trials_follow_each_other_over_days(tmp_path):
    """Episode n shows trial 10000 + n: the next one once it is kept, also when the dataset is continued."""
    task = load(Task, "stack_cups")
    trials = [make_trial(task, 10_000 + n, template=None) for n in range(3)]
    assert len({trial.instruction for trial in trials}) == 3
    for day in (0, 2):
        rig = Rig(tmp_path / "cups", task="stack_cups")
        for n in range(day, 2):
            trial = trials[n]
            assert rig.session.setup.lines == (task.protocol.set_up, *placing(trial), task.protocol.reset)
            rig.record(1.2), rig.session.discard()
            assert rig.session.setup.instruction == trial.instruction
            rig.record(1.2), rig.keep()
        assert rig.session.setup.instruction == trials[2].instruction
        rig.worker.close()
    data = Dataset(tmp_path / "cups")
    assert [set(data.tasks(n)) for n in range(2)] == [{trials[0].instruction}, {trials[1].instruction}]


def test_a_task_for_other_arms_or_in_simulation_is_refused():
    for robot, problem in (
        ("franka_bimanual", "stack_cups is for arms right, the robot has left, right: name another"),
        ("sim_single", "this robot is simulated: give the words .* vipra dataset generate stack_cups"),
    ):
        with pytest.raises(ConfigError, match=problem):
            setups.read(Recording(task="stack_cups"), load(Robot, robot))


def test_trials_whose_objects_do_not_fit_are_refused_before_the_first_one(tmp_path):
    task = load(Task, "stack_cups")
    region = Region(min_xy=(0.4, -0.12), max_xy=(0.5, 0.12))
    tight = task.model_copy(update={"seen": task.seen.model_copy(update={"region": region})})
    make_trial(tight, 10_000)  # the first one fits
    path = tmp_path / "tight.yaml"
    path.write_text(yaml.safe_dump(tight.model_dump(mode="json")))
    with pytest.raises(ConfigError, match="do not fit their regions: lower it, or enlarge `region`"):
        setups.read(Recording(task=str(path), target=60), FRANKA)


def test_nothing_starts_without_task_streams_or_room(rig):
    session = rig.session
    session.change_task(words(" "))
    with pytest.raises(Refused, match="task is empty"):
        session.start(rig.streams.now)
    session.change_task(words("stack"))
    rig.free = 100e6
    with pytest.raises(Refused, match=r"100 MB are free .* 500 MB are needed"):
        session.start(rig.streams.now)
    rig.free = 10e9
    rig.streams.lose = lambda t: True
    rig.run(0.8)
    with pytest.raises(Refused, match="nothing comes on front camera: "):
        session.start(rig.streams.now)
    assert session.warnings(rig.streams.now) == ["front camera is silent"]


def test_a_disk_that_fills_ends_the_episode_which_can_be_kept(rig):
    rig.session.start(rig.streams.now)
    rig.run(1.5)
    rig.free = 400e6
    rig.run(1.0)
    assert rig.settle() is State.PENDING
    assert "disk nearly full, 400 MB left" in rig.session.message
    assert rig.keep() is State.IDLE
    assert 20 <= Dataset(rig.root).rows[0].length <= 32


def test_a_save_that_fails_can_be_tried_again(rig, monkeypatch):
    rig.record(1.5)
    real = os.replace

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert rig.keep() is State.PENDING
    assert "No space left" in rig.session.message and "keep again" in rig.session.message
    monkeypatch.setattr(os, "replace", real)
    assert rig.keep() is State.IDLE
    assert len(Dataset(rig.root)) == 1


def test_an_episode_whose_video_could_not_be_completed_is_never_saved(rig):
    rig.session.start(rig.streams.now)
    rig.run(0.5)
    with full_disk():
        rig.session.stop()
        assert rig.settle() is State.PENDING
    assert "the episode's video could not be completed" in rig.session.warnings(rig.streams.now)[0]
    with pytest.raises(Refused, match=r"cannot be kept: .*: discard it"):
        rig.session.keep()
    rig.session.discard()
    rig.record(0.5)
    assert rig.keep() is State.IDLE
    data = Dataset(rig.root)
    assert len(data.frames(0, demonstration.CAMERA, range(data.rows[0].length))) == rig.session.frames


def test_a_disk_that_fills_before_the_episode_is_kept_costs_nothing(rig):
    rig.record(0.5)
    with full_disk():
        assert rig.keep() is State.PENDING
    assert "free the disk and keep again" in rig.session.message
    assert rig.keep() is State.IDLE
    data = Dataset(rig.root)
    assert len(data.frames(0, demonstration.CAMERA, range(data.rows[0].length))) == rig.session.frames


@pytest.mark.parametrize("ahead_s", [0.3, 1.7e9])
def test_pictures_stamped_by_another_clock_are_not_recorded(rig, ahead_s):
    rig.session.start(rig.streams.now)
    rig.run(1.0)
    rig.synchronizer.add_picture(picture(0.0), rig.streams.now + ahead_s)
    rig.session.poll(rig.streams.now)
    assert rig.settle() is State.PENDING
    assert [f.kind for f in rig.session.flags] == ["lost"]
    assert f"front camera is stamped {ahead_s:.1f} s ahead of this clock" in rig.session.message
    rig.session.discard()
    with pytest.raises(Refused, match="front camera is stamped"):
        rig.session.start(rig.streams.now)


def test_an_encoder_that_is_too_slow_ends_the_episode_and_flags_it(rig, monkeypatch):
    free, add = threading.Event(), rig.worker._writer.add
    monkeypatch.setattr(rig.worker._writer, "add", lambda *frame: (free.wait(), add(*frame)))
    monkeypatch.setattr(rig.worker, "_capacity", 20)
    rig.session.start(rig.streams.now)
    rig.run(3.0)
    assert rig.session.state is State.FINISHING
    free.set()
    assert rig.settle() is State.PENDING
    assert [f.kind for f in rig.session.flags] == ["lost"]
    assert rig.session.frames == len(rig.worker.trace()) >= 15


def test_frames_that_could_not_be_written_are_never_kept(rig, monkeypatch):
    written, add = [], rig.worker._writer.add

    def fill(*frame):
        if len(written) == 10:
            raise OSError(28, "No space left on device")
        written.append(add(*frame))

    monkeypatch.setattr(rig.worker._writer, "add", fill)
    rig.session.start(rig.streams.now)
    rig.run(0.8)
    wait_for(lambda: rig.worker.broken, 60, "the full disk", poll_s=0.002)
    rig.run(0.2)
    assert rig.settle() is State.PENDING
    assert "ended: " in rig.session.message and "No space left" in rig.session.message
    with pytest.raises(Refused, match=r"cannot be kept: .*No space left.*: discard it"):
        rig.session.keep()
    rig.session.discard()
    monkeypatch.setattr(rig.worker._writer, "add", add)
    assert rig.record(1.2) is State.PENDING  # room was made
    assert rig.keep() is State.IDLE and len(Dataset(rig.root)) == 1


def test_silent_streams_end_the_episode(rig):
    rig.session.start(rig.streams.now)
    rig.run(1.5)
    rig.streams.mute = lambda t: True
    rig.run(2.6)
    assert rig.settle() is State.PENDING
    assert "nothing came on /right/joint_states, /right/joint_reference" in rig.session.message
    assert [f.kind for f in rig.session.flags] == ["stale", "lost"]
    with pytest.raises(Refused, match=r"nothing came on /right/joint_states.* keep again"):
        rig.session.keep()


def test_a_dataset_is_continued_by_the_same_robot_only(rig):
    rig.record(1.2)
    rig.keep()
    with pytest.raises(EpisodesError, match=rf"another writer \(process {os.getpid()}\)"):
        open_writer(rig.root, NAMES, "test_arm", 15, SIZE, 23)
    rig.worker.close()
    with pytest.raises(EpisodesError, match="robot test_arm and other_arm"):
        open_writer(rig.root, NAMES, "other_arm", 15, SIZE, 23)
    with pytest.raises(EpisodesError, match="15 and 30 frames per second"):
        open_writer(rig.root, NAMES, "test_arm", 30, SIZE, 23)
    with pytest.raises(EpisodesError, match=r"shape \[48, 64, 3\] and \[96, 64, 3\]"):
        open_writer(rig.root, NAMES, "test_arm", 15, (96, 64), 23)
    empty = rig.root.with_name(
        "empty"
    )  # a start with the wrong robot leaves no episode, so nothing to keep to
    open_writer(empty, NAMES, "other_arm", 30, SIZE, 23).close()
    with open_writer(empty, NAMES, "test_arm", 15, SIZE, 23) as writer:
        assert (writer.info["robot_type"], writer.info["fps"]) == ("test_arm", 15)
    again = Rig(rig.root)
    again.record(1.2)
    again.keep()
    assert [row.length > 10 for row in Dataset(rig.root).rows] == [True, True]
    again.worker.close()


KILLED = """
import sys
from pathlib import Path
from tests.vipra_ros.recording.test_session import Rig
rig = Rig(Path(sys.argv[1]))
rig.record(1.2), rig.keep(), rig.session.start(rig.streams.now)
while True:
    rig.run(0.5)
    print("ready", rig.session.frames, flush=True)
"""


def test_kill_9_loses_the_running_episode_only(tmp_path):
    root = tmp_path / "cups"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(root)], stdout=subprocess.PIPE, cwd=os.getcwd(), text=True
    )
    assert child.stdout.readline().startswith("ready")
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(Dataset(root)) == 1
    rig = Rig(root)
    assert rig.record(1.2) is State.PENDING
    rig.keep()
    assert len(Dataset(root)) == 2
    rig.worker.close()
