"""The lerobot library opens what we write, unchanged. It needs its own environment: lerobot_opens.py."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config.embodiment import Embodiment
from config.loading import load
from episodes import demonstration
from episodes.reader import Dataset
from tests.episodes import samples
from tests.episodes.samples import CAMERA
from vipra_ros.recording.worker import open_writer

SCRIPT = Path(__file__).with_name("lerobot_opens.py")


@pytest.fixture
def interpreter() -> str:
    if found := os.environ.get("LEROBOT_PYTHON"):
        return found
    if importlib.util.find_spec("lerobot") is None:
        pytest.skip("lerobot is not installed; name a Python that has it in LEROBOT_PYTHON")
    return sys.executable


def opened(interpreter: str, root: Path, samples: list[tuple[int, int]], folder: Path) -> str:
    """What lerobot says of the dataset at `root`, compared at these (episode, frame)."""
    data = Dataset(root)
    frames = sum(row.length for row in data.rows)
    expected = {"episodes": len(data), "frames": frames, "camera": CAMERA, "samples": []}
    for episode, index in samples:
        values = {key: np.ravel(data.values(episode, key)[index]).tolist() for key in data.vectors}
        expected["samples"].append(
            {
                "index": data.rows[episode].first + index,
                "task": data.tasks(episode)[index],
                "values": values,
                "mean": data.frames(episode, CAMERA, [index])[0].mean((0, 1)).tolist(),
            }
        )
    (folder / "expected.json").write_text(json.dumps(expected))
    command = [interpreter, str(SCRIPT), str(folder / "expected.json"), str(root)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("video", [True, False])
def test_lerobot_opens_what_we_write(tmp_path, interpreter, video):
    root = tmp_path / "d"
    with samples.create(root, video) as writer:
        for number in range(3):
            samples.record(writer, number)
    assert "36 frames" in opened(interpreter, root, [(0, 0), (1, 5), (2, 11)], tmp_path)


def test_lerobot_opens_what_the_recorder_writes(tmp_path, interpreter):
    root, embodiment = tmp_path / "d", load(Embodiment, "franka_bimanual")
    with open_writer(root, embodiment.names, embodiment.name, 15, (96, 128), crf=23) as writer:
        for number in range(2):
            for i in range(8):
                values = np.linspace(-1, 1, len(embodiment.names)) * (number + i / 8)
                row = {
                    demonstration.CAMERA: np.full((96, 128, 3), 20 * i, np.uint8),
                    demonstration.STATE: values,
                    demonstration.ACTION: values + 0.01,
                    demonstration.CAPTURE: [1e5 + i / 15],
                    demonstration.SYNC: [0.004],
                }
                writer.add(row, "stack the cups")
            writer.save()
    assert "16 frames" in opened(interpreter, root, [(0, 0), (1, 5)], tmp_path)
