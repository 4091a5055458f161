"""Gathers the action sequences that `vipra analyze smoothness` measures: demonstrated, replayed, recorded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config.dataset import DatasetConfig, Mixture
from training.analysis import replay
from training.analysis import smoothness as measures
from training.analysis.arrays import AnalysisError, finite
from training.analysis.transitions import each_episode, grippers_of
from training.data.open import open_dataset
from training.data.windows import pick_view


@dataclass(frozen=True)
class Options:
    execute: tuple[int, ...] = ()  # actions of each chunk that run; empty: half and all of them
    rate_hz: float | None = None  # where no dataset says it
    deltas: bool = False
    grippers: list[int] | None = None
    episodes: int | None = 4
    task: str | None = None
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Sequences:
    """Positions [T, D] of episodes by name; `demonstrated` is first where there is a dataset."""

    positions: dict[str, list[np.ndarray]]
    rate_hz: float
    names: list[str]
    joints: np.ndarray  # bool [D]
    hashes: dict[str, str]  # of the checkpoints
    skipped: list[tuple[str, str]]  # (episode, what is wrong)


def collect(
    mixture: Mixture | None,
    policies: list[tuple[str, Path]],
    recordings: list[tuple[str, Path]],
    options: Options,
    tick: Callable[[int, int], None] | None = None,
) -> Sequences:
    """Raises AnalysisError, DataError, CheckpointError."""
    actions: dict[str, list[np.ndarray]] = {}
    rate, names, grippers, hashes = options.rate_hz, None, options.grippers, {}
    episodes, skipped = [], []
    if mixture:
        for config, reader, episode in each_episode(mixture, options.episodes, skipped=skipped):
            if episode.actions is None:
                raise AnalysisError(f"{episode.key}: has no actions; set action_key")
            episodes.append((episode, pick_view(episode, config.views)))
            actions.setdefault("demonstrated", []).append(episode.actions)
            rate = episode.rate_hz
            names = names or reader.action_names
            grippers = list(grippers_of(reader)) if grippers is None else grippers
        if not episodes:
            raise AnalysisError(
                f"no readable episode: {skipped[0][1] if skipped else 'the dataset is empty'}"
            )
    for name, path in policies:
        replayer = replay.load(path, options.device)
        hashes[name] = replayer.checkpoint.hash
        horizon = replayer.robot.horizon
        names, grippers = names or replayer.robot.names, grippers or _grippers(replayer)
        wanted = options.execute or tuple(dict.fromkeys((max(horizon // 2, 1), horizon)))
        if too_many := [count for count in wanted if not 1 <= count <= horizon]:
            raise AnalysisError(f"--execute {too_many[0]}: {name} has {horizon} actions a chunk")
        for number, (episode, view) in enumerate(episodes):
            for count in wanted:
                found = replay.chunks(replayer, episode, view, count, options.task, options.seed)
                stitched = measures.stitch(found, count, episode.length)
                actions.setdefault(f"{name} {count}/{horizon}", []).append(stitched)
            if tick:
                tick(number + 1, len(episodes))
    for name, path in recordings:
        actions[name], found_rate, found_names = _recording(path, options.episodes)
        rate, names = rate or found_rate, names or found_names
    if not rate:
        raise AnalysisError("how many actions a second these are is not in any file: give --rate")
    widths = {name: sequences[0].shape[1] for name, sequences in actions.items()}
    if len(set(widths.values())) > 1:
        raise AnalysisError(f"action dimensions differ: {widths}: compare policies of one robot")
    width = next(iter(widths.values()))
    joints = np.ones(width, bool)
    if wrong := [g for g in grippers or () if not 0 <= g < width]:
        raise AnalysisError(f"gripper {wrong[0]}: the actions have dimensions 0 to {width - 1}")
    joints[list(grippers or ())] = False
    positions = {
        name: [_positions(finite(a, f"actions of {name}"), joints, options.deltas) for a in sequences]
        for name, sequences in actions.items()
    }
    return Sequences(positions, float(rate), list(names or map(str, range(width))), joints, hashes, skipped)


def measure(found: Sequences) -> dict[str, dict]:
    """`smoothness.measure` of each; spikes by the demonstrations' scale, else by all sequences together.

    With demonstrations also `demonstration_error`, the mean absolute difference from them.
    """
    shown = found.positions.get("demonstrated")
    limit = measures.spike_limit(
        shown or [e for every in found.positions.values() for e in every], found.rate_hz
    )
    out = {
        name: measures.measure(episodes, found.rate_hz, limit, found.joints)
        for name, episodes in found.positions.items()
    }
    for name, episodes in found.positions.items():
        if shown and [e.shape for e in episodes] == [e.shape for e in shown]:
            errors = [np.abs(a - b).mean() for a, b in zip(episodes, shown, strict=True)]
            out[name]["demonstration_error"] = float(np.mean(errors))
    return out


def _grippers(replayer: replay.Replayer) -> list[int]:
    return [i for i, d in enumerate(replayer.robot.dimensions) if d.kind == "gripper"]


def _positions(actions: np.ndarray, joints: np.ndarray, deltas: bool) -> np.ndarray:
    return np.where(joints, actions.cumsum(0), actions) if deltas else actions


def _recording(path: Path, limit: int | None) -> tuple[list[np.ndarray], float | None, tuple | None]:
    """(actions [T, D] of each episode, rate, names) of an .npy file or a dataset folder."""
    if path.suffix == ".npy":
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise AnalysisError(f"{path}: not an array that numpy reads: {error}") from error
        if values.ndim not in (2, 3):
            raise AnalysisError(f"{path}: holds {list(values.shape)}, expected [T, D] or [episodes, T, D]")
        return list(values.reshape(-1, *values.shape[-2:])), None, None
    reader = open_dataset(DatasetConfig(path=str(path)))
    episodes = [reader.episode(i) for i in range(min(len(reader), limit or len(reader)))]
    if missing := [e.key for e in episodes if e.actions is None]:
        raise AnalysisError(f"{path}: {missing[0]} has no actions")
    return [e.actions for e in episodes], episodes[0].rate_hz, reader.action_names
