"""From a `DatasetConfig` to its reader."""

from pathlib import Path

from config.dataset import DatasetConfig
from training.data.episode import DataError, Reader


def open_dataset(config: DatasetConfig) -> Reader:
    """The reader of one dataset. Raises DataError where nothing readable is found."""
    path = Path(config.path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such folder; set `path` to where the dataset lies")
    kind = detect(path) if config.kind == "auto" else config.kind
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
    return reader


def detect(path: Path) -> str:
    """What kind of dataset lies at `path`."""
    if (path / "meta" / "info.json").is_file():
        return "lerobot"
    if any(path.glob("**/*.tfrecord*")):
        return "rlds"
    if any(path.glob("**/*.hdf5")):
        return "libero"
    if any(path.glob("labels/*.json")) or any(path.glob("something-something-v2-*.json")):
        return "ssv2"
    return "folder"
