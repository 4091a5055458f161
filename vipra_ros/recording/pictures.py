"""Pictures of an episode: moments of its video over plots of what was measured and commanded."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from episodes import quality
from episodes.quality import Finding, Trace

_COMMANDED, _MEASURED, _MARK = "#2f6fde", "#e4572e", "#f3c6bd"


def sheet(strips: list[tuple[str, np.ndarray]], path: Path) -> None:
    """One row per episode: its name, then its moments [n, h, w, 3] side by side."""
    height, width = strips[0][1].shape[1:3]
    columns = max(len(frames) for _, frames in strips)
    shape = 12.0, len(strips) * (12.0 / columns * height / width + 0.3)
    figure = Figure(figsize=shape, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, frames) in zip(figure.subplots(len(strips), squeeze=False)[:, 0], strips, strict=True):
        axis.imshow(np.concatenate(list(frames), axis=1))
        axis.set_title(name, fontsize=8, loc="left")
        axis.axis("off")
    figure.savefig(path, dpi=110)


def episode(name: str, trace: Trace, frames: np.ndarray, findings: list[Finding], path: Path) -> None:
    """Moments [n, h, w, 3] on top, then every dimension over time; what was found is shaded."""
    dims = len(trace.names)
    rows = -(-dims // 2)
    figure = Figure(figsize=(14, 2.2 + 1.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=(2.0, 1.3 * rows))
    axis = top.subplots()
    axis.imshow(np.concatenate(list(frames), axis=1))
    axis.axis("off")
    told = quality.summary(findings) or "nothing found"
    axis.set_title(f"{name}\n{told}", fontsize=9, loc="left", wrap=True)
    t = np.arange(len(trace)) / trace.fps
    axes = bottom.subplots(rows, 2, sharex=True, squeeze=False).T.ravel()
    for d, dimension in enumerate(trace.names):
        for found in findings:
            axes[d].axvspan(found.first / trace.fps, (found.last + 1) / trace.fps, color=_MARK, linewidth=0)
        axes[d].plot(t, trace.action[:, d], color=_COMMANDED, linewidth=1.1, label="commanded")
        axes[d].plot(
            t, trace.state[:, d], color=_MEASURED, linewidth=1.1, linestyle=(0, (4, 2)), label="measured"
        )
        axes[d].set_ylabel(dimension.replace("_fr3", ""), rotation=0, ha="right", va="center", fontsize=8)
        axes[d].spines[["top", "right"]].set_visible(False)
    for axis in axes[dims:]:
        axis.axis("off")
    axes[0].legend(loc="upper right", fontsize=8, frameon=False)
    for axis in axes[[rows - 1, -1]]:
        axis.set_xlabel("s")
    figure.savefig(path, dpi=90)
