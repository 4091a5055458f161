"""What stage 3 takes from datasets as demonstrations, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config.dataset import Mixture
from models.config import VQGANConfig
from models.vqgan import VQGAN
from tests.training.data import made
from tests.training.data.made import ROBOT
from training import distributed
from training.actions import read_corpus
from training.data.sampling import Samples
from training.data.windows import Clips
from training.run import TrainingError


@pytest.fixture
def read():
    """read(path, **options of the dataset, mixture={}) -> (training, held out, what was said)."""
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(16, (8, 16), 1, 8, 64, norm_groups=4))
    ranks, said = distributed.start("cpu"), []
    log = SimpleNamespace(say=said.append, track=lambda items, _: items)

    def call(path, mixture=(), relative=False, more=None, **options):
        data = Mixture(datasets=[{"path": str(path), **options}, *([more] if more else [])], **dict(mixture))
        return *read_corpus(data, ROBOT, vqgan, ranks, log, relative), said

    yield call
    distributed.stop()


def frames(folder, episodes: int = 2, steps: int = 3, name: str = "images"):
    """Folders of frames with actions, no state and no instruction."""
    for number in range(episodes):
        made.pictures(folder / f"episode_{number}" / name, number, steps)
        np.save(folder / f"episode_{number}" / "actions.npy", made.actions(number, steps))
    return folder


def test_left_out_episodes_and_strides_are_those_of_the_other_stages(read, tmp_path):
    folder = frames(tmp_path / "f")
    frames(tmp_path / "f/short", 1, steps=1)
    (folder / "episode_1/instruction.txt").write_text("wipe")
    train, _, said = read(folder, rate_hz=5)
    assert list(train.episodes) == [(0, 0), (0, 1)] and "short/episode_0: has 1 frames, needs 2" in said[0]
    train, *_ = read(folder, rate_hz=5, instructed_only=True)
    assert [e.instruction for e in train.episodes.values()] == ["wipe"]
    with pytest.raises(
        TrainingError, match=r"datasets\.0\.stride is 2, stage 3 learns every recorded action"
    ):
        read(folder, rate_hz=5, stride=2)


def test_the_view_is_the_first_that_an_episode_has(read, tmp_path):
    folder = made.bridge(tmp_path / "bridge", 1)  # its image_2 is black: not a view of the episode
    wanted, *_ = read(folder, views=["image_0"])
    other, *_ = read(folder, views=["image_1"])
    found, _, said = read(folder, views=["image_2", "image_0"])
    assert not said and (found.episodes[0, 0].codes == wanted.episodes[0, 0].codes).all()
    assert (other.episodes[0, 0].codes != wanted.episodes[0, 0].codes).any()


def test_the_episodes_held_out_are_those_of_the_other_stages(read, tmp_path):
    folder = frames(tmp_path / "f", 20)
    share = {"validation_share": 0.25}
    data = Mixture(datasets=[{"path": str(folder), "rate_hz": 5}], **share)
    _, held, _ = read(folder, share, rate_hz=5)
    whole = set(held.episodes)
    broken = min(whole)
    (folder / f"{held.episodes[broken].key}/actions.npy").write_bytes(b"")
    train, held, _ = read(folder, share, rate_hz=5)
    assert set(held.episodes) == whole - {broken} and len(train.episodes) == 15
    samples = Samples(data, Clips(2, 16), 0, subset="validation")
    assert {(0, samples.place(n)[1]) for n in range(samples.sizes[0])} == whole


def test_one_dataset_of_another_rate_is_named_with_what_to_do(read, tmp_path):
    frames(tmp_path / "slow")
    read(tmp_path / "slow", rate_hz=5)
    more = {"path": str(frames(tmp_path / "fast")), "rate_hz": 10}
    with pytest.raises(TrainingError, match=r"fast/episode_0 was recorded at 10 Hz, .*: correct rate_hz"):
        read(tmp_path / "slow", rate_hz=5, more=more)


def test_relative_actions_need_a_state(read, tmp_path):
    folder = frames(tmp_path / "f")
    train, *_ = read(folder, rate_hz=5)
    assert len(train.episodes) == 2 and not train.episodes[0, 0].states.any()
    with pytest.raises(
        TrainingError, match=r"no state for representation: relative: .*datasets\.0\.state_key"
    ):
        read(folder, relative=True, rate_hz=5)
    train, *_ = read(made.bridge(tmp_path / "bridge", 2), relative=True)
    assert (train.episodes[0, 1].states == 1).all()
