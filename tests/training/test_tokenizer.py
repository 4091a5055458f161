"""Stage 0 learns to draw what it saw, and what it exports keeps its codes in half the bytes."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch

from config.training import TokenizerRecipe
from models import checkpoint
from models.config import SIZES, VQGANConfig
from training import distributed, loop, start, tokenizer
from training.run import Run

VQ = VQGANConfig(16, (8, 16), 1, 8, 32, norm_groups=4)
SMALL = dataclasses.replace(
    SIZES["vipra_tiny"], name="small", hidden=32, mlp_hidden=32, layers=1, heads=2, vision_vocab=64, vqgan=VQ
)


@pytest.fixture
def ranks():
    yield distributed.start("cpu")
    distributed.stop()


def write_pictures(folder, episodes: int = 6, frames: int = 20) -> np.ndarray:
    """Episodes of a bright square that is somewhere on a dark ground, as folders of PNG files."""
    rng = np.random.default_rng(0)
    drawn = np.full((episodes, frames, 16, 16, 3), 30, np.uint8)
    for e in range(episodes):
        (folder / f"episode_{e}").mkdir(parents=True)
        for t, (x, y) in enumerate(rng.integers(12, size=(frames, 2))):
            drawn[e, t, y : y + 4, x : x + 4] = 220
            cv2.imwrite(str(folder / f"episode_{e}" / f"{t:04d}.png"), drawn[e, t])
    return drawn


def test_training_beats_the_mean_picture_and_the_export_keeps_its_codes(ranks, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "small", SMALL)
    monkeypatch.setattr(start, "SIZES", SIZES)
    frames = write_pictures(tmp_path / "data").reshape(-1, 16, 16, 3)
    plan = TokenizerRecipe(
        stage="tokenizer",
        model="small",
        data={"datasets": [{"path": str(tmp_path / "data"), "rate_hz": 5}], "validation_share": 0.2},
        steps=80,
        global_batch=8,
        micro_batch=8,
        optimizer={"learning_rate": 4e-3, "betas": (0.9, 0.99)},
        schedule={"kind": "cosine", "warmup": 8},
        validation={"every": 1000, "samples": 32},
        checkpoint_every=1000,
    )
    run = Run(tmp_path / "run", plan)
    stage = tokenizer.build(plan, ranks, run)
    assert loop.train(stage, plan, run, ranks, stage.samples())
    found = run.last()
    assert found["validation/l1"] < 0.85 * np.abs(frames - frames.mean(0)).mean()
    assert found["validation/codes_used"] > 4
    assert list((tmp_path / "run" / "images").glob("reconstruction-*.png"))

    stage.export(tmp_path / "out", run, ranks)
    run.close()
    exported = start.open_start(tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    assert loaded.config.action_heads == "none" and loaded.normalizer is None
    x = loaded.vqgan.to_input(torch.from_numpy(frames[:32]))
    assert torch.equal(loaded.vqgan.encode(x), exported.vqgan().encode(x))
    assert all(torch.equal(p, p.bfloat16().float()) for p in loaded.vqgan.parameters())
