"""Clips of a textured square that moves over a still background, and a decoder one can trust."""

from types import SimpleNamespace

import cv2
import numpy as np
import torch
from torch import nn

SIDE, STEP = 48, 3  # px, px a frame
WAYS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}


def moving_square(way: str, seed: int, frames: int = 5) -> np.ndarray:
    """uint8 RGB [T, SIDE, SIDE, 3]."""
    rng = np.random.default_rng(seed)
    scene = np.full((SIDE, SIDE, 3), rng.integers(60, 120, 3), np.uint8)
    square = cv2.GaussianBlur(rng.integers(0, 256, (12, 12, 3)).astype(np.float32), (0, 0), 1.2).astype(
        np.uint8
    )
    out = []
    for t in range(frames):
        x, y = (SIDE // 2 - 6 + STEP * d * (t - frames // 2) for d in WAYS[way])
        out.append(scene.copy())
        out[-1][y : y + 12, x : x + 12] = square
    return np.stack(out)


class Mover(nn.Module):
    """As a latent action model: its code is the way the clip moves, its decoder shifts the picture that way.

    deaf: the decoder always shifts to the right, whatever the code.
    """

    def __init__(self, deaf: bool = False):
        super().__init__()
        self.deaf = deaf
        self.config = SimpleNamespace(image_size=SIDE, codebook_size=4)
        self.quantizer = SimpleNamespace(codebook=torch.zeros(4, 2))

    def codes(self, clip: torch.Tensor) -> torch.Tensor:
        shifts = torch.stack(
            [torch.roll(clip[:, :-1], (STEP * y, STEP * x), (-2, -1)) for x, y in WAYS.values()]
        )
        return (shifts - clip[:, 1:]).abs().mean((-3, -2, -1)).argmin(0)[..., None]

    def rollout(self, frames: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        out = [frames[:, -1]]
        for t in range(codes.shape[1]):
            ways = [list(WAYS.values())[0 if self.deaf else int(c)] for c in codes[:, t, 0]]
            moved = [
                torch.roll(f, (STEP * y, STEP * x), (-2, -1)) for f, (x, y) in zip(out[-1], ways, strict=True)
            ]
            out.append(torch.stack(moved))
        return torch.stack(out[1:], 1)
