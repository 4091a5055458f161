"""What a dataset holds and what is wrong with it: the arithmetic of `vipra data check` and `preview`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from config.dataset import DatasetConfig
from training.data.augment import prepare
from training.data.episode import DataError, Episode, Reader
from training.data.open import open_dataset
from training.data.windows import pick_view

_LABEL_PX = 16


@dataclass
class Report:
    """One dataset, looked through."""

    path: str
    episodes: int = 0  # readable
    frames: int = 0
    lengths: list[int] = field(default_factory=list)  # shortest, median, longest
    seconds: float = 0.0
    rates_hz: dict[str, int] = field(default_factory=dict)  # rate -> episodes
    resolutions: dict[str, dict[str, int]] = field(default_factory=dict)  # view -> "WxH" -> episodes
    instructions: int = 0  # different ones
    uninstructed: int = 0  # episodes
    action_dimensions: list[int] = field(default_factory=list)
    action_names: list[str] | None = None
    action_min: list[float] | None = None
    action_max: list[float] | None = None
    constant_action_dimensions: list[int] = field(default_factory=list)
    state_dimensions: list[int] = field(default_factory=list)
    too_short: int = 0  # episodes below min_frames
    broken: list[tuple[str, str]] = field(default_factory=list)  # (episode or file, what is wrong)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check(
    config: DatasetConfig, every_frame: bool = False, tick: Callable[[int, int], None] | None = None
) -> Report:
    """Read every episode: its numbers, and of its pictures the first and last, or all. tick(done, of).

    Raises DataError where there is no dataset; what is wrong with single episodes is in the report.
    """
    reader = open_dataset(config)
    report = Report(config.path, broken=list(reader.broken))
    report.action_names = list(reader.action_names) if reader.action_names else None
    lengths, texts, rates, sizes = [], Counter(), Counter(), {}
    lows, highs, widths = [], [], Counter()
    for index in range(len(reader)):
        if tick:
            tick(index, len(reader))
        try:
            episode = reader.episode(index)
            found = _resolutions(episode, every_frame)
        except DataError as error:
            report.broken.append((reader.key(index), str(error)))
            continue
        lengths.append(episode.length)
        texts[episode.instruction] += 1
        rates[f"{episode.rate_hz:.2f}"] += 1
        report.seconds += float(episode.timestamps[-1] - episode.timestamps[0])
        for view, size in found.items():
            sizes.setdefault(view, Counter())[size] += 1
        if episode.actions is not None:
            widths[("action", episode.actions.shape[1])] += 1
            lows.append(episode.actions.min(0))
            highs.append(episode.actions.max(0))
        if episode.state is not None:
            widths[("state", episode.state.shape[1])] += 1
    report.episodes, report.frames = len(lengths), int(np.sum(lengths))
    if lengths:
        report.lengths = [min(lengths), int(np.median(lengths)), max(lengths)]
    report.rates_hz, report.resolutions = dict(rates), {view: dict(c) for view, c in sizes.items()}
    report.uninstructed = texts.pop("", 0)
    report.instructions = len(texts)
    report.too_short = sum(length < config.min_frames for length in lengths)
    report.action_dimensions = [d for kind, d in widths if kind == "action"]
    report.state_dimensions = [d for kind, d in widths if kind == "state"]
    if len(report.action_dimensions) == 1:
        low, high = np.min(lows, 0), np.max(highs, 0)
        report.action_min, report.action_max = low.tolist(), high.tolist()
        report.constant_action_dimensions = np.flatnonzero(low == high).tolist()
    return report


def _resolutions(episode: Episode, every_frame: bool) -> dict[str, str]:
    """Width and height of each view. Raises DataError where a frame cannot be decoded."""
    sizes = {}
    for view in episode.views:
        wanted = range(episode.length) if every_frame else sorted({0, episode.length - 1})
        parts = [list(wanted)[at : at + 64] for at in range(0, len(wanted), 64)]
        for part in parts:
            frames = episode.frames(view, part)
        sizes[view] = f"{frames.shape[2]}x{frames.shape[1]}"
    return sizes


def contact_sheet(
    reader: Reader, config: DatasetConfig, rows: int = 8, columns: int = 8, size: int = 128, seed: int = 0
) -> tuple[Image.Image, list[tuple[str, str]]]:
    """(a picture of `columns` moments of `rows` random episodes, what was unreadable on the way)."""
    order = np.random.default_rng(seed).permutation(len(reader))
    strips, errors = [], []
    for index in order:
        if len(strips) == rows:
            break
        try:
            episode = reader.episode(int(index))
            moments = np.round(np.linspace(0, episode.length - 1, columns)).astype(int)
            frames = prepare(episode.frames(pick_view(episode, config.views), moments), size)
        except DataError as error:
            errors.append((reader.key(int(index)), str(error)))
            continue
        strips.append((episode, frames))
    if not strips:
        raise DataError(
            f"{config.path}: no readable episode to show: {errors[0][1] if errors else 'it has none'}"
        )
    sheet = Image.new("RGB", (columns * size, len(strips) * (size + _LABEL_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (episode, frames) in enumerate(strips):
        top = row * (size + _LABEL_PX)
        about = f"{episode.key}  {episode.length} frames, {episode.rate_hz:.1f}/s"
        pen.text((3, top + 2), f"{about}  {episode.instruction or '(no instruction)'}", fill="black")
        sheet.paste(Image.fromarray(np.concatenate(list(frames), axis=1)), (0, top + _LABEL_PX))
    return sheet, errors
