"""Which way a picture moves: the mean optical flow of the pixels that change."""

from itertools import pairwise

import cv2
import numpy as np

CHANGED = 0.05  # of full brightness, the most any channel changes
STILL = 0.002  # of the picture's width a step: less is no direction
_LONGEST = 128  # px; larger pictures are shrunk first


def image_motion(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Motion [2] (right, down) from one uint8 RGB picture [h, w, 3] to the next, as shares of its width.

    Farneback's dense flow, averaged over pixels that change by more than `CHANGED`; zero where none does.
    """
    height, width = before.shape[:2]
    scale = _LONGEST / max(height, width)
    if scale < 1:
        size = (round(width * scale), round(height * scale))
        before, after = (cv2.resize(x, size, interpolation=cv2.INTER_AREA) for x in (before, after))
    moved = np.abs(before.astype(np.int16) - after).max(-1) > 255 * CHANGED
    if not moved.any():
        return np.zeros(2)
    grey = [cv2.cvtColor(x, cv2.COLOR_RGB2GRAY) for x in (before, after)]
    flow = cv2.calcOpticalFlowFarneback(*grey, None, 0.5, 3, 13, 5, 5, 1.1, 0)
    return flow[moved].mean(0).astype(float) / before.shape[1]


def clip_motion(frames: np.ndarray) -> np.ndarray:
    """Motion of each step of uint8 RGB frames [T, h, w, 3] -> [T - 1, 2]."""
    return np.stack([image_motion(a, b) for a, b in pairwise(frames)])


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of the angle between motions [..., 2]; 0 where either is still."""
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where(sizes > 0, (a * b).sum(-1) / np.maximum(sizes, 1e-12), 0.0)
