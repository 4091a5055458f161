"""What a LeRobotDataset v3.0 looks like on disk: paths, features, Arrow schemas, statistics.

Facts from the format's reference implementation (lerobot 0.4.4) and from datasets it wrote.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

VERSION = "v3.0"
CHUNK_FILES = 1000  # files of a chunk folder
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200
INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
STATISTICS = ("min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99")
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)

Feature = dict[str, Any]  # as in info.json: dtype, shape, names and, for videos, info
Stats = dict[str, dict[str, np.ndarray]]  # feature -> statistic -> values


class EpisodesError(ValueError):
    """A dataset cannot be read or written as asked; the message says what to do."""


_AUTOMATIC: dict[str, Feature] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}


def vector(names: Iterable[str], dtype: str = "float32") -> Feature:
    """A named vector a frame, such as observation.state or action."""
    names = list(names)
    return {"dtype": dtype, "shape": [len(names)], "names": names}


def camera(height: int, width: int, video: bool = True) -> Feature:
    """RGB pictures, px, as H.264 video or as PNG inside the Parquet files."""
    return {
        "dtype": "video" if video else "image",
        "shape": [height, width, 3],
        "names": ["height", "width", "channels"],
    }


def video_info(fps: int, height: int, width: int) -> dict[str, Any]:
    """The `info` entry of a video feature."""
    return {
        "video.height": height,
        "video.width": width,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
    }


def new_info(fps: int, features: dict[str, Feature], robot_type: str | None) -> dict[str, Any]:
    """info.json of an empty dataset. Raises EpisodesError for a feature this format does not hold."""
    full = {}
    for key, feature in features.items():
        if key in _AUTOMATIC or "/" in key:
            raise EpisodesError(f"feature {key!r}: choose another name, it is reserved")
        dtype, shape = feature["dtype"], feature["shape"]
        if dtype not in ("video", "image", "float32", "float64", "int64", "bool"):
            raise EpisodesError(f"feature {key!r}: dtype {dtype!r} is not supported")
        if dtype not in ("video", "image") and len(shape) != 1:
            raise EpisodesError(f"feature {key!r}: shape {shape}, only vectors are supported")
        full[key] = dict(feature)
        if dtype == "video":
            full[key].setdefault("info", video_info(fps, *shape[:2]))  # given: videos are copied
    videos = any(f["dtype"] == "video" for f in full.values())
    return {
        "codebase_version": VERSION,
        "robot_type": robot_type,
        "total_episodes": 0,
        "total_frames": 0,
        "total_tasks": 0,
        "chunks_size": CHUNK_FILES,
        "data_files_size_in_mb": DATA_FILE_MB,
        "video_files_size_in_mb": VIDEO_FILE_MB,
        "fps": fps,
        "splits": {},
        "data_path": DATA,
        "video_path": VIDEO if videos else None,
        "features": {**full, **_AUTOMATIC},
    }


def keys(info: dict[str, Any], *dtypes: str) -> tuple[str, ...]:
    """Names of the features of these dtypes, in order."""
    return tuple(key for key, feature in info["features"].items() if feature["dtype"] in dtypes)


def recorded(info: dict[str, Any]) -> tuple[str, ...]:
    """Names of the features a frame must bring: all but the automatic ones."""
    return tuple(key for key in info["features"] if key not in _AUTOMATIC)


def after(place: tuple[int, int], chunk_files: int) -> tuple[int, int]:
    """(chunk, file) that follows `place`."""
    chunk, file = place
    return (chunk + 1, 0) if file == chunk_files - 1 else (chunk, file + 1)


def data_schema(info: dict[str, Any]) -> pa.Schema:
    """Schema of the data files: every feature but the videos, and the metadata that `datasets` reads."""
    fields, described = [], {}
    for key, feature in info["features"].items():
        dtype, shape = feature["dtype"], feature["shape"]
        if dtype == "video":
            continue
        if dtype == "image":
            fields.append(pa.field(key, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            described[key] = {"_type": "Image"}
            continue
        scalar = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}[
            dtype
        ]
        value = {"dtype": dtype, "_type": "Value"}
        if shape == [1]:
            fields.append(pa.field(key, scalar))
            described[key] = value
        else:
            fields.append(pa.field(key, pa.list_(scalar, shape[0])))
            described[key] = {"feature": value, "length": shape[0], "_type": "List"}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": described}})})


def episode_schema(info: dict[str, Any]) -> pa.Schema:
    """Schema of the episode files: where an episode lies, its tasks and its statistics."""
    integer, real = pa.int64(), pa.float64()
    fields = [("episode_index", integer), ("tasks", pa.list_(pa.string())), ("length", integer)]
    fields += [("data/chunk_index", integer), ("data/file_index", integer)]
    fields += [("dataset_from_index", integer), ("dataset_to_index", integer)]
    for key in keys(info, "video"):
        fields += [(f"videos/{key}/chunk_index", integer), (f"videos/{key}/file_index", integer)]
        fields += [(f"videos/{key}/from_timestamp", real), (f"videos/{key}/to_timestamp", real)]
    for key, feature in info["features"].items():
        for name in STATISTICS:
            whole = name == "count" or (feature["dtype"] == "int64" and name in ("min", "max"))
            kind = pa.list_(integer if whole else real)
            if feature["dtype"] in ("video", "image") and name != "count":
                kind = pa.list_(pa.list_(kind))  # [3, 1, 1]
            fields.append((f"stats/{key}/{name}", kind))
    fields += [("meta/episodes/chunk_index", integer), ("meta/episodes/file_index", integer)]
    return pa.schema(fields)


def vector_stats(values: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of [T, D] over T, each [D]; `count` [1]."""
    real = values.astype(np.float64)
    out = {
        "min": values.min(0) if values.dtype == np.int64 else real.min(0),
        "max": values.max(0) if values.dtype == np.int64 else real.max(0),
        "mean": real.mean(0),
        "std": real.std(0),
        "count": np.array([len(values)]),
    }
    for name, row in zip(STATISTICS[5:], np.quantile(real, _QUANTILES, axis=0), strict=True):
        out[name] = row
    return out


