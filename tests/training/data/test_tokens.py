"""The released stage-2 data, as the official data code names and orders it."""

import json

import numpy as np
import pytest

from training.data.episode import DataError
from training.data.tokens import JsonlTokens, cache_key

KEYS = [  # from the official code's own examples
    ("fractal", "processed/episode_000032/images/0000.png", "fractal20220817_data_episode_000032_0000.png"),
    ("ssv2", "20bn-something-something-v2-frames/157360/000059.jpg", "157360_000059.jpg"),
    ("libero", "libero_goal_modified/images/ep00426/step0089.png", "libero_goal_ep00426_step0089.png"),
    ("bridge", "processed/episode_001234/images/0005.png", "bridge_episode_001234_0005.png"),
    ("kuka", "processed/episode_005678/images/0010.png", "kuka_episode_005678_0010.png"),
]


@pytest.mark.parametrize(("dataset", "path", "key"), KEYS)
def test_names_of_pictures(dataset, path, key):
    assert cache_key(dataset, path) == key


@pytest.fixture
def files(tmp_path):
    identifiers = {
        "fractal": "fractal/e/s",
        "ssv2": "ssv2_train/157360/s",
        "libero": "libero_goal/e/s",
    }
    rng = np.random.default_rng(0)
    lines, codes = [], {}
    for dataset, path, key in KEYS:
        codes[key] = rng.integers(0, 8192, 256).tolist()
        lines.append(
            {
                "id": identifiers.get(dataset, f"{dataset}/episode/step"),
                "instruction": f"<s> You are a helpful assistant. ... `{dataset} 拿起` ASSISTANT:",
                "image": [path, path],
                "latent_state": [path],
                "latent_action_idxs": rng.integers(0, 8, 14 * 16).tolist(),
            }
        )
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    cache = "\n".join(json.dumps({"image_id": k, "image_encodings": v}) for k, v in codes.items())
    (tmp_path / "cache.jsonl").write_text(cache + '\n{"image_id": "cut off')
    return tmp_path, lines, codes


def test_samples(files):
    folder, lines, codes = files
    for _ in range(2):  # the second time from the kept index
        tokens = JsonlTokens(folder / "data.jsonl", folder / "cache.jsonl", folder / "index")
        assert len(tokens) == 5
        for number, (_, _, key) in enumerate(KEYS):
            sample = tokens[number]
            assert sample["prompt"] == lines[number]["instruction"]
            np.testing.assert_array_equal(sample["codes"], [codes[key]] * 3)
            np.testing.assert_array_equal(sample["latents"].ravel(), lines[number]["latent_action_idxs"])
            assert sample["latents"].shape == (14, 16)


def test_what_is_missing_is_named(files):
    folder, lines, _ = files
    lines[0]["image"][0] = "processed/episode_000099/images/0000.png"
    lines[1]["latent_action_idxs"] = [1, 2, 3]
    del lines[2]["latent_state"]
    lines[3]["id"] = "droid/1"
    (folder / "bad.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    tokens = JsonlTokens(folder / "bad.jsonl", folder / "cache.jsonl", folder / "index")
    for number, what in enumerate(["has no picture fractal", "3 latent codes", "latent_state", "droid/1"]):
        with pytest.raises(DataError, match=what):
            tokens[number]
    with pytest.raises(DataError, match="no such file"):
        JsonlTokens(folder / "none.jsonl", folder / "cache.jsonl")
