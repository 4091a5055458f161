"""Each command of `vipra analyze` on real footage, from folders to figure and JSON."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from config.dataset import DatasetConfig, Mixture
from config.embodiment import Embodiment
from models import bins, checkpoint, normalization
from models.checkpoint import init_checkpoint
from models.config import SIZES
from models.latent_action import folder
from models.latent_action.model import LatentActionModel
from models.sequence import PROMPT
from models.tokenizer import Tokenizer
from policy_server.engine import Engine
from policy_server.scheduler import Request
from tests.models.latent_action.sizes import small
from training.analysis import replay
from training.analysis.arrays import AnalysisError
from training.analysis.cli import main
from training.data.open import open_dataset
from training.data.sampling import held_out

ROOT = Path(__file__).parents[3]
BRIDGE = ROOT.parent / "shared" / "data" / "bridge_v2_sample"
GRIPPER = 6

bridge = pytest.mark.skipif(not BRIDGE.is_dir(), reason=f"no Bridge sample at {BRIDGE}")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def latent(tmp_path_factory) -> Path:
    """A latent action model of random weights, whose codes are spread over what it sees."""
    torch.manual_seed(0)
    model = LatentActionModel(small(residual=True)).eval()
    reader = open_dataset(DatasetConfig(path=str(BRIDGE)))
    frames = reader.episode(0).frames("image_0", range(8))
    small_frames = np.stack([cv2.resize(frame, (32, 32)) for frame in frames])
    with torch.no_grad():
        clip = torch.from_numpy(small_frames)[None].permute(0, 1, 4, 2, 3).float() / 255
        seen = model.encoder(clip)[0].flatten(0, -2)
        model.quantizer.codebook.copy_(seen[torch.randperm(len(seen))[:8]])
    path = tmp_path_factory.mktemp("latent") / "model"
    folder.save(path, model)
    return path


def policy(path: Path, heads: str) -> Path:
    """A policy of random weights for the Bridge sample's robot."""
    actions = np.concatenate(
        [e.actions for e in map(open_dataset(DatasetConfig(path=str(BRIDGE))).episode, range(9))]
    )
    robot = Embodiment(
        name="widowx",
        horizon=4,
        rate_hz=5,
        history_seconds=0.2,
        dimensions=[{"name": f"x{i}", "kind": "joint"} for i in range(GRIPPER)]
        + [{"name": "grip", "kind": "gripper"}],
    )
    kinds = tuple(d.kind for d in robot.dimensions)
    discrete = bins.fit(actions, robot.names, kinds, 16) if heads == "ar" else None
    config = SIZES["vipra_tiny"].with_embodiment(
        7, 4, action_heads=heads, action_vocab=discrete.vocab if discrete else 0, representation="absolute"
    )
    init_checkpoint(
        config,
        path,
        Tokenizer.train([PROMPT, "<vision>", "</vision> <action>"], 400),
        normalization.fit(actions[:, None], robot.names, kinds),
        yaml.safe_dump(robot.model_dump(mode="json")),
        bins=discrete,
    )
    return path


def result(out: Path, name: str) -> dict:
    picture = cv2.imread(str(out / f"{name}.png"))
    assert picture is not None and picture.std() > 5, "an empty figure"
    return json.loads((out / f"{name}.json").read_text())


def say(*words) -> list[str]:
    return [str(word) for word in words]


@bridge
def test_codes_from_a_model_and_from_its_labels(latent, tmp_path):
    out = tmp_path / "a"
    assert main(say("codes", "--model", latent, "--data", BRIDGE, "--out", out, "--episodes", 12)) == 0
    found = result(out, "codes")
    assert found["steps"] == 12 * 9 and found["codes_used"] > 4
    assert np.array(found["usage_by_position"]).shape == (16, 8)
    assert sum(found["directions"].values()) > 50
    assert set(found["differences"]) == {"vertical - horizontal", "right - left", "up - down"}

    from training import distributed, label

    ranks = distributed.start("cpu")
    try:
        mixture = Mixture(datasets=(DatasetConfig(path=str(BRIDGE), max_episodes=2),))
        tokenizer = ROOT / "checkpoints" / "vipra_tiny_single"
        label.label(mixture, latent, tokenizer, tmp_path / "labels", 4, 16, 16, ranks, lambda line: None)
    finally:
        distributed.stop()
    assert main(say("codes", "--labels", tmp_path / "labels", "--out", out)) == 0
    found = result(out, "codes")
    assert found["steps"] == 2 * 9 and found["codebook_size"] == 8
    assert sum(found["directions"].values()) > 5


@bridge
def test_transfer(latent, tmp_path):
    arguments = say("transfer", "--model", latent, "--data", BRIDGE, "--held-out", 0.25, "--frames", 4)
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    found = result(tmp_path, "transfer")
    assert found["steps"] == 3 and 2 <= found["clips"] <= 6
    keys = [open_dataset(DatasetConfig(path=str(BRIDGE))).key(i) for i in range(25)]
    unseen = {key for key, out in zip(keys, held_out(keys, 0.25), strict=True) if out}
    assert {pair["source"] for pair in found["pairs"]} <= unseen
    for kind in ("transferred", "own", "target", "other_source"):
        assert -1 <= found[kind]["mean_cosine"] <= 1 and 0 <= found[kind]["same_way"] <= 1
    # an untrained residual decoder repeats the frame: what does not move points nowhere
    assert found["motion_of_rollouts"] == 0 and found["transferred"]["mean_cosine"] == 0
    assert len(found["pairs"]) == found["clips"]