def colour_histogram(rgb: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel: int64 [3, 256]; large pictures are thinned."""
    step = max(max(rgb.shape[:2]) // 150, 1)
    thin = rgb[::step, ::step]
    return np.stack([np.bincount(thin[..., c].ravel(), minlength=256) for c in range(3)])


def colour_stats(histogram: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    """Statistics of pictures in 0..1 by channel, each [3, 1, 1], from their summed histogram [3, 256]."""
    value = np.arange(256) / 255
    share = histogram / histogram.sum(1, keepdims=True)
    mean = share @ value
    below = np.cumsum(share, axis=1)
    columns = {
        "min": value[(histogram > 0).argmax(1)],
        "max": value[255 - (histogram[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ value**2 - mean**2, 0)),
    }
    for name, q in zip(STATISTICS[5:], _QUANTILES, strict=True):
        columns[name] = value[(below >= q - 1e-12).argmax(1)]
    out = {name: column.reshape(3, 1, 1) for name, column in columns.items()}
    out["count"] = np.array([frames])
    return out


def merge_stats(parts: list[Stats]) -> Stats:
    """Statistics of several episodes together; quantiles are the weighted mean of theirs, as in lerobot."""
    merged: Stats = {}
    for key in parts[0]:
        rows = [part[key] for part in parts]
        count = np.array([float(np.ravel(row["count"])[0]) for row in rows])
        weight = (count / count.sum()).reshape(-1, *[1] * np.ndim(rows[0]["mean"]))
        mean = (weight * np.stack([row["mean"] for row in rows])).sum(0)
        spread = np.stack([np.square(row["std"]) + np.square(row["mean"] - mean) for row in rows])
        merged[key] = {
            "min": np.min([row["min"] for row in rows], axis=0),
            "max": np.max([row["max"] for row in rows], axis=0),
            "mean": mean,
            "std": np.sqrt((weight * spread).sum(0)),
            "count": np.array([int(count.sum())]),
        }
        for name in STATISTICS[5:]:
            merged[key][name] = (weight * np.stack([row[name] for row in rows])).sum(0)
    return merged


def stats_to_json(stats: Stats) -> dict[str, dict[str, list]]:
    return {key: {name: np.asarray(v).tolist() for name, v in row.items()} for key, row in stats.items()}


def stats_from_json(data: dict[str, dict[str, list]]) -> Stats:
    return {key: {name: np.asarray(v) for name, v in row.items()} for key, row in data.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Raises EpisodesError."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EpisodesError(f"{path}: not readable as JSON: {error}") from error


def read_info(root: Path) -> dict[str, Any]:
    """info.json of the dataset at `root`. Raises EpisodesError if there is none or its version is another."""
    if not (root / INFO).is_file():
        why = f"no {INFO}: not a LeRobotDataset" if Path(root).is_dir() else "no such folder"
        raise EpisodesError(f"{root}: {why}")
    info = read_json(root / INFO)
    if info.get("codebase_version") != VERSION:
        raise EpisodesError(
            f"{root}: LeRobotDataset {info.get('codebase_version')}, only {VERSION} is read: convert it with "
            "lerobot's `lerobot.datasets.v30.convert_dataset_v21_to_v30`"
        )
    return info
