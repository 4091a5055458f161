"""Frames to the network's size, with one random crop and colour change for all frames of a sample."""

from dataclasses import dataclass

import cv2
import numpy as np

from config.dataset import Augmentation
from policy_server.images import fit


@dataclass(frozen=True)
class Draw:
    """One sample's random picture change."""

    crop: tuple[float, float, float, float]  # left, top, width, height as shares of the frame
    gain: float  # contrast
    offset: float  # brightness, of 255
    hue: float  # OpenCV's degrees, 180 a turn
    saturation: float  # of 255
    value: float  # of 255


def draw(config: Augmentation, rng: np.random.Generator) -> Draw:
    area = rng.uniform(*config.crop_area)
    ratio = np.exp(rng.uniform(*np.log(config.crop_ratio)))
    width, height = min(np.sqrt(area * ratio), 1.0), min(np.sqrt(area / ratio), 1.0)
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    spread = (config.contrast, config.brightness, config.hue, config.saturation, config.value)
    gain, offset, hue, saturation, value = (rng.uniform(-s, s) if s else 0.0 for s in spread)
    return Draw((left, top, width, height), 1 + gain, 255 * offset, hue, saturation, value)


def prepare(frames: np.ndarray, size: int, change: Draw | None = None) -> np.ndarray:
    """Frames [n, h, w, 3] uint8 to [n, size, size, 3]: longest side to `size`, then squashed."""
    if change is not None:
        height, width = frames.shape[1:3]
        left, top, across, down = change.crop
        x, y = round(left * width), round(top * height)
        frames = frames[:, y : y + max(round(down * height), 1), x : x + max(round(across * width), 1)]
    small = np.stack([fit(frame, (size, size)) for frame in frames])
    return small if change is None else _recolour(small, change)


def _recolour(frames: np.ndarray, change: Draw) -> np.ndarray:
    table = np.clip(np.arange(256) * change.gain + change.offset, 0, 255).astype(np.uint8)
    tall = table[frames].reshape(-1, frames.shape[2], 3)  # all frames as one picture: one conversion
    hsv = cv2.cvtColor(tall, cv2.COLOR_RGB2HSV)
    levels = np.arange(256)
    tables = [
        (levels + round(change.hue)) % 180,
        np.clip(levels + change.saturation, 0, 255),
        np.clip(levels + change.value, 0, 255),
    ]
    for channel, levels in enumerate(tables):
        hsv[..., channel] = levels.astype(np.uint8)[hsv[..., channel]]
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).reshape(frames.shape)
