"""`vipra imagine` end to end on a small random checkpoint, with a real video and with pictures."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models import imagine, sequence
from models.checkpoint import CheckpointError, init_checkpoint
from models.imagine import ImagineError
from models.normalization import unfitted
from models.tokenizer import Tokenizer
from tests.models.sizes import small

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
VIDEO = DATA / "lerobot_v3_video/videos/observation.images.front/chunk-000/file-000.mp4"
EMBODIMENT = """
name: one
horizon: 14
rate_hz: 20.0
history_seconds: 0.1
dimensions: [{name: joint1, kind: joint}, {name: grip, kind: gripper}]
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    prompt = sequence.PROMPT.format(task="stack the cups")
    return Tokenizer.train([prompt, "<vision></vision> <dynamics></dynamics> <action>"], 300)


@pytest.fixture(scope="module")
def pretrained(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "pretrained"
    init_checkpoint(small(action_heads="none", latent_tokens=4), folder, tokenizer, None, None)
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """300 frames at 20 Hz: a recorded one, or made here where there is none."""
    if VIDEO.is_file():
        return VIDEO
    path = tmp_path_factory.mktemp("video") / "made.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 20.0, (64, 64))
    for i in range(300):
        writer.write(np.full((64, 64, 3), i % 250, np.uint8))
    writer.release()
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """20 frames of 24 x 32 px whose brightness is their index."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(20):
        cv2.imwrite(str(folder / f"{i:04d}.png"), np.full((24, 32, 3), 10 * i, np.uint8))
    (folder / "notes.txt").write_text("not a picture")
    return folder


def run(folder: Path, out: Path, *options) -> dict:
    words = [
        str(folder),
        "--task",
        "stack the cups",
        "--device",
        "cpu",
        "--out",
        str(out),
        *map(str, options),
    ]
    assert imagine.main(words) == 0
    return json.loads((out / "latents.json").read_text())


def test_a_video_gives_pictures_numbers_and_latent_codes(pretrained, video, tmp_path, capsys):
    found = run(pretrained, tmp_path / "a", "--video", video, "--at", "1.0", "--history-seconds", "0.05")
    latents = np.array(found["latents"])
    assert latents.shape == (14, 4) and latents.min() >= 0 and latents.max() < 8
    assert (found["at"], found["predicted_at"], found["variant"]) == (1.0, 1.7, "full")
    assert cv2.imread(str(tmp_path / "a/predicted.png")).shape == (16, 16, 3)
    assert cv2.imread(str(tmp_path / "a/side_by_side.png")).shape[1] == 3 * 256
    said = capsys.readouterr().out
    assert "action heads none. It was pretrained on video and cannot act yet" in said
    numbers = found["comparison"]
    assert f"{numbers['codes_right']}/16" in said and f"{numbers['l1_copying']:.2f}" in said
    again = run(pretrained, tmp_path / "b", "--video", video, "--at", "1.0", "--history-seconds", "0.05")
    assert again == found
    assert (tmp_path / "a/predicted.png").read_bytes() == (tmp_path / "b/predicted.png").read_bytes()


def test_numbers_compare_with_the_frame_h_steps_ahead(pretrained, pictures, tmp_path):
    found = run(pretrained, tmp_path, "--frames", pictures, "--at", 3)
    assert (found["at"], found["predicted_at"]) == (3, 17)
    assert found["comparison"]["l1_copying"] == 140
    predicted = cv2.imread(str(tmp_path / "predicted.png")).astype(float)
    assert found["comparison"]["l1"] == pytest.approx(np.abs(predicted - 170).mean())


def test_footage_that_ends_before_the_predicted_frame_still_gives_it(pretrained, pictures, tmp_path, capsys):
    found = run(pretrained, tmp_path, "--frames", pictures, "--at", 10)
    assert found["comparison"] is None and (tmp_path / "predicted.png").exists()
    assert cv2.imread(str(tmp_path / "side_by_side.png")).shape[1] == 2 * 256
    assert "footage ends before the predicted frame" in capsys.readouterr().out


def test_variants_imagine_what_they_were_trained_for(pretrained, pictures, tmp_path):
    found = run(pretrained, tmp_path / "sp2", "--frames", pictures, "--variant", "sp2")
    assert len(found["latents"]) == 14 and not (tmp_path / "sp2/predicted.png").exists()
    found = run(pretrained, tmp_path / "la", "--frames", pictures, "--variant", "la")
    assert found["latents"] is None and (tmp_path / "la/predicted.png").exists()


def test_draws_differ_by_seed_and_repeat(pretrained, pictures, tmp_path):
    def draw(seed):
        options = ("--frames", pictures, "--temperature", 5, "--top-k", 6, "--seed", seed)
        return run(pretrained, tmp_path / "drawn", *options)["latents"]

    first = draw(1)
    assert first == draw(1) != draw(2)


def test_a_finetuned_checkpoint_brings_its_own_times(tokenizer, video, tmp_path, capsys):
    config = small(action_dim=2, latent_tokens=4)
    normalizer = unfitted(("joint1", "grip"), ("joint", "gripper"))
    init_checkpoint(config, tmp_path / "finetuned", tokenizer, normalizer, EMBODIMENT)
    found = run(tmp_path / "finetuned", tmp_path / "out", "--video", video)
    assert (found["at"], found["predicted_at"]) == (0.1, 0.8)
    assert "action heads flow. It was finetuned to act" in capsys.readouterr().out


def test_video_frames_are_the_nearest_in_time(video):
    (a, b, c), _ = imagine.read_video(video, [0.05, 0.26, 14.95])
    capture = cv2.VideoCapture(str(video))
    everything = []
    while (read := capture.read())[0]:
        everything.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    assert len(everything) == 300
    for frame, index in ((a, 1), (b, 5), (c, 299)):
        assert np.array_equal(frame, everything[index])
    frames, length = imagine.read_video(video, [14.9, 15.2])
    assert frames[1] is None and length == pytest.approx(15.0)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--video", "VIDEO"], "--history-seconds is needed: this checkpoint carries no embodiment"),
        (
            ["--video", "VIDEO", "--history-seconds", "0.2", "--at", "0.1"],
            r"--at 0.1: .* use --at 0.2 or more",
        ),
        (["--video", "VIDEO", "--history-seconds", "0.2", "--at", "99"], "--at 99: the footage has 15 s"),
        (["--video", "nowhere.mp4", "--history-seconds", "0.2"], "nowhere.mp4: no such file"),
        (["--video", "README", "--history-seconds", "0.2"], "no video that OpenCV can decode"),
        (["--video", "VIDEO", "--history-seconds", "-1"], "--history-seconds -1 must be positive"),
        (["--frames", "PICTURES", "--at", "20"], "--at 20: the footage has 20 frames"),
        (["--frames", "PICTURES", "--at", "0"], r"--at 0: .* use --at 1 or more"),
        (["--frames", "nowhere"], "--frames nowhere: no folder with"),
        (["--frames", "PICTURES", "--temperature", "-1"], "must not be negative"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    pretrained, video, pictures, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    Path("README").write_text("no video")
    words = [{"VIDEO": str(video), "PICTURES": str(pictures)}.get(word, word) for word in options]
    with pytest.raises(ImagineError, match=message) as caught:
        run(pretrained, tmp_path / "out", *words)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_not_there_is_refused(pictures, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        run(tmp_path / "nothing", tmp_path / "out", "--frames", pictures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(pretrained, pictures, tmp_path):
    with pytest.raises(ImagineError, match="torch sees no GPU here"):
        run(pretrained, tmp_path / "out", "--frames", pictures, "--device", "cuda")