@bridge
def test_information_of_two_models(latent, tmp_path):
    arguments = say("information", "--model", f"one={latent}", "--model", f"two={latent}", "--data", BRIDGE)
    options = say("--actions", "deltas", "--gripper", GRIPPER, "--seeds", 2, "--steps", 20, "--width", 16)
    assert main([*arguments, *options, "--out", str(tmp_path)]) == 0
    found = result(tmp_path, "information")["models"]
    assert found["one"] == found["two"], "the same model, the same seeds: the same numbers"
    one = found["one"]
    assert one["samples"] == 25 * 9 and one["episodes"] == 25
    assert set(one["bits"]) == {"ksg", "barber_agakov", "mine"}
    assert all(np.isfinite(list(numbers.values())).all() for numbers in one["bits"].values())
    assert one["shuffled_nmse"] == pytest.approx(1, abs=0.1) and one["probe_nmse"] < 1.3
    assert 0 < one["step_entropy_bits"] <= one["step_entropy_limit_bits"]


@bridge
def test_smoothness_of_a_continuous_and_a_discrete_policy(tmp_path):
    flow, discrete = policy(tmp_path / "flow", "flow"), policy(tmp_path / "ar", "ar")
    recorded = tmp_path / "recorded.npy"
    np.save(recorded, np.cumsum(np.random.default_rng(0).normal(0, 0.01, (2, 10, 7)), 1))
    arguments = say("smoothness", "--data", BRIDGE, "--policy", f"flow={flow}", "--policy", f"ar={discrete}")
    options = say("--actions", recorded, "--deltas", "--gripper", GRIPPER, "--episodes", 2)
    assert main([*arguments, *options, "--out", str(tmp_path)]) == 0
    found = result(tmp_path, "smoothness")
    assert list(found["measured"]) == ["demonstrated", "flow 2/4", "flow 4/4", "ar 2/4", "ar 4/4", "recorded"]
    assert found["rate_hz"] == pytest.approx(5)
    for numbers in found["measured"].values():
        assert numbers["actions"] == 20 and numbers["spectral_arc_length"] < -1
    assert all(found["measured"][name]["jerk_rms"] > 0 for name in ("demonstrated", "flow 2/4", "recorded"))
    assert found["measured"]["demonstrated"]["demonstration_error"] == 0
    assert found["measured"]["flow 2/4"]["demonstration_error"] > 0


@bridge
@pytest.mark.parametrize("heads", ["flow", "ar"])
def test_a_replayed_chunk_is_the_one_the_server_would_send(heads, tmp_path):
    path = policy(tmp_path / heads, heads)
    replayer = replay.load(path, batch=2)
    episode = open_dataset(DatasetConfig(path=str(BRIDGE))).episode(3)
    found = replay.chunks(replayer, episode, "image_0", 4, seed=5)
    assert found.shape == (3, 4, 7)
    engine = Engine(checkpoint.load(path, serving=True), max_batch=1)
    for chunk, (before, now) in zip(found, [(0, 0), (3, 4), (7, 8)], strict=True):
        images = episode.frames("image_0", [before, now])
        answer = engine.infer([Request(images, episode.instruction, 5, None)])[0].actions
        assert np.abs(chunk - answer).max() < 1e-4
    with pytest.raises(AnalysisError, match="give a shorter --task"):
        replay.chunks(replayer, episode, "image_0", 4, task="word " * 200)


def test_smoothness_of_recorded_arrays_alone(tmp_path):
    t = np.linspace(0, 1, 60)[:, None]
    np.save(tmp_path / "smooth.npy", (10 * t**3 - 15 * t**4 + 6 * t**5) * np.ones(7))
    arguments = say("smoothness", "--actions", tmp_path / "smooth.npy", "--out", tmp_path)
    with pytest.raises(AnalysisError, match="give --rate"):
        main(arguments)
    assert main([*arguments, "--rate", "15"]) == 0
    assert result(tmp_path, "smoothness")["measured"]["smooth"]["spectral_arc_length"] > -1.5


@bridge
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["codes"], "give --model and --data, or --labels"),
        (["codes", "--labels", "nowhere"], "nowhere: not the finished labels"),
        (["codes", "--model", "nowhere", "--data", BRIDGE], "nowhere does not exist"),
        (["transfer", "--model", "LATENT", "--data", BRIDGE, "--frames", 40], "has 10 frames, needs 40"),
        (["smoothness"], "give --data"),
        (["smoothness", "--policy", "x"], "--policy needs --data"),
        (["smoothness", "--actions", "gone.npy", "--rate", 5], "gone.npy: not an array"),
        (
            ["information", "--model", "LATENT", "--data", BRIDGE, "--gripper", 9],
            "gripper 9: the actions have",
        ),
        (["information", "--model", "LATENT", "--data", BRIDGE, "--episodes", 2], "18 samples, at least 20"),
    ],
)
def test_wrong_use_is_one_line(words, says, latent, tmp_path):
    words = [latent if word == "LATENT" else word for word in words]
    with pytest.raises(Exception, match=says) as failure:
        main([*say(*words), "--out", str(tmp_path / "out")])
    assert type(failure.value).__module__.split(".")[0] in ("models", "training") and "\n" not in str(
        failure.value
    )
    assert not list(tmp_path.rglob("*.json"))
