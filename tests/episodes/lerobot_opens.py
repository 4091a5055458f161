"""Opens datasets with the `lerobot` library and compares what it gives with what our reader gives.

    LEROBOT_PYTHON lerobot_opens.py expected.json DATASET

Run by test_lerobot.py with an interpreter that has lerobot (its pins differ from ours, so it lives in an
environment of its own): python3.12 -m venv lerobot; lerobot/bin/pip install lerobot==0.4.4.
"""

import json
import sys

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def main(expected_path: str, root: str) -> None:
    with open(expected_path) as file:
        expected = json.load(file)
    data = LeRobotDataset("local/check", root=root, video_backend="pyav")
    assert data.num_episodes == expected["episodes"], data.num_episodes
    assert len(data) == expected["frames"], len(data)
    for entry in expected["samples"]:
        item = data[entry["index"]]
        assert item["task"] == entry["task"], item["task"]
        for key, value in entry["values"].items():  # it makes every number a float32
            assert item[key].reshape(-1).tolist() == torch.tensor(value, dtype=item[key].dtype).tolist(), key
        mean = [float(v) * 255 for v in item[expected["camera"]].mean((1, 2))]
        assert max(abs(a - b) for a, b in zip(mean, entry["mean"], strict=True)) < 3, (mean, entry["mean"])
        for key, value in entry["values"].items():
            assert list(data.meta.stats[key]["mean"].shape) == [len(value)], key
    print(f"lerobot opened {root}: {len(data)} frames")


if __name__ == "__main__":
    main(*sys.argv[1:])
