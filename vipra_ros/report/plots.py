"""Figures of a run. Off-screen, no global matplotlib state."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vipra_ros.report.logs import ArmsLog

COMMANDED, MEASURED, BOUNDARY, ACCENT = "#2f6fde", "#e4572e", "#c8ccd4", "#3a9d6e"
_STYLE = {"linewidth": 1.1}


def joints(log: ArmsLog, path: Path, zoom_s: float = 6.0) -> None:
    """Commanded against measured positions of every joint; left the whole run, right the last `zoom_s`
    seconds with each chunk boundary marked."""
    count = log.q_ref.shape[1]
    t0 = log.t[0]
    t, boundaries = log.t - t0, log.chunk_accepted - t0
    figure = Figure(figsize=(14, 1.25 * count + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, 2, sharex="col", squeeze=False)
    zoomed = t >= t[-1] - zoom_s
    step = max(1, len(t) // 4000)
    for j, name in enumerate(log.joint_names[:count]):
        for axis, ticks, marks in (
            (axes[j, 0], slice(None, None, step), ()),
            (axes[j, 1], zoomed, boundaries[boundaries >= t[-1] - zoom_s]),
        ):
            for mark in marks:
                axis.axvline(mark, color=BOUNDARY, linewidth=0.9, zorder=0)
            axis.plot(t[ticks], log.q_ref[ticks, j], color=COMMANDED, label="commanded", **_STYLE)
            axis.plot(
                t[ticks],
                log.q_meas[ticks, j],
                color=MEASURED,
                label="measured",
                linestyle=(0, (4, 2)),
                **_STYLE,
            )
            _plain(axis)
        axes[j, 0].set_ylabel(
            name.replace("_fr3_joint", " j"), rotation=0, ha="right", va="center", fontsize=9
        )
    axes[0, 0].set_title("whole run, rad", fontsize=10, loc="left")
    axes[0, 1].set_title(f"last {zoom_s:g} s, chunk boundaries in grey", fontsize=10, loc="left")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("s")
    figure.savefig(path, dpi=90)


def timing(log: ArmsLog, requests: list[dict], path: Path) -> None:
    """Latency of each chunk, lateness of each tick, tracking error and boundary steps over the run."""
    t0 = log.t[0]
    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (latency, late), (error, step) = figure.subplots(2, 2)
    answered = [(r["received"] - t0, r["latency_ms"]) for r in requests if r.get("latency_ms") is not None]
    if answered:
        latency.plot(*zip(*answered, strict=True), ".", color=COMMANDED, markersize=4)
        latency.set_ylim(bottom=0)
    latency.set_title("chunk latency, ms", fontsize=10, loc="left")
    late.hist(1000 * log.late, bins=np.arange(-0.25, 8.5, 0.5), color=COMMANDED)
    late.set_yscale("log")
    late.axvline(5, color=MEASURED, linewidth=1)
    late.set_title("lateness of 200 Hz ticks, ms (late from 5)", fontsize=10, loc="left")
    worst = np.abs(log.q_ref - log.q_meas).max(axis=1)
    error.plot(log.t - t0, worst, color=ACCENT, **_STYLE)
    error.set_ylim(bottom=0)
    error.set_title("largest tracking error of any joint, rad", fontsize=10, loc="left")
    step.plot(log.chunk_accepted - t0, log.chunk_join_rad, ".", color=ACCENT, markersize=4)
    step.set_ylim(bottom=0)
    step.set_title("step at each chunk boundary before blending, rad", fontsize=10, loc="left")
    for axis in (latency, error, step):
        axis.set_xlabel("s")
    for axis in (latency, late, error, step):
        _plain(axis)
    figure.savefig(path, dpi=90)


def _plain(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.01)
