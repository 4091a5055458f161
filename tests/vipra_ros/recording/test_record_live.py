"""`vipra record` at its keyboard: the recorder node on real Fast DDS, camera and arms of the test's own."""

import array
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from mcap.reader import make_reader
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState

from config.loading import load
from config.task import Task
from episodes import demonstration
from episodes.reader import Dataset
from simulation.tasks.trial import make_trial, placing
from tests.vipra_ros.graph import Graph, write_robot
from tests.vipra_ros.recording.streams import SIZE, capture_of, commanded, measured, picture
from vipra_ros.clock import to_stamp
from vipra_ros.process import wait_for
from vipra_ros.robot.commands import joint_names

pytestmark = pytest.mark.live

ARMS = ("left", "right")


class Robot:
    """Publishes what `streams` show, on the monotonic clock."""

    def __init__(self, graph: Graph):
        node = graph.node
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)

        def make():
            images = node.create_publisher(Image, "/front_camera/image_raw", qos_profile_sensor_data)
            status = node.create_publisher(DiagnosticStatus, "/arms/status", latched)
            topics = [(arm, f"/{arm}/joint_{kind}") for arm in ARMS for kind in ("states", "reference")]
            return images, status, {t: node.create_publisher(JointState, t[1], 10) for t in topics}

        self._images, self._status, self._joints = graph.do(make)
        self._end = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._film, self._move)]
        for thread in self._threads:
            thread.start()

    def _film(self) -> None:
        due = time.monotonic()
        while not self._end.wait(max(0.0, due - time.monotonic())):
            t = round(time.monotonic(), 3)
            image = Image(width=SIZE[1], height=SIZE[0], step=3 * SIZE[1], encoding="rgb8")
            image.header.stamp.sec, image.header.stamp.nanosec = to_stamp(t)
            image.data = array.array("B", picture(t).tobytes())
            self._images.publish(image)
            due += 1 / 30

    def _move(self) -> None:
        status = DiagnosticStatus(name="arms", message="running")
        status.values = [KeyValue(key="state", value="RUNNING")]
        self._status.publish(status)
        while not self._end.wait(0.01):
            t = time.monotonic()
            for (arm, topic), publisher in self._joints.items():
                message = JointState(name=joint_names(arm))
                message.header.stamp.sec, message.header.stamp.nanosec = to_stamp(t)
                message.position = (measured if topic.endswith("states") else commanded)(t).tolist()
                publisher.publish(message)

    def close(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


class Terminal:
    """`vipra record` with its keys on a pipe."""

    def __init__(self, graph: Graph, *arguments: str, cwd):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vipra_ros.cli", "record", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **graph.env(), "PYTHONPATH": os.getcwd()},
        )
        self.said = ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.said += line.decode()

    def key(self, key: str, *answers: str) -> None:
        """Press a key; wait until something new is said that holds one of `answers`."""
        before = len(self.said)
        self._process.stdin.write(key.encode())
        self._process.stdin.flush()
        self.wait(*answers, after=before)

    def wait(self, *answers: str, after: int = 0) -> None:
        def heard() -> bool:
            return any(answer in self.said[after:] for answer in answers)

        try:
            wait_for(lambda: heard() or self._process.poll() is not None, 60, " or ".join(answers))
        except Exception as error:
            error.add_note(self.said)
            raise
        if self._process.poll() is not None:  # its last words may not have been read yet
            self._thread.join(20)
        assert heard(), self.said

    def end(self) -> int:
        self._process.stdin.close()
        self._process.wait(40)
        self._thread.join()
        self._process.stdout.close()
        return self._process.returncode


@pytest.fixture
def graph():
    with Graph() as graph:
        yield graph


def test_an_episode_from_the_keyboard(graph, tmp_path):
    size = {"width": SIZE[1], "height": SIZE[0], "rate_hz": 30}
    robot = write_robot(tmp_path, camera={"source": "file", "path": "none.mp4", **size})
    robot_in, cups = ["--robot", robot, "--target", "3"], tmp_path / "cups"
    streams = Robot(graph)
    try:
        terminal = Terminal(graph, str(cups), "--task", "stack the cups", "--raw", *robot_in, cwd=tmp_path)
        terminal.wait("ready")
        terminal.key("k", "cannot keep now (IDLE): start first")
        terminal.key(" ", "recording episode 1: stack the cups")
        time.sleep(2.5)
        terminal.key(" ", "keep or discard?")
        terminal.key("q", "press q again")
        terminal.key("k", "saving", "keep again")
        if "keep again" in terminal.said:  # this machine was too busy to show every picture
            terminal.key("k", "saving")
        terminal.wait("kept episode 1")
        second = Terminal(graph, str(cups), "--task", "stack", *robot_in, cwd=tmp_path)
        second.wait("another writer (process ")
        assert second.end() == 1
        third = Terminal(graph, str(tmp_path / "bowls"), "--task", "place_in_bowl", *robot_in, cwd=tmp_path)
        trial = make_trial(load(Task, "place_in_bowl"), 10_000, template=None)
        third.wait("ready")
        third.wait(f"set up for episode 1: {trial.instruction}")
        third.wait(*placing(trial))
        statuses = graph.collect(DiagnosticStatus, "/recorder/status", 10)

        def aware() -> bool:
            return len({s.hardware_id for s in statuses if "another recorder runs" in s.message}) == 2

        wait_for(aware, 60, "the recorders knowing of each other")
        third.key(" ", "another recorder runs in this graph")
        third.key("q", "")
        assert third.end() == 0
        terminal.key("q", "")
        assert terminal.end() == 0
    finally:
        streams.close()
    data = Dataset(cups)
    length = data.rows[0].length
    assert length > 20
    (log,) = (cups / "raw").glob("*.mcap")
    with log.open("rb") as file:
        logged = Counter(channel.topic for _, channel, _ in make_reader(file).iter_messages())
    assert set(logged) == {f"/{arm}/joint_{kind}" for arm in ARMS for kind in ("states", "reference")}
    assert min(logged.values()) > 100
    captured = data.values(0, demonstration.CAPTURE)
    states, actions = data.values(0, demonstration.STATE), data.values(0, demonstration.ACTION)
    pictures = data.frames(0, demonstration.CAMERA, range(length))
    new = np.flatnonzero(np.diff(captured, prepend=0.0) > 0)  # lost pictures are repeated
    for i in new:
        assert round(1000 * capture_of(pictures[i])) == round(1000 * captured[i]) % 2**20
        for arm in (0, 1):
            # samples are 10 ms apart: the joints move by at most 0.8 rad/s
            slack = 3e-3 + 0.8 * float(data.values(0, demonstration.SYNC)[i])
            np.testing.assert_allclose(
                states[i, 8 * arm : 8 * arm + 7], measured(captured[i])[:7], atol=slack
            )
            np.testing.assert_allclose(
                actions[i, 8 * arm : 8 * arm + 7], commanded(captured[i])[:7], atol=slack
            )
