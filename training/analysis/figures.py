"""The pictures of `vipra analyze` (matplotlib, no display)."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from training.plots import tiles


def codes(summary: dict, differences: Mapping[str, dict]) -> Figure:
    """Usage by position and code, and as in figure 4 how it differs between directions of motion."""
    shown = {title: d for title, d in differences.items() if "difference" in d}
    figure = Figure(figsize=(3.2 * (1 + len(shown)), 4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 1 + len(shown), sharey=True))
    first = axes[0].imshow(np.asarray(summary["usage_by_position"]), aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(first, ax=axes[0])
    axes[0].set_title(f"share ({summary['codes_used']} of {summary['codebook_size']} used)", fontsize=9)
    axes[0].set_ylabel("position in the step")
    reach = max((np.abs(d["difference"]).max() for d in shown.values()), default=0)
    for ax, (title, d) in zip(axes[1:], shown.items(), strict=True):
        picture = ax.imshow(d["difference"], aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach)
        ax.set_title(f"{title} (n = {d['counts'][0]}, {d['counts'][1]})", fontsize=9)
        figure.colorbar(picture, ax=ax)
    for ax in axes:
        ax.set_xlabel("code")
    return figure


def transfer(rows: Sequence[tuple[str, np.ndarray]], title: str) -> Figure:
    """Clips uint8 [T, s, s, 3], one a line with its name."""
    sheet, side = tiles([list(clip) for _, clip in rows]), rows[0][1].shape[1]
    figure = Figure(figsize=(2.2 + 1.1 * len(rows[0][1]), 0.5 + 1.1 * len(rows)), layout="constrained")
    ax = figure.subplots()
    ax.imshow(sheet)
    ax.set_yticks([side / 2 + i * (side + 2) for i in range(len(rows))], [n for n, _ in rows], fontsize=7)
    ax.set_xticks([])
    ax.set_title(title, fontsize=8)
    return figure


def smoothness(
    traces: Mapping[str, np.ndarray], measured: Mapping[str, dict], names: Sequence[str], rate_hz: float
) -> Figure:
    """As figures 6 and 8: a panel a dimension with every trace [T, D] of one episode, then the numbers."""
    columns = min(4, max(3, len(names)))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3 * columns, 1.6 * lines + 2.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.6 * lines, 2.4])
    colours = {n: "0.6" if n == "demonstrated" else f"C{i}" for i, n in enumerate(measured)}
    for i, ax in enumerate(np.atleast_2d(upper.subplots(lines, columns, squeeze=False)).flat):
        if i >= len(names):
            ax.axis("off")
            continue
        for name, trace in traces.items():
            seconds = np.arange(len(trace)) / rate_hz
            ax.plot(seconds, trace[:, i], color=colours[name], linewidth=0.9, label=name)
        ax.set_title(names[i], fontsize=7)
        ax.tick_params(labelsize=6)
        if i == 0:
            ax.legend(fontsize=5)
    shown = {
        "jerk_rms": "jerk, rad/s^3",
        "spikes_per_100_actions": "spikes in 100 actions",
        "spectral_arc_length": "spectral arc length",
    }
    for ax, (key, title) in zip(lower.subplots(1, len(shown)), shown.items(), strict=True):
        ax.barh(list(measured), [m[key] for m in measured.values()], color=list(colours.values()))
        ax.invert_yaxis()
        ax.set_title(title, fontsize=8)
        ax.tick_params(labelsize=6)
    return figure


def information(models: Mapping[str, dict]) -> Figure:
    """Bits by estimator and probe error, each beside its shuffled check; a colour a model."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    bits, errors = figure.subplots(1, 2, width_ratios=[3, 1])
    estimators = list(next(iter(models.values()))["bits"])
    width = 0.8 / (2 * len(models))
    for i, (name, found) in enumerate(models.items()):
        at = np.arange(len(estimators)) + 2 * i * width
        values = [found["bits"][e] for e in estimators]
        bits.bar(at, [v["mean"] for v in values], width, yerr=[v["std"] for v in values], label=name)
        # far below zero says no more than zero: a trained critic is sure of wrong pairs
        shuffled = [max(v["shuffled_mean"], 0) for v in values]
        bits.bar(at + width, shuffled, width, color="0.7", label="shuffled" if i == 0 else None)
        errors.bar(2 * i * width, found["probe_nmse"], width)
        errors.bar((2 * i + 1) * width, found["shuffled_nmse"], width, color="0.7")
    bits.set_xticks(np.arange(len(estimators)) + 0.4 - width / 2, estimators)
    bits.set_ylabel("bits")
    bits.legend(fontsize=7)
    errors.set_xticks([])
    errors.set_title("probe NMSE", fontsize=9)
    return figure
