"""docs/new_embodiment.md for an arm that is not a Franka: from its YAML to chunks that a kinematic stand-in
executes, through the real writer, `vipra train finetune`, the policy server and the robot side's own checks.
"""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from config.dataset import DatasetConfig
from config.embodiment import Embodiment
from config.loading import ConfigError, load, parse
from config.policy import Policy
from config.robot import Control
from config.robot import PolicyClient as PolicyConfig
from config.safety import Safety
from episodes import demonstration
from episodes.writer import Writer
from models import normalization
from policy_server.engine import Engine
from policy_server.router import Server
from tests.vipra_ros.stepped import KinematicArm, Robot
from training import cli
from training.actions import check_episode
from training.data.open import open_dataset
from training.run import TrainingError
from vipra_ros.commander import State, connect
from vipra_ros.robot.executor import ArmsExecutor
from vipra_ros.robot.executor import State as ArmsState
from vipra_ros.safety.limits import JointLimits

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BRIDGE = ROOT.parent / "shared" / "data" / "bridge_v2_sample"
START = ROOT / "checkpoints" / "vipra_tiny_single"
TASK, SIZE, FRAMES = "wave to the left", 64, 20
HOME = np.array([0.0, -1.57, 1.57, -1.57, -1.57, 0.0])
# Denavit-Hartenberg a, d in m and alpha of a UR5e (Universal Robots' support pages)
CHAIN = [
    (0.0, 0.1625, np.pi / 2),
    (-0.425, 0.0, 0.0),
    (-0.3922, 0.0, 0.0),
    (0.0, 0.1333, np.pi / 2),
    (0.0, 0.0997, -np.pi / 2),
    (0.0, 0.0996, 0.0),
]


def points(q: np.ndarray) -> np.ndarray:
    """Origins [7, 3] m of the chain's frames at `q` [6] rad."""
    place, found = np.eye(4), [np.zeros(3)]
    for (a, d, alpha), angle in zip(CHAIN, q, strict=True):
        c, s, ca, sa = np.cos(angle), np.sin(angle), np.cos(alpha), np.sin(alpha)
        step = [[c, -s * ca, s * sa, a * c], [s, c * ca, -c * sa, a * s], [0, sa, ca, d], [0, 0, 0, 1]]
        place = place @ np.array(step)
        found.append(place[:3, 3])
    return np.array(found)


def picture(q: np.ndarray) -> np.ndarray:
    """What a camera in front of the arm sees, uint8 RGB."""
    rgb = np.full((SIZE, SIZE, 3), 60, np.uint8)
    pixels = (np.array([32, 52]) + points(q)[:, [1, 2]] * [40, -40]).round().astype(np.int32)
    return cv2.polylines(rgb, [pixels.reshape(-1, 1, 2)], False, (230, 160, 40), 3)


