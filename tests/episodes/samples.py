"""Small datasets for these tests: the ones lerobot wrote, and ours."""

from pathlib import Path

import numpy as np
import pytest

from episodes import layout
from episodes.writer import Writer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CAMERA = "observation.images.front"
NAMES = ("x", "y", "gripper")


def reference(kind: str) -> Path:
    """A dataset that lerobot itself wrote, or skip. kind: video or images."""
    path = SHARED / f"lerobot_v3_{kind}"
    if not path.is_dir():
        pytest.skip(f"no dataset written by lerobot at {path}")
    return path


def create(root: Path, video: bool = True, **limits) -> Writer:
    features = {
        CAMERA: layout.camera(48, 64, video),
        "observation.state": layout.vector(NAMES),
        "action": layout.vector(NAMES),
    }
    return Writer.create(root, 10, features, "test_arm", **limits)


def frame(episode: int, index: int) -> dict[str, np.ndarray]:
    """Vectors and a picture that tell episode and index: a bar at 4 * index px, brightness by episode."""
    rgb = np.full((48, 64, 3), 40 * (episode % 5), np.uint8)
    rgb[:, 4 * (index % 15) : 4 * (index % 15) + 4] = 255
    return {
        CAMERA: rgb,
        "observation.state": np.array([episode, index, 0.5]),
        "action": np.array([episode, index + 1, 1.0]),
    }


def record(writer: Writer, episode: int, frames: int = 12) -> int:
    for index in range(frames):
        writer.add(frame(episode, index), f"task {episode % 2}")
    return writer.save()


def bar_at(rgb: np.ndarray) -> int:
    """The index that `frame` drew."""
    return int(rgb[..., 0].astype(float).mean(0).reshape(-1, 4).mean(1).argmax())
