"""Every stage in sequence, a step or two each, on episodes of two squares that two hands push about."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from config.embodiment import Embodiment
from config.loading import load
from config.workcell import Workcell
from episodes import demonstration, layout
from episodes.writer import Writer
from models import checkpoint
from policy_server.engine import Engine
from policy_server.scheduler import Request
from training import tiny, truth
from vipra_ros import cli

EPISODES, FRAMES, STRIDE = 20, 14, 3
SUMMARY = {
    "latent": {"codes_used", "reconstruction_l1", "copy_last_l1", "probe_nmse", "shuffled_nmse"},
    "pretrain": {"image_loss_first", "image_loss_last", "latent_loss_first", "latent_loss_last"},
    "finetune": {"fm_loss_first", "fm_loss_last", "open_loop_mse", "mean_action_mse"},
}
SHORT = {
    "tokenizer": ("steps=2", "global_batch=2", "micro_batch=2", "validation.samples=2"),
    "latent": ("steps=2", "global_batch=2", "micro_batch=2", "validation.samples=2", "log_every=1"),
    "pretrain": ("steps=2", "global_batch=2", "micro_batch=2", "validation.samples=2", "log_every=1"),
    "finetune": ("steps=2", "global_batch=2", "micro_batch=2", "validation.samples=2", "log_every=1"),
}


def write_demonstrations(folder: Path) -> None:
    """What the generator would write, without its renderer."""
    rng = np.random.default_rng(0)
    robot = load(Embodiment, "franka_bimanual")
    low, high = map(np.array, robot.limits)
    features = demonstration.features(robot.names, 64, 64)
    scene = load(Workcell, "bimanual")
    things = [*(f"{arm}_hand" for arm in scene.arms), *(p.name for p in scene.props)]
    features[truth.PLACES] = layout.vector([f"{name}_{axis}" for name in things for axis in "xyz"])
    with Writer.create(folder, 15, features, "franka_bimanual") as writer:
        for _ in range(EPISODES):
            at, goal = rng.uniform(4, 50, (2, 2, 2))
            for t in range(FRAMES):
                places = at + (goal - at) * t / FRAMES
                frame = np.full((64, 64, 3), 40, np.uint8)
                for (x, y), colour in zip(places.astype(int), ((220, 40, 40), (40, 40, 220)), strict=True):
                    frame[y : y + 10, x : x + 10] = colour
                share = np.resize(places.ravel() / 64, len(low))
                joints = (low + share * (high - low)).astype(np.float32)
                row = {
                    demonstration.CAMERA: frame,
                    demonstration.STATE: joints,
                    demonstration.ACTION: joints,
                    demonstration.CAPTURE: np.array([t / 15]),
                    demonstration.SYNC: np.zeros(1, np.float32),
                    truth.PLACES: np.resize(places.ravel() / 64, 3 * len(things)).astype(np.float32),
                }
                writer.add(row, "push the squares")
            writer.save()


@pytest.fixture
def commands(monkeypatch):
    """Commands run in this process, in turn; what was run, by its verb."""
    run = []

    def together(several: list[list[str]]) -> None:
        for command in several:
            words = command[command.index("vipra_ros.cli") + 1 :] if "vipra_ros.cli" in command else []
            if words:  # all but the generator
                run.append(" ".join(words[:2]) if words[0] in ("train", "analyze") else words[0])
                assert cli.app(words, standalone_mode=False) in (0, None)

    monkeypatch.setattr(tiny, "together", together)
    monkeypatch.setattr(tiny, "BUDGET", SHORT)
    monkeypatch.setattr(tiny, "STRIDE", STRIDE)
    monkeypatch.setattr(tiny, "BRIDGE", Path("absent"))
    return run


def train_tiny(out: Path, monkeypatch) -> None:
    given = ["--out", str(out), "--episodes", str(EPISODES), "--label-episodes", "4"]
    monkeypatch.setattr(sys, "argv", ["tiny", *given])
    tiny.main()


def test_every_stage_follows_the_last_and_what_is_finished_stays(tmp_path, commands, monkeypatch):
    write_demonstrations(tmp_path / "demonstrations")
    train_tiny(tmp_path, monkeypatch)
    stages = ["train tokenizer", "train latent", "label", "train pretrain", "train finetune"]
    assert commands == [*stages, "analyze transfer"]
    found = json.loads((tmp_path / "summary.json").read_text())
    assert {stage: set(values) for stage, values in found.items()} == SUMMARY
    assert all(math.isfinite(v) for values in found.values() for v in values.values())
    details = json.loads((tmp_path / "details.json").read_text())
    assert details["gate"]["limit_mm"] == truth.LIMIT_MM and set(details["gate"]["tokens_mm"]) >= {"red_cup"}
    assert {p.stem for p in (tmp_path / "pictures").iterdir()} == {*tiny.PICTURES, "losses"}
    engine = Engine(checkpoint.load(tmp_path / "policy"))
    (chunk,) = engine.infer([Request(np.zeros((2, 64, 64, 3), np.uint8), "push the squares", seed=0)])
    assert chunk.actions.shape == (14, 16) and np.isfinite(chunk.actions).all()

    commands.clear()
    before = json.loads((tmp_path / "summary.json").read_text())
    shutil.rmtree(tmp_path / "policy")  # as if the last stage had been cut off
    train_tiny(tmp_path, monkeypatch)
    assert commands == ["train finetune", "analyze transfer"]
    assert json.loads((tmp_path / "summary.json").read_text())["latent"] == before["latent"]
