"""Lengths of a dataset's episodes, counted once and kept: reading them all can take an hour."""

import hashlib
import os
from pathlib import Path

import numpy as np
from rich.progress import track

from training.data.episode import DataError, Reader

_SHOWN = 2000  # episodes from which on a progress bar is worth it


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vipra_ros" / "data"


def lengths(reader: Reader, cache: Path | None = None) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """(frames of every episode, int64, 0 where unreadable; what is wrong with those).

    Kept in `cache` (default: the user's) until the files change.
    """
    folder = cache or cache_folder()
    name = hashlib.sha256(
        f"{type(reader).__name__} {reader.fingerprint()} {len(reader)}".encode()
    ).hexdigest()[:24]
    path = folder / f"{name}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as data:
            return data["lengths"], [(str(k), str(m)) for k, m in data["errors"]]
    counts, errors = np.zeros(len(reader), np.int64), []
    for index in track(range(len(reader)), "counting frames", disable=len(reader) < _SHOWN):
        try:
            counts[index] = reader.length(index)
        except DataError as error:
            errors.append((reader.key(index), str(error)))
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part.npz")
    np.savez(part, lengths=counts, errors=np.array(errors, str).reshape(-1, 2))
    os.replace(part, path)
    return counts, errors
