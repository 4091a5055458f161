"""A cropped embodiment: training and serving show the policy the very same pixels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.standin import StandIn
from config.dataset import DatasetConfig, Mixture
from config.embodiment import Crop, Embodiment
from config.loading import ConfigError, load, parse
from config.robot import PolicyClient as PolicyConfig
from config.safety import Safety
from episodes import demonstration, layout
from episodes.writer import Writer
from models.config import SIZES
from models.vqgan import VQGAN
from policy_server import protocol
from training.actions import encode
from training.data.open import open_dataset
from training.data.sampling import Samples
from training.data.windows import Chunks
from vipra_ros.commander import ArmsStatus, Commander
from vipra_ros.execution.planner import Planner
from vipra_ros.safety.supervisor import Supervisor

ROBOT = "franka_single_workspace"
SIDE = SIZES["vipra_sim"].vqgan.image_size
HOME = np.array([0.0, -0.785398, 0.0, -2.356194, 0.0, 1.570796, 0.785398, 1.0])


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 360, 640, 3), np.uint8)


def recorded(root, robot: Embodiment, pictures: np.ndarray) -> None:
    """A dataset of one episode, its pictures as PNG, so that they come back bit for bit."""
    features = demonstration.features(robot.names, *pictures.shape[1:3])
    features[demonstration.CAMERA] = layout.camera(*pictures.shape[1:3], video=False)
    with Writer.create(root, 15, features, robot.name) as writer:
        for i, picture in enumerate(pictures):
            state = HOME.astype(np.float32)
            row = {demonstration.CAMERA: picture, demonstration.STATE: state, demonstration.ACTION: state}
            row |= {demonstration.CAPTURE: np.array([i / 15]), demonstration.SYNC: np.zeros(1, np.float32)}
            writer.add(row, "stack")
        writer.save()


def asked(robot: Embodiment, pictures: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What a commander sends ahead and in requests, of a camera that shows `pictures`, 15 a second."""
    clock, ahead, requests = SimpleNamespace(t=10.0), [], []
    clock.now = lambda: clock.t
    client = SimpleNamespace(
        metadata=StandIn(ROBOT, image_size=(SIDE, SIDE), supports_prefetch=True).metadata,
        hello=lambda timeout_s: None,
        submit=lambda pictures, *_: requests.append(pictures) or 0,
        prefetch=lambda picture, task: ahead.append(picture) or True,
        poll=list,
    )
    config = PolicyConfig(task="stack")
    gate = Supervisor(load(Safety, "fr3"), ("right",), None, HOME[:7], clock.t)
    planner = Planner(config, robot.horizon, 1 / 15)
    commander = Commander(config, robot, ("right",), client, planner, gate, clock, lambda *_: None)
    commander.start()
    planner.precedes_request = lambda *_: True
    for picture in pictures:
        commander.on_picture(picture, clock.t)
        commander.on_joints("right", clock.t, HOME)
        commander.on_arms(ArmsStatus("HOLDING", "", commander.lease or "", clock.t, -1, ""))
        commander.tick()
        if commander.wants_lease:
            commander.granted("lease:0")
        clock.t += 1 / 15
    return ahead, requests


def test_training_and_serving_cut_the_same_pixels(tmp_path):
    robot, pictures = load(Embodiment, ROBOT), noise(4)
    recorded(tmp_path / "data", robot, pictures)
    mixture = Mixture(datasets=(DatasetConfig(path=str(tmp_path / "data")),)).seen_through(robot.crop)

    samples = Samples(mixture, Chunks(robot.horizon, SIDE, robot.history_seconds), seed=0)
    trained = {t: samples.read(0, 0, t)["frames"] for t in range(len(pictures))}
    vqgan = VQGAN(SIZES["vipra_sim"].vqgan)
    codes = encode(vqgan, open_dataset(mixture.datasets[0]).episode(0).frames("front", range(4)))

    ahead, requests = asked(robot, pictures)
    at = next(t for t in trained if np.array_equal(trained[t], requests[0]))
    assert at > 0 and requests[0].shape == (2, SIDE, SIDE, 3)
    served = vqgan.encode(vqgan.to_input(torch.from_numpy(requests[0])))
    np.testing.assert_array_equal(served, codes[[at - 1, at]])
    assert any(np.array_equal(ahead[0], pair[1]) for pair in trained.values())


def test_the_crop_travels_with_the_policy_and_spares_datasets_that_name_their_own():
    robot = load(Embodiment, ROBOT)
    metadata = StandIn(ROBOT).metadata
    again = protocol.decode(protocol.encode(metadata.model_copy(update={"session": "s"})), protocol.REPLIES)
    assert again.crop == robot.crop and StandIn("franka_single").metadata.crop is None

    whole = Crop(left=0, top=0, width=1, height=1)
    mixture = Mixture(datasets=(DatasetConfig(path="a"), DatasetConfig(path="b", crop=whole)))
    assert [d.crop for d in mixture.seen_through(robot.crop).datasets] == [robot.crop, whole]


def test_a_crop_outside_the_picture_is_refused():
    with pytest.raises(ConfigError, match="left \\+ width"):
        parse(Crop, {"left": 0.5, "top": 0, "width": 0.6, "height": 1}, "crop")
