"""The fast generator writes a LeRobot dataset of motions towards things, and goes on where it stopped.

In processes of its own: MuJoCo's renderer and torch do not share one.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config.dataset import DatasetConfig
from config.embodiment import Embodiment
from config.loading import load
from training.data.open import open_dataset

ROOT = Path(__file__).resolve().parents[3]
RATE = 15


def generate(out: Path, episodes: int) -> None:
    command = [sys.executable, "-m", "training.simulated", "--robot", "sim_single"]
    command += ["--image-size", "96", "--steps", "45", "--kinds", "pick", "push", "circles", "--workers", "1"]
    command += ["--episodes", str(episodes), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("simulated") / "d"
    generate(out, 2)
    first = (out / "data/chunk-000/file-000.parquet").read_bytes()
    generate(out, 3)
    assert (out / "data/chunk-000/file-000.parquet").read_bytes() != first
    return open_dataset(DatasetConfig(path=str(out)))


def test_it_is_the_embodiments_dataset(dataset):
    embodiment = load(Embodiment, "franka_single")
    assert len(dataset) == 3
    assert dataset.action_names == embodiment.names
    for index in range(3):
        episode = dataset.episode(index)
        assert episode.length == 45
        assert episode.rate_hz == pytest.approx(RATE, rel=1e-3)
        assert np.abs(np.diff(episode.actions[:, :7], axis=0)).max() * RATE <= 2.0 + 1e-3
        assert ((episode.actions[:, 7] == 0) | (episode.actions[:, 7] == 1)).all()
    words = [dataset.episode(i).instruction for i in range(3)]
    assert words[0].startswith("pick up the ")
    assert words[1].startswith("push the ")
    assert words[2] == "move the right hand in circles"


def test_the_hand_moves_the_thing_it_is_told_to(dataset):
    """The named cup's pixels end elsewhere: higher in the picture when picked up, aside when pushed."""
    for index in range(2):
        episode = dataset.episode(index)
        colour = ("red", "green", "blue").index(episode.instruction.split(" the ")[1].split()[0])
        before, after = (_centre(f, colour) for f in episode.frames("front", [0, episode.length - 1]))
        moved = after - before
        if episode.instruction.startswith("pick"):
            assert moved[0] < -1.0, (episode.instruction, moved)
        else:
            left = "left" in episode.instruction  # the camera looks at the robot: its left is to the right
            assert (moved[1] > 1.0) if left else (moved[1] < -1.0), (episode.instruction, moved)


def _centre(rgb: np.ndarray, channel: int) -> np.ndarray:
    """(row, column) of what is mostly of one colour."""
    values = rgb.astype(int)
    excess = values[..., channel] - values[..., [c for c in range(3) if c != channel]].max(-1)
    return np.argwhere(excess > max(excess.max() / 2, 12)).mean(0)
