"""LeRobotDataset v3.0 through `episodes`."""

from pathlib import Path

import numpy as np

from config.dataset import DatasetConfig
from episodes.layout import EpisodesError
from episodes.reader import Dataset
from episodes.video import VideoError
from training.data.episode import DataError, Episode, finite
from training.data.videos import fingerprint

_CAMERA = "observation.images."


class LeRobotReader:
    """Views: the cameras without `observation.images.`; actions: `action`; state: `observation.state`."""

    def __init__(self, path: Path, config: DatasetConfig):
        self.broken: list[tuple[str, str]] = []
        try:
            self._data = Dataset(path)
            self._action = self._vector(config.action_key, "action")
            self._state = self._vector(config.state_key, "observation.state")
        except EpisodesError as error:
            raise DataError(str(error)) from error
        self._cameras = {key.removeprefix(_CAMERA): key for key in self._data.cameras}
        self.views = tuple(self._cameras)
        self.action_names = self._data.names(self._action) or None if self._action else None
        self._count = min(len(self._data), config.max_episodes or len(self._data))

    def _vector(self, asked: str | None, usual: str) -> str | None:
        if asked is not None:
            self._data.names(asked)  # raises for an unknown one
            return asked
        return usual if usual in self._data.vectors else None

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> str:
        return f"episode_{self._data.rows[index].index:06d}"

    def length(self, index: int) -> int:
        return self._data.rows[index].length

    def episode(self, index: int) -> Episode:
        key = self.key(index)

        def read(name: str) -> np.ndarray:
            try:
                return self._data.values(index, name)
            except EpisodesError as error:
                raise DataError(str(error)) from error

        def decode(view: str, indices: np.ndarray) -> np.ndarray:
            try:
                return self._data.frames(index, self._cameras[view], indices)
            except (EpisodesError, VideoError) as error:
                raise DataError(f"{key}: {error}") from error

        def matrix(name: str | None, what: str) -> np.ndarray | None:
            return finite(read(name).reshape(self.length(index), -1), key, what) if name else None

        tasks = self._data.rows[index].tasks
        return Episode(
            key=key,
            timestamps=read("timestamp").astype(np.float64),
            views=self.views,
            instruction=tasks[0] if tasks else "",
            decode=decode,
            actions=matrix(self._action, "action"),
            state=matrix(self._state, "state"),
        )

    def fingerprint(self) -> str:
        return fingerprint(sorted(self._data.root.glob("meta/**/*.parquet")))
