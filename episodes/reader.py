"""Reads a LeRobotDataset v3.0: any frame of any episode, actions, state, task. Only ever reads."""

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from episodes import layout, video
from episodes.layout import EpisodesError

_DATA_FILES_KEPT = 4  # columns without pictures, in memory


@dataclass(frozen=True)
class Row:
    """One line of meta/episodes: where an episode lies."""

    index: int
    length: int
    tasks: tuple[str, ...]
    first: int  # row of the whole dataset
    data: tuple[int, int]  # chunk, file
    videos: dict[str, tuple[int, int, float]]  # key -> chunk, file, time of the first frame in s


class Dataset:
    """The dataset at `root`. Raises EpisodesError where a file is missing, broken or of another version."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.info = layout.read_info(self.root)
        self.fps: int = self.info["fps"]
        self.cameras = layout.keys(self.info, "video", "image")
        self.vectors = tuple(k for k in layout.recorded(self.info) if k not in self.cameras)
        self.rows = self._rows()
        self._table = functools.lru_cache(_DATA_FILES_KEPT)(self._read_table)

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_table"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._table = functools.lru_cache(_DATA_FILES_KEPT)(self._read_table)

    def names(self, key: str) -> tuple[str, ...]:
        """Names of a vector feature's entries. Raises EpisodesError for an unknown feature."""
        if key not in self.info["features"]:
            raise EpisodesError(f"{self.root}: no feature {key!r}; it has {list(self.info['features'])}")
        names = self.info["features"][key]["names"] or []
        if isinstance(names, dict):  # older datasets: {"axes": [...]}
            names = next(iter(names.values()), [])
        return tuple(names)

    def values(self, episode: int, key: str) -> np.ndarray:
        """A feature over an episode: [T, D], or [T] for scalars."""
        row = self.rows[episode]
        table = self._table(row.data)
        if key not in table.column_names:
            raise EpisodesError(f"{self.root}: no feature {key!r}; it has {list(self.info['features'])}")
        at = np.searchsorted(table["index"].to_numpy(), row.first)
        column = table[key].slice(at, row.length).combine_chunks()
        if len(column) != row.length:
            raise EpisodesError(
                f"{self.root}: episode {episode} has {len(column)} of {row.length} frames on disk"
            )
        if pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type):
            return column.flatten().to_numpy(zero_copy_only=False).reshape(row.length, -1)
        return column.to_numpy(zero_copy_only=False)

    def tasks(self, episode: int) -> list[str]:
        """The task of every frame."""
        return [self._tasks[int(k)] for k in self.values(episode, "task_index")]

    def frames(self, episode: int, camera: str, indices: Sequence[int]) -> np.ndarray:
        """Frames [n, h, w, 3] uint8 RGB of one camera, by frame index in the episode.

        Raises EpisodesError or VideoError.
        """
        row = self.rows[episode]
        if camera not in self.cameras:
            raise EpisodesError(f"{self.root}: no camera {camera!r}; it has {list(self.cameras)}")
        if any(not 0 <= int(i) < row.length for i in indices):
            raise EpisodesError(f"{self.root}: episode {episode} has frames 0 to {row.length - 1}")
        if camera in row.videos:
            path, start = self.video(episode, camera)
            return video.read_frames(path, start + np.asarray(indices) / self.fps, 0.4 / self.fps)
        return self._pictures(row, camera, indices)

    def video(self, episode: int, camera: str) -> tuple[Path, float]:
        """File of an episode's video and the time of its first frame in it, s."""
        chunk, file, start = self.rows[episode].videos[camera]
        name = self.info["video_path"].format(video_key=camera, chunk_index=chunk, file_index=file)
        return self.root / name, start

    def _pictures(self, row: Row, camera: str, indices: Sequence[int]) -> np.ndarray:
        file = pq.ParquetFile(self._data_path(row.data))
        wanted = {row.first + int(i) for i in indices}
        found: dict[int, np.ndarray] = {}
        for group in range(file.num_row_groups):
            lowest, highest = _index_range(file, group)
            if not any(lowest <= i <= highest for i in wanted):
                continue
            table = file.read_row_group(group, columns=["index", camera])
            table = table.filter(pc.is_in(table["index"], pa.array(sorted(wanted))))
            for index, cell in zip(table["index"].to_pylist(), table[camera].to_pylist(), strict=True):
                try:
                    with Image.open(io.BytesIO(cell["bytes"])) as picture:
                        found[index] = np.asarray(picture.convert("RGB"))
                except (UnidentifiedImageError, OSError) as error:
                    raise EpisodesError(f"{self.root}: frame {index} of {camera}: {error}") from error
        if missing := wanted - set(found):
            raise EpisodesError(f"{self.root}: frames {sorted(missing)} of {camera} are not on disk")
        return np.stack([found[row.first + int(i)] for i in indices])

    def _data_path(self, place: tuple[int, int]) -> Path:
        return self.root / self.info["data_path"].format(chunk_index=place[0], file_index=place[1])

    def _read_table(self, place: tuple[int, int]) -> pa.Table:
        path = self._data_path(place)
        try:
            file = pq.ParquetFile(path)
            return file.read(columns=[name for name in file.schema_arrow.names if name not in self.cameras])
        except (OSError, pa.ArrowException) as error:
            raise EpisodesError(f"{path}: not readable: {error}") from error

    def _rows(self) -> list[Row]:
        files = sorted(self.root.glob("meta/episodes/*/*.parquet"))
        videos = layout.keys(self.info, "video")
        try:
            columns = (
                [n for n in pq.ParquetFile(files[0]).schema_arrow.names if not n.startswith("stats/")]
                if files
                else []
            )
            lines = [line for path in files for line in pq.read_table(path, columns=columns).to_pylist()]
            tasks = self.root / layout.TASKS
            table = pd.read_parquet(tasks) if tasks.is_file() else pd.DataFrame({"task_index": []})
        except (OSError, pa.ArrowException) as error:
            raise EpisodesError(f"{self.root}/meta: not readable: {error}") from error
        self._tasks = dict(zip(table["task_index"], table.index, strict=True))
        return [
            Row(
                index=line["episode_index"],
                length=line["length"],
                tasks=tuple(line["tasks"]),
                first=line["dataset_from_index"],
                data=(line["data/chunk_index"], line["data/file_index"]),
                videos={
                    key: (
                        line[f"videos/{key}/chunk_index"],
                        line[f"videos/{key}/file_index"],
                        line[f"videos/{key}/from_timestamp"],
                    )
                    for key in videos
                },
            )
            for line in sorted(lines, key=lambda line: line["episode_index"])
        ]


def _index_range(file: pq.ParquetFile, group: int) -> tuple[int, int]:
    """Lowest and highest `index` of a row group, from its statistics."""
    leaves = [file.metadata.row_group(group).column(i) for i in range(file.metadata.num_columns)]
    stats = next(leaf for leaf in leaves if leaf.path_in_schema == "index").statistics
    return (stats.min, stats.max) if stats is not None and stats.has_min_max else (0, 1 << 62)