def record(folder: Path, robot: Embodiment) -> None:
    """Two demonstrations: the arm waves, then closes its gripper."""
    features = demonstration.features(robot.names, SIZE, SIZE)
    with Writer.create(folder, round(robot.rate_hz), features, robot.name) as writer:
        for episode in range(2):
            for i in range(FRAMES):
                wave = 0.06 * np.sin(2 * np.pi * i / FRAMES + 0.3 * episode)
                q = HOME + wave * np.array([1.0, 0.5, -0.5, 0.2, 0.2, 0.5])
                action = np.append(q, float(i < FRAMES // 2)).astype(np.float32)
                frame = {
                    demonstration.CAMERA: picture(q),
                    demonstration.STATE: action,
                    demonstration.ACTION: action,
                    demonstration.CAPTURE: np.array([i / robot.rate_hz]),
                    demonstration.SYNC: np.zeros(1, np.float32),
                }
                writer.add(frame, TASK)
            writer.save()


def finetune(data: Path, out: Path, robot: Path, *sets: str) -> int:
    few = (
        "steps=6",
        "global_batch=4",
        "micro_batch=4",
        "samples=1",
        "schedule.warmup=1",
        "validation.every=6",
        "validation.samples=2",
        "checkpoint_every=100",
    )
    options = [option for text in (*few, *sets) for option in ("--set", text)]
    paths = ["--data", str(data), "--start", str(START), "--embodiment", str(robot), "--out", str(out)]
    run = ["--run", str(out.parent / "run"), "--device", "cpu"]
    return cli.main(["finetune", "finetune_tiny", *paths, *run, *options])


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_from_a_yaml_to_chunks_on_an_arm_that_is_not_a_franka(one_thread, tmp_path):
    body, safety = load(Embodiment, str(HERE / "ur.yaml")), load(Safety, str(HERE / "ur_safety.yaml"))
    record(tmp_path / "demos", body)
    assert finetune(tmp_path / "demos", tmp_path / "ours", HERE / "ur.yaml") == 0
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump({"checkpoint": str(tmp_path / "ours"), "device": "cpu", "threads": 1}))

    with Server(lambda: Engine.from_policy(load(Policy, str(policy))), "tcp://127.0.0.1:*") as server:
        assert server.ready.wait(120)
        config = PolicyConfig(server=server.endpoint, task=TASK, action_rate_hz=15.0, deadline_s=30.0)
        with connect(config, body) as client:
            metadata = client.hello(30.0)
            robot = Robot(body, safety, None, HOME, Patient(client), config, lambda t: picture(arm.q))
            arm = robot.arms["ur"]
            robot.commander.start()
            robot.run(2.0)

    assert (metadata.embodiment, metadata.action_names) == ("ur", body.names)
    assert robot.commander.state is State.RUNNING, robot.commander.reason
    assert robot.executor.state is ArmsState.RUNNING and not robot.executor.faults
    assert len(robot.chunks) >= 3
    low, high = (np.array(side)[:6] for side in (metadata.limits.action_low, metadata.limits.action_high))
    assert (np.abs(0.5 * (low + high) - HOME) < 0.05).all() and (high - low < 0.2).all()  # as demonstrated
    limits, q = JointLimits.of(safety, 1), np.array([q for _, q in arm.told])
    speed = np.diff(q, axis=0) / 0.005
    assert (np.abs(speed) <= limits.velocity).all()
    assert (np.abs(np.diff(speed, axis=0)) / 0.005 <= 1.5 * limits.acceleration).all()
    assert (q > low - 0.02).all() and (q < high + 0.02).all()
    assert np.ptp(q, axis=0).max() > 0.005  # it does move


class Patient:
    """The client, waiting for each answer: the stand-in's clock does not run meanwhile."""

    def __init__(self, client):
        self.client, self.outcomes = client, []
        self.hello, self.cancel = client.hello, client.cancel

    @property
    def metadata(self):
        return self.client.metadata

    def submit(self, *arguments):
        seq = self.client.submit(*arguments)
        self.outcomes += self.client.poll(30.0)
        return seq

    def prefetch(self, picture, task):
        return False

    def poll(self):
        outcomes, self.outcomes = self.outcomes, []
        return outcomes


@pytest.mark.parametrize(
    ("low", "word"),
    [
        (-0.001, "embodiment ur allows -0.001 to 6.2832 rad"),
        (None, "ur.yaml: dimensions.0.kind: Input should be"),
    ],
)
def test_demonstrations_that_are_not_the_embodiments_end_the_run_with_one_line(
    low, word, one_thread, tmp_path
):
    data = yaml.safe_load((HERE / "ur.yaml").read_text())
    if low is None:
        data["dimensions"][0]["kind"] = "degrees"
    else:
        data["dimensions"][0]["low"] = low
    robot = tmp_path / "ur.yaml"
    robot.write_text(yaml.safe_dump(data))
    record(tmp_path / "demos", load(Embodiment, str(HERE / "ur.yaml")))
    with pytest.raises((ConfigError, TrainingError)) as error:
        finetune(tmp_path / "demos", tmp_path / "ours", robot)
    assert word in str(error.value) and not (tmp_path / "ours").exists()


def test_limits_of_another_arm_are_refused():
    safety = load(Safety, str(HERE / "ur_safety.yaml"))
    with pytest.raises(ConfigError, match="limits are for arms of 6 joints, right has 7"):
        ArmsExecutor(
            {"right": KinematicArm(np.zeros(7))}, {}, {"right": np.zeros(7)}, None, Control(), safety, None
        )


def test_a_history_between_two_frames_is_refused_with_the_nearest_one():
    shipped = load(Embodiment, "franka_delta").model_dump()
    for rate_hz, seconds, fix in ((5.0, 0.0666667, "0.2 is 1"), (15.0, 0.1, "0.1333333 is 2")):
        with pytest.raises(ConfigError, match=f"history_seconds .* frames at rate_hz {rate_hz:g}, .*: {fix}"):
            parse(Embodiment, shipped | {"rate_hz": rate_hz, "history_seconds": seconds}, "mine.yaml")
    assert parse(Embodiment, shipped | {"rate_hz": 30.0}, "mine.yaml").history_seconds == 0.0666667


@pytest.mark.skipif(not BRIDGE.is_dir(), reason="needs ../shared/data/bridge_v2_sample")
def test_bridge_fits_the_end_effector_embodiment_and_is_clipped_to_what_it_showed():
    body = load(Embodiment, "franka_delta").model_copy(update={"rate_hz": 5.0, "history_seconds": 0.2})
    loose = body.model_copy(
        update={"dimensions": tuple(_times(d, 5) if d.kind == "rotation" else d for d in body.dimensions)}
    )
    reader = open_dataset(DatasetConfig(path=str(BRIDGE)))
    episodes = [reader.episode(i) for i in range(len(reader))]
    for episode in episodes:
        check_episode(episode.key, episode, loose)
    with pytest.raises(TrainingError, match=r"right_fr3_yaw is -0\.2.* allows -0\.2 to 0\.2 rad/action"):
        for episode in episodes:
            check_episode(episode.key, episode, body)
    actions, kinds = np.stack([e.actions for e in episodes]), tuple(d.kind for d in body.dimensions)
    low, high = np.array(loose.limits)
    fitted = normalization.fit(actions, body.names, kinds, ranges=high - low)
    np.testing.assert_allclose(fitted.scale[:6], actions[..., :6].std((0, 1)), rtol=1e-4)
    shown = actions[..., :6].reshape(-1, 6)
    span = np.ptp(shown, axis=0)
    far = fitted.denormalize(np.full((1, 14, 7), 1e3))[0, 0]
    np.testing.assert_allclose(far[:6], shown.max(0) + 0.05 * span, rtol=1e-4)  # 1 mm and not 2 cm more
    assert far[6] == 1.0
    with pytest.raises(normalization.NormalizationError, match="steps are relative already"):
        normalization.fit(actions, body.names, kinds, np.zeros((len(actions), 7)))


def _times(dimension, factor: float):
    return dimension.model_copy(update={"low": factor * dimension.low, "high": factor * dimension.high})
