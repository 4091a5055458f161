"""A step's code, action and motion belong to the same two frames."""

from pathlib import Path

import numpy as np
import pytest

from config.dataset import DatasetConfig, Mixture
from tests.training.analysis.scenes import SIDE, WAYS, Mover, moving_square
from training.analysis import transitions
from training.analysis.arrays import AnalysisError
from training.analysis.codes import directions
from training.data.augment import prepare
from training.data.open import open_dataset

LEROBOT = Path(__file__).parents[4] / "shared" / "data" / "lerobot_v3_images"


@pytest.mark.parametrize("clip_frames", [2, 4, 5, 8, 20])
def test_codes_stay_with_their_steps_however_windows_fall(clip_frames):
    there = moving_square("right", 0, 7)
    back = there[::-1][1:]
    codes = transitions.encode(Mover(), np.concatenate([there, back]), clip_frames)
    ways = list(WAYS)
    assert codes[:, 0].tolist() == [ways.index("right")] * 6 + [ways.index("left")] * 6


@pytest.mark.skipif(not LEROBOT.is_dir(), reason=f"no LeRobot sample at {LEROBOT}")
def test_actions_and_motion_are_those_of_the_steps():
    config = DatasetConfig(path=str(LEROBOT), stride=3)
    steps = transitions.read(Mover(), Mixture(datasets=(config,)), actions="absolute", motion=True)
    reader = open_dataset(config)
    at, first = 0, 0
    for index in range(len(reader)):
        episode = reader.episode(index)
        starts = np.arange(0, episode.length - 3, 3)
        rows = slice(at, at + len(starts))
        assert np.allclose(
            steps.actions[rows], episode.actions[starts + 3] - episode.actions[starts], atol=1e-6
        )
        assert (steps.episodes[rows] == first).all()
        frames = prepare(episode.frames(reader.views[0], [*starts, starts[-1] + 3]), SIDE)
        expected = directions(
            np.stack([transitions.clip_motion(frames[i : i + 2])[0] for i in range(len(starts))])
        )
        assert directions(steps.motion[rows]).tolist() == expected.tolist()
        at, first = at + len(starts), first + 1
    assert at == len(steps.codes) == len(steps.latents)
    with pytest.raises(AnalysisError, match="either absolute or deltas"):
        transitions.read(Mover(), Mixture(datasets=(config,)), actions="relative")
