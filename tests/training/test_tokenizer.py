"""Stage 0 learns to draw what it saw, and what it returns survives a checkpoint in half the bytes."""

import numpy as np
import torch

from models.config import VQGANConfig
from training import tokenizer

CONFIG = VQGANConfig(16, (16, 32), 1, 8, 32, norm_groups=8)


def pictures(n: int) -> np.ndarray:
    """A bright square somewhere on a dark ground, uint8 [n, 16, 16, 3]."""
    rng = np.random.default_rng(0)
    frames = np.full((n, 16, 16, 3), 30, np.uint8)
    for frame, (x, y) in zip(frames, rng.integers(12, size=(n, 2)), strict=True):
        frame[y : y + 4, x : x + 4] = 220
    return frames


def test_training_beats_the_mean_picture_and_uses_many_codes():
    frames = pictures(256)
    model, measured = tokenizer.train(frames, CONFIG, steps=150)
    mean_picture = np.abs(frames - frames.mean(0)).mean()
    assert measured["l1"] < 0.75 * mean_picture
    assert measured["codes_used"] > 4
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
