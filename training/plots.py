"""Figures of a training run (matplotlib, no display)."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def action_error(error: np.ndarray, names: Sequence[str]):
    """Absolute error [H, D], rad and opening: joint by horizon step."""
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(names) + 1.5), constrained_layout=True)
    picture = axes.imshow(error.T, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("action of the chunk")
    axes.set_title("held-out absolute error, rad (grippers: opening)", fontsize=9)
    figure.colorbar(picture)
    return figure


def replay(played: np.ndarray, demonstrated: np.ndarray, names: Sequence[str], rate_hz: float, horizon: int):
    """Open-loop replay [T, D] against a demonstration [T, D], a panel a dimension."""
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3 * columns, 1.6 * lines), squeeze=False, constrained_layout=True
    )
    seconds = np.arange(len(demonstrated)) / rate_hz
    for i, ax in enumerate(axes.flat):
        if i >= len(names):
            ax.axis("off")
            continue
        ax.plot(seconds, demonstrated[:, i], color="0.6", linewidth=2)
        ax.plot(seconds[: len(played)], played[:, i], color="C1", linewidth=1)
        for t in range(0, len(demonstrated), horizon):
            ax.axvline(t / rate_hz, color="0.9", linewidth=0.5, zorder=0)
        ax.set_title(names[i], fontsize=7)
        ax.tick_params(labelsize=6)
    figure.suptitle("open loop (orange) against the demonstration (grey); s", fontsize=8)
    return figure


def tiles(rows: Sequence[Sequence[np.ndarray]], gap: int = 2) -> np.ndarray:
    """uint8 pictures [h, w, 3], same size, in rows -> one picture."""
    height, width = rows[0][0].shape[:2]
    canvas = np.full(
        (len(rows) * (height + gap) - gap, max(map(len, rows)) * (width + gap) - gap, 3), 255, np.uint8
    )
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y, x = i * (height + gap), j * (width + gap)
            canvas[y : y + height, x : x + width] = picture
    return canvas
