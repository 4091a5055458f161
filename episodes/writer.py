"""Appends episodes to a LeRobotDataset v3.0 so that a crash costs at most the episode being recorded.

Frames of the running episode go to `.recording/`. `save` writes the new version of every file it changes into
`.saving/`, and one rename to `.saved/` is the moment from which the episode exists: the files are then moved
to their places, longer ones before the metadata that points into them, so the dataset opens at every moment
in between, and the next writer finishes an interrupted move.
"""

import contextlib
import fcntl
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from episodes import layout, video
from episodes.layout import EpisodesError, Feature
from episodes.reader import Dataset

_RECORDING, _SAVING, _SAVED, _LOCK = ".recording", ".saving", ".saved", ".lock"
_EPISODES_A_FILE = 200  # lines of a metadata file: it is rewritten at every save
_DECODED_AT_ONCE = 64  # frames
_MOVE_ORDER = ("videos", "data", "meta/tasks", "meta/episodes", "meta/stats", "meta/info")


class Writer:
    """The only writer of a dataset; a second one is refused. Frames with `add`, then `save` or `discard`."""

    def __init__(self, root: Path, crf: int = video.CRF, lock: int | None = None):
        """Continue the dataset at `root`. crf: H.264 quality of new episodes, lower is better.

        lock: held already, by `create`.
        Raises EpisodesError if there is no dataset or another writer is at work.
        """
        self.root, self._crf = Path(root), crf
        layout.read_info(self.root)  # before anything is touched
        self._lock = _lock(self.root) if lock is None else lock
        try:
            recover(self.root)
            self.info = layout.read_info(self.root)
            self._read_tables()
        except BaseException:
            os.close(self._lock)
            raise
        self._rows: dict[str, list] = {}
        self._encoders: dict[str, video.Encoder] = {}
        self._histograms: dict[str, np.ndarray] = {}

    @classmethod
    def create(
        cls,
        root: Path,
        fps: int,
        features: dict[str, Feature],
        robot_type: str | None = None,
        data_file_mb: int = layout.DATA_FILE_MB,
        video_file_mb: int = layout.VIDEO_FILE_MB,
        crf: int = video.CRF,
    ) -> "Writer":
        """Start an empty dataset, in place of one without an episode. Raises EpisodesError if `root` holds
        episodes or a feature is unknown.
        """
        root = Path(root)
        info = layout.new_info(fps, features, robot_type)
        info["data_files_size_in_mb"], info["video_files_size_in_mb"] = data_file_mb, video_file_mb
        root.mkdir(parents=True, exist_ok=True)
        lock = _lock(root)  # before looking: two recorders may start at once
        try:
            if saved_episodes(root):
                raise EpisodesError(
                    f"{root} holds a dataset already: open it with Writer(root), or choose another folder"
                )
            _write_json(root / layout.INFO, info)
        except BaseException:
            os.close(lock)
            raise
        return cls(root, crf, lock)

    @property
    def episodes(self) -> int:
        """Episodes saved."""
        return self._last["episode_index"] + 1 if self._last else 0

    @property
    def frames(self) -> int:
        """Frames of the running episode."""
        return len(self._rows.get("task", ()))

    def add(self, frame: dict[str, Any], task: str) -> None:
        """One frame: a value of the right shape for every recorded feature, and the robot's task in words.

        Raises EpisodesError; the frame is then not part of the episode.
        """
        values = {key: self._checked(key, frame) for key in layout.recorded(self.info)}
        if extra := set(frame) - set(values):
            raise EpisodesError(f"the dataset has no feature {sorted(extra)}; it has {sorted(values)}")
        (self.root / _RECORDING).mkdir(exist_ok=True)
        for key, value in values.items():
            dtype = self.info["features"][key]["dtype"]
            if dtype in ("video", "image"):
                histogram = layout.colour_histogram(value)
                self._histograms[key] = self._histograms.get(key, 0) + histogram
            if dtype == "video":
                self._encoder(key).add(value)
            else:
                kept = _png(value, self.frames) if dtype == "image" else value
                self._rows.setdefault(key, []).append(kept)
        self._rows.setdefault("task", []).append(task)

    def copy(self, source: Dataset, episode: int) -> None:
        """Take over an episode of a dataset with the same features; `save` makes it part of this one.

        Its videos are not encoded anew. Raises EpisodesError, VideoError.
        """
        if self.frames:
            raise EpisodesError("an episode is running: save or discard it first")
        count, tasks = source.rows[episode].length, source.tasks(episode)
        if layout.keys(self.info, "image"):
            for i in range(count):
                frame = {key: np.atleast_1d(source.values(episode, key)[i]) for key in source.vectors}
                frame |= {key: source.frames(episode, key, [i])[0] for key in source.cameras}
                self.add(frame, tasks[i])
            return
        (self.root / _RECORDING).mkdir(exist_ok=True)
        for key in layout.keys(self.info, "video"):
            path, start = source.video(episode, key)
            video.cut(path, self._recording(key), start, count, self.info["fps"])
            for first in range(0, count, _DECODED_AT_ONCE):
                some = range(first, min(first + _DECODED_AT_ONCE, count))
                for rgb in source.frames(episode, key, some):
                    self._histograms[key] = self._histograms.get(key, 0) + layout.colour_histogram(rgb)
        self._rows = {key: list(source.values(episode, key)) for key in source.vectors} | {"task": tasks}

    def finish(self) -> None:
        """Complete the running episode's videos: no frame can be added any more, and `save` needs less room.

        Raises VideoError where the disk is too full for it: the episode can only be discarded.
        """
        for encoder in self._encoders.values():
            encoder.close()

    def save(self) -> int:
        """Make the running episode part of the dataset; its index.

        Raises EpisodesError without frames, OSError if the disk is full: the dataset is then as before, and
        `save` can be tried again. Raises VideoError where the disk was too full to complete a video: the
        episode can only be discarded. Where the files of a saved episode cannot all be moved to their places,
        the next `save`, `close` or writer moves them.
        """
        if not self.frames:
            raise EpisodesError("an episode without frames is not saved: add frames first")
        _settle(self.root)
        self.finish()
        staged = self.root / _SAVING
        shutil.rmtree(staged, ignore_errors=True)
        try:
            info, tasks, lines, stats = self._stage(staged)
            _sync(staged)
            os.replace(staged, self.root / _SAVED)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        self.info, self._tasks, self._lines, self._stats = info, tasks, lines, stats
        self._last = _last_row(lines)
        self._drop()
        with contextlib.suppress(OSError):
            _sync_entries(self.root)
            _settle(self.root)
        return self.episodes - 1

    def discard(self) -> None:
        """Drop the running episode."""
        for encoder in self._encoders.values():
            with contextlib.suppress(video.VideoError):
                encoder.close()
        self._drop()

    def close(self) -> None:
        """Drop an unsaved episode and let another writer in.

        Raises OSError where files of a saved episode cannot be moved to their places; the next writer does.
        """
        try:
            self.discard()
            _settle(self.root)
        finally:
            os.close(self._lock)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- the running episode ---

    def _drop(self) -> None:
        self._rows, self._encoders, self._histograms = {}, {}, {}
        shutil.rmtree(self.root / _RECORDING, ignore_errors=True)

    def _encoder(self, key: str) -> video.Encoder:
        if key not in self._encoders:
            height, width, _ = self.info["features"][key]["shape"]
            path = self._recording(key)
            self._encoders[key] = video.Encoder(path, self.info["fps"], height, width, self._crf)
        if self._encoders[key].closed:
            raise EpisodesError("the episode is complete: save or discard it before adding frames")
        return self._encoders[key]

    def _recording(self, key: str) -> Path:
        return self.root / _RECORDING / f"{key}.mp4"

    def _checked(self, key: str, frame: dict[str, Any]) -> np.ndarray:
        feature = self.info["features"][key]
        if key not in frame:
            raise EpisodesError(f"the frame lacks {key!r}: it needs {list(layout.recorded(self.info))}")
        pictures = feature["dtype"] in ("video", "image")
        value = np.asarray(frame[key], np.uint8 if pictures else feature["dtype"])
        if pictures and np.asarray(frame[key]).dtype != np.uint8:
            raise EpisodesError(f"{key}: pictures are uint8 RGB, got {np.asarray(frame[key]).dtype}")
        if list(value.shape) != feature["shape"]:
            raise EpisodesError(f"{key}: shape {list(value.shape)}, the dataset has {feature['shape']}")
        if not pictures and not np.isfinite(value).all():
            raise EpisodesError(f"{key}: {value.tolist()} is not finite")
        return value

    # --- saving ---

    def _read_tables(self) -> None:
        files = sorted(self.root.glob("meta/episodes/*/*.parquet"))
        schema = layout.episode_schema(self.info)
        self._lines = pq.read_table(files[-1]) if files else schema.empty_table()
        if set(self._lines.column_names) != set(schema.names):
            others = sorted(set(self._lines.column_names) ^ set(schema.names))
            raise EpisodesError(
                f"{self.root}: its episode table differs in {others[:4]}: record to a new folder"
            )
        self._lines = self._lines.select(schema.names).cast(schema)
        self._last = _last_row(self._lines)
        tasks = self.root / layout.TASKS
        self._tasks = list(pd.read_parquet(tasks).sort_values("task_index").index) if tasks.is_file() else []
        stats = self.root / layout.STATS
        self._stats = layout.stats_from_json(layout.read_json(stats)) if stats.is_file() else None

    def _stage(self, staged: Path) -> tuple[dict, list[str], pa.Table, dict]:
        """Write the next version of every changed file under `staged`: info, tasks, episodes, statistics."""
        info = json.loads(json.dumps(self.info))
        count, fps, number = self.frames, info["fps"], self.episodes
        last = self._last
        first = last["dataset_to_index"] if last else 0
        tasks = [*self._tasks, *dict.fromkeys(t for t in self._rows["task"] if t not in self._tasks)]

        columns = {k: v for k, v in self._rows.items() if k != "task"}
        columns["timestamp"] = (np.arange(count) / fps).astype(np.float32)
        columns["frame_index"] = np.arange(count)
        columns["episode_index"] = np.full(count, number)
        columns["index"] = np.arange(first, first + count)
        columns["task_index"] = np.array([tasks.index(t) for t in self._rows["task"]])
        row: dict[str, Any] = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(self._rows["task"])),
            "length": count,
            "dataset_from_index": first,
            "dataset_to_index": first + count,
        }
        row |= self._stage_data(staged, info, columns, last)
        for key in layout.keys(info, "video"):
            row |= self._stage_video(staged, info, key, count, last)

        stats = {}
        for key, feature in info["features"].items():
            if feature["dtype"] in ("video", "image"):
                stats[key] = layout.colour_stats(self._histograms[key], count)
            else:
                stats[key] = layout.vector_stats(np.asarray(columns[key]).reshape(count, -1))
        for key, values in layout.stats_to_json(stats).items():
            row |= {f"stats/{key}/{name}": value for name, value in values.items()}
        merged = layout.merge_stats([self._stats, stats]) if self._stats else stats

        lines = self._stage_episode(staged, info, row, last)
        info["total_episodes"], info["total_frames"] = number + 1, first + count
        info["total_tasks"], info["splits"] = len(tasks), {"train": f"0:{number + 1}"}
        pd.DataFrame({"task_index": range(len(tasks))}, index=tasks).to_parquet(_made(staged / layout.TASKS))
        _write_json(staged / layout.STATS, layout.stats_to_json(merged))
        _write_json(staged / layout.INFO, info)
        return info, tasks, lines, layout.stats_from_json(layout.read_json(staged / layout.STATS))

    def _stage_data(self, staged: Path, info: dict, columns: dict, last: dict | None) -> dict[str, int]:
        schema = layout.data_schema(info)
        episode = pa.table([_arrow(columns[field.name], field.type) for field in schema], schema=schema)
        place = (last["data/chunk_index"], last["data/file_index"]) if last else (0, 0)
        old = self.root / info["data_path"].format(chunk_index=place[0], file_index=place[1])
        groups = []
        if last:
            file = pq.ParquetFile(old)
            growth = 1 + episode.num_rows / max(file.metadata.num_rows, 1)
            if old.stat().st_size / 2**20 * growth >= info["data_files_size_in_mb"]:
                place = layout.after(place, info["chunks_size"])
            else:
                pictures = layout.keys(info, "image")  # a group an episode, so that one can be read alone
                groups = (
                    [file.read_row_group(i) for i in range(file.num_row_groups)]
                    if pictures
                    else [file.read()]
                )
        target = _made(staged / info["data_path"].format(chunk_index=place[0], file_index=place[1]))
        with pq.ParquetWriter(target, schema, compression="snappy", use_dictionary=True) as out:
            tables = [group.cast(schema) for group in [*groups, episode]]
            for table in tables if layout.keys(info, "image") else [pa.concat_tables(tables)]:
                out.write_table(table)
        return {"data/chunk_index": place[0], "data/file_index": place[1]}

    def _stage_video(
        self, staged: Path, info: dict, key: str, count: int, last: dict | None
    ) -> dict[str, Any]:
        new, start = self._recording(key), 0.0
        place = (last[f"videos/{key}/chunk_index"], last[f"videos/{key}/file_index"]) if last else (0, 0)
        old = self.root / info["video_path"].format(video_key=key, chunk_index=place[0], file_index=place[1])
        parts = [new]
        if last:
            size_mb = sum(path.stat().st_size for path in (old, new) if path.is_file()) / 2**20
            if size_mb >= info["video_files_size_in_mb"] or not video.joinable(old, new):
                place = layout.after(place, info["chunks_size"])
            else:
                parts, start = [old, new], last[f"videos/{key}/to_timestamp"]
        target = _made(
            staged / info["video_path"].format(video_key=key, chunk_index=place[0], file_index=place[1])
        )
        if len(parts) == 1:
            shutil.copyfile(new, target)
        else:
            video.concatenate(parts, target, info["fps"])
        return {
            f"videos/{key}/chunk_index": place[0],
            f"videos/{key}/file_index": place[1],
            f"videos/{key}/from_timestamp": start,
            f"videos/{key}/to_timestamp": start + count / info["fps"],
        }

    def _stage_episode(self, staged: Path, info: dict, row: dict, last: dict | None) -> pa.Table:
        place = (last["meta/episodes/chunk_index"], last["meta/episodes/file_index"]) if last else (0, 0)
        old = self._lines
        if last and self.episodes % _EPISODES_A_FILE == 0:
            place, old = layout.after(place, info["chunks_size"]), old.slice(0, 0)
        row = {**row, "meta/episodes/chunk_index": place[0], "meta/episodes/file_index": place[1]}
        new = pa.Table.from_pylist([row], schema=layout.episode_schema(info))
        lines = pa.concat_tables([old, new]).combine_chunks()
        target = _made(staged / layout.EPISODES.format(chunk_index=place[0], file_index=place[1]))
        pq.write_table(lines, target, compression="snappy")
        return lines


