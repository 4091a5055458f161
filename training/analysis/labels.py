"""Reads what `vipra label` wrote: the step that starts at each frame, and how its picture moves."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from config.dataset import DatasetConfig
from config.loading import parse
from training.analysis.arrays import AnalysisError
from training.analysis.motion import image_motion
from training.analysis.transitions import Tick
from training.data.augment import prepare
from training.data.open import open_dataset
from training.data.windows import pick_view

_SIDE = 128  # px of the frames whose motion is measured


@dataclass(frozen=True)
class Labels:
    codes: np.ndarray  # int64 [n, N], z_t of every frame t that has a next one
    codebook_size: int
    motion: np.ndarray | None  # float64 [n, 2]


def read(folder: Path, limit: int | None = None, motion: bool = True, tick: Tick | None = None) -> Labels:
    """Labels of up to `limit` episodes, with the motion of their frames where the datasets are still there.

    Raises AnalysisError where there are none or they are damaged, DataError for the datasets.
    """
    try:
        about = json.loads((folder / "manifest.json").read_text())
        tokens, size = about["latent_tokens"], about["latent_codes"]
        configs = [parse(DatasetConfig, c, f"{folder}/manifest.json") for c in about["datasets"]]
        tables = [
            pq.read_table(p, columns=["key", "frame", "stride", "latents", "valid"]) for p in _shards(folder)
        ]
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise AnalysisError(f"{folder}: not the finished labels of `vipra label`: {error}") from error
    rows = pa.concat_tables(tables)
    keys = np.asarray(rows["key"].to_pylist())
    known = list(dict.fromkeys(keys.tolist()))[:limit]
    inside = np.array([valid[0] for valid in rows["valid"].to_pylist()], bool)
    kept = np.flatnonzero(inside & np.isin(keys, known))
    if not len(kept):
        raise AnalysisError(f"{folder}: holds no step inside an episode")
    rows, keys = rows.take(kept), keys[kept]
    codes = np.stack([np.asarray(row[:tokens], np.int64) for row in rows["latents"].to_pylist()])
    moved = None
    if motion and all(Path(config.path).expanduser().exists() for config in configs):
        frames, strides = (rows[name].to_numpy() for name in ("frame", "stride"))
        moved = _motion(configs, keys, frames, strides, tick)
    return Labels(codes, size, moved)


def _shards(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("shard-*.parquet"))
    if not shards:
        raise ValueError("no shard-*.parquet")
    return shards


def _motion(
    configs: list[DatasetConfig], keys: np.ndarray, frames: np.ndarray, strides: np.ndarray, tick: Tick | None
) -> np.ndarray:
    readers = [open_dataset(config) for config in configs]
    places = {
        f"{dataset}/{reader.key(i)}": (dataset, i)
        for dataset, reader in enumerate(readers)
        for i in range(len(reader))
    }
    out, distinct = np.zeros((len(keys), 2)), list(dict.fromkeys(keys.tolist()))
    for done, key in enumerate(distinct):
        if key not in places:
            raise AnalysisError(
                f"{key}: labelled, but no longer in its dataset: label again, or --no-direction"
            )
        dataset, index = places[key]
        episode = readers[dataset].episode(index)
        view = pick_view(episode, configs[dataset].views)
        pictures = prepare(episode.frames(view, range(episode.length)), _SIDE)
        for row in np.flatnonzero(keys == key):
            out[row] = image_motion(pictures[frames[row]], pictures[frames[row] + strides[row]])
        if tick:
            tick(done + 1, len(distinct))
    return out
