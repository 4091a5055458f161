"""The lerobot library opens what we write, unchanged. It needs its own environment: lerobot_opens.py."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from episodes.reader import Dataset
from tests.episodes import samples
from tests.episodes.samples import CAMERA

SCRIPT = Path(__file__).with_name("lerobot_opens.py")


@pytest.fixture
def interpreter() -> str:
    if found := os.environ.get("LEROBOT_PYTHON"):
        return found
    if importlib.util.find_spec("lerobot") is None:
        pytest.skip("lerobot is not installed; name a Python that has it in LEROBOT_PYTHON")
    return sys.executable


@pytest.mark.parametrize("video", [True, False])
def test_lerobot_opens_what_we_write(tmp_path, interpreter, video):
    root = tmp_path / "d"
    with samples.create(root, video) as writer:
        for number in range(3):
            samples.record(writer, number)
    data = Dataset(root)
    expected = {"episodes": 3, "frames": 36, "camera": CAMERA, "samples": []}
    for episode, index in ((0, 0), (1, 5), (2, 11)):
        expected["samples"].append(
            {
                "index": data.rows[episode].first + index,
                "task": data.tasks(episode)[index],
                "action": data.values(episode, "action")[index].tolist(),
                "mean": data.frames(episode, CAMERA, [index])[0].mean((0, 1)).tolist(),
            }
        )
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    command = [interpreter, str(SCRIPT), str(tmp_path / "expected.json"), str(root)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "36 frames" in done.stdout