def saved_episodes(root: Path) -> int:
    """Episodes of the dataset at `root`, also while the last one's files are being moved; 0 without one."""
    infos = [place for place in (root / _SAVED, root) if (place / layout.INFO).is_file()]
    return layout.read_info(infos[0])["total_episodes"] if infos else 0


def recover(root: Path) -> None:
    """Finish a save that was interrupted while its files were moved, and drop what was never saved."""
    _settle(root)
    for folder in (_SAVING, _RECORDING):
        shutil.rmtree(root / folder, ignore_errors=True)


def finish_interrupted(root: Path) -> None:
    """What the next writer would do about a save that a crash interrupted: move its files to their places.

    Nothing while a writer is at work, which does it itself. Raises EpisodesError where it cannot be done.
    """
    if not (root / _SAVED).is_dir():
        return
    try:
        lock = _lock(root)
    except EpisodesError:
        return
    except OSError as error:
        raise EpisodesError(
            f"{root}: its last episode was not put in place, nor can it be: {error}"
        ) from error
    try:
        recover(root)
    finally:
        os.close(lock)


def _settle(root: Path) -> None:
    """Move the files of the episode saved last to their places, where that is not done. Raises OSError."""
    saved = root / _SAVED
    if saved.is_dir():
        files = [path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()]
        for name in sorted(
            files, key=lambda name: next(i for i, p in enumerate(_MOVE_ORDER) if name.startswith(p))
        ):
            os.replace(saved / name, _made(root / name))
        shutil.rmtree(saved)


