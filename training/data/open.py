"""From a `DatasetConfig` to its reader."""

from dataclasses import replace
from pathlib import Path

from config.dataset import DatasetConfig
from config.embodiment import Crop
from policy_server.images import cut
from training.data.episode import DataError, Episode, Reader
from training.data.videos import PICTURES, VIDEOS


def open_dataset(config: DatasetConfig) -> Reader:
    """The reader of one dataset. Raises DataError where nothing readable is found."""
    path = Path(config.path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such folder; set `path` to where the dataset lies")
    kind = kind_of(path) if config.kind == "auto" else config.kind
    # one format's libraries must not be needed for another
    if kind == "rlds":
        from training.data.rlds import RldsReader as Kind
    elif kind == "lerobot":
        from training.data.lerobot import LeRobotReader as Kind
    elif kind == "libero":
        from training.data.libero import LiberoReader as Kind
    elif kind == "ssv2":
        from training.data.videos import SomethingReader as Kind
    else:
        from training.data.videos import FolderReader as Kind
    reader = Kind(path, config)
    if not len(reader):
        why = f": {reader.broken[0][1]}" if reader.broken else ""
        raise DataError(f"{path}: no episode of a {kind} dataset found{why}")
    if unknown := set(config.views) - set(reader.views):
        raise DataError(f"{path}: no view {sorted(unknown)}; it has {', '.join(reader.views)}")
    return Cropped(reader, config.crop) if config.crop else reader


class Cropped:
    """A reader whose pictures are cut as a policy with this crop is shown them."""

    def __init__(self, reader: Reader, crop: Crop):
        self._reader, self._crop = reader, crop
        self.views, self.action_names, self.broken = reader.views, reader.action_names, reader.broken

    def __len__(self) -> int:
        return len(self._reader)

    def key(self, index: int) -> str:
        return self._reader.key(index)

    def episode(self, index: int) -> Episode:
        episode = self._reader.episode(index)
        return replace(episode, decode=lambda view, at: cut(episode.decode(view, at), self._crop))

    def length(self, index: int) -> int:
        return self._reader.length(index)

    def fingerprint(self) -> str:
        return self._reader.fingerprint()


def kind_of(path: Path) -> str:
    """The kind of dataset at `path`, told from its files. Raises DataError that lists what was looked for."""
    if (path / "meta" / "info.json").is_file():
        return "lerobot"
    if any(path.glob("labels/*.json")) or any(path.glob("something-something-v2-*.json")):
        return "ssv2"
    for file in path.rglob("*"):
        if ".tfrecord" in file.name:
            return "rlds"
        if file.suffix == ".hdf5":
            return "libero"
        if file.suffix.lower() in (*VIDEOS, *PICTURES):
            return "folder"
    raise DataError(
        f"{path}: no dataset found: neither meta/info.json (LeRobot), *.tfrecord* (RLDS), *.hdf5 (LIBERO), "
        "labels/*.json (Something-Something), nor videos or pictures"
    )
