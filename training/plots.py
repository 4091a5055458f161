"""Figures of a training run (matplotlib, no display)."""

from collections.abc import Mapping, Sequence

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


def losses(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]):
    """A panel a run: each of its losses, (step, value) pairs by name, on a logarithmic scale."""
    figure, axes = plt.subplots(
        1, len(curves), figsize=(3.2 * len(curves), 2.6), squeeze=False, constrained_layout=True
    )
    for ax, (run, lines) in zip(axes.flat, curves.items(), strict=True):
        for name, points in lines.items():
            ax.plot(*zip(*points, strict=True), label=name, linewidth=1)
        ax.set_yscale("log")
        ax.set_title(run, fontsize=9)
        ax.set_xlabel("step", fontsize=8)
        ax.tick_params(which="both", labelsize=6)
        ax.legend(fontsize=7)
    return figure


def against_hours(
    losses: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    errors: Mapping[str, Sequence[tuple[float, float]]],
    success: Mapping[str, Sequence[tuple[float, float, float, float]]],
):
    """Learning curves over hours of training: a panel of losses a run; every policy's held-out action error;
    success on development seeds (hours, rate, low, high).
    """
    figure, axes = plt.subplots(
        1, len(losses) + 2, figsize=(3.2 * len(losses) + 6.4, 2.8), squeeze=False, constrained_layout=True
    )
    *panels, action, rate = axes[0]
    for ax, (run, lines) in zip(panels, losses.items(), strict=True):
        for name, points in lines.items():
            ax.plot(*zip(*points, strict=True), label=name, linewidth=1)
        ax.set(title=run, yscale="log")
    for run, points in errors.items():
        action.plot(*zip(*points, strict=True), "o-", label=run, markersize=3)
    action.set(title="held-out action error, rad or opening", ylim=(0, None))
    for run, points in success.items():
        hours, rates, low, high = np.array(points).T
        rate.errorbar(hours, rates, (rates - low, high - rates), fmt="o-", label=run, capsize=3, markersize=3)
    rate.set(title="success, development seeds, 95 %", ylim=(-0.02, 1.02))
    for ax in axes[0]:
        ax.set_xlim(0, 1.1 * ax.get_xlim()[1])
        ax.set_xlabel("hours of training", fontsize=8)
        ax.title.set_fontsize(9)
        ax.tick_params(which="both", labelsize=6)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7, loc="upper left" if ax is rate else "best")
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