def _last_row(lines: pa.Table) -> dict[str, Any] | None:
    """Where the last episode lies, without its statistics."""
    places = lines.select([n for n in lines.column_names if not n.startswith("stats/")])
    return places.slice(places.num_rows - 1).to_pylist()[0] if places.num_rows else None


def _lock(root: Path) -> int:
    file = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(file, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(file)
        raise EpisodesError(
            f"{root}: another writer (process {holder}) is at work on this dataset: stop it first, or record "
            "to another folder"
        ) from None
    os.truncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
    return file


def _arrow(values, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        flat = np.asarray(values).reshape(-1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.array(values, kind)
    return pa.array(np.asarray(values).reshape(-1), kind)


def _png(rgb: np.ndarray, index: int) -> dict[str, Any]:
    data = io.BytesIO()
    Image.fromarray(rgb).save(data, "PNG", compress_level=1)
    return {"bytes": data.getvalue(), "path": f"frame-{index:06d}.png"}


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_json(path: Path, data: dict) -> None:
    part = _made(path.with_suffix(".part"))
    part.write_text(json.dumps(data, indent=4, ensure_ascii=False))
    os.replace(part, path)


def _sync(folder: Path) -> None:
    """Bring everything under `folder` to the disk."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            _sync_entries(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _sync_entries(folder: Path) -> None:
    """Bring a folder's names to the disk: without it a power cut can undo a rename."""
    entries = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entries)
    finally:
        os.close(entries)
