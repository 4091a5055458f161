"""Something-Something v2, and plain folders of videos or of frames."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from config.dataset import DatasetConfig
from episodes.video import VideoError, frame_times, read_frames
from training.data.episode import DataError, Episode, decode_picture, finite, uniform_times

VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
PICTURES = (".jpg", ".jpeg", ".png")
VIEW = "video"
_TOLERANCE_S = 1e-3  # times come from the file itself


class SomethingReader:
    """Something-Something v2: `labels/train.json`, .. with [{"id", "label"}], and `<id>.webm` in a folder.

    The label is the instruction. 12 frames/s, from the files.
    """

    action_names = None
    views = (VIEW,)
    _SPLITS = {"train": ("train",), "validation": ("validation",), "trainval": ("train", "validation")}  # noqa: RUF012

    def __init__(self, path: Path, config: DatasetConfig):
        if config.split not in self._SPLITS:
            raise DataError(f"{path}: split {config.split!r}; choose {', '.join(self._SPLITS)}")
        self.broken: list[tuple[str, str]] = []
        found = {p.stem: p for p in sorted(path.glob("**/*.webm"))}
        self._videos: list[tuple[Path, str]] = []
        for split in self._SPLITS[config.split]:
            for entry in _labels(path, split):
                video = found.get(str(entry["id"]))
                if video is None:
                    self.broken.append((f"{entry['id']}.webm", "labelled, but no such file"))
                else:
                    self._videos.append((video, entry["label"]))
        self._videos = self._videos[: config.max_episodes]

    def __len__(self) -> int:
        return len(self._videos)

    def key(self, index: int) -> str:
        return self._videos[index][0].stem

    def length(self, index: int) -> int:
        return len(_times(self._videos[index][0]))

    def episode(self, index: int) -> Episode:
        path, label = self._videos[index]
        return video_episode(self.key(index), path, label)

    def fingerprint(self) -> str:
        return fingerprint(path for path, _ in self._videos)


def _labels(root: Path, split: str) -> list[dict]:
    for name in (f"labels/{split}.json", f"something-something-v2-{split}.json"):
        path = root / name
        if path.is_file():
            try:
                entries = json.loads(path.read_text())
                return [{"id": e["id"], "label": str(e["label"])} for e in entries]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}: not a list of {{id, label}}: {error!r}") from error
    raise DataError(f"{root}: no labels/{split}.json; download the labels of Something-Something v2 too")


class FolderReader:
    """A tree of video files, or of folders of numbered pictures; each is an episode.

    Instruction: `<video>.txt`; `task_description.txt` or `instruction.txt` in an episode's folder.
    `<episode>/images/*.png` with `<episode>/actions.npy` (the official preprocessing) is read too.
    """

    action_names = None
    views = (VIEW,)

    def __init__(self, path: Path, config: DatasetConfig):
        self.broken: list[tuple[str, str]] = []
        self._root, self._rate = path, config.rate_hz
        pictures = {p.parent for p in path.rglob("*") if p.suffix.lower() in PICTURES}
        videos = {p for p in path.rglob("*") if p.suffix.lower() in VIDEOS and p.is_file()}
        self._items = sorted(pictures | videos)[: config.max_episodes]
        if self._rate is None and any(p.is_dir() for p in self._items):
            raise DataError(f"{path}: folders of frames do not say how fast they are: set rate_hz")

    def __len__(self) -> int:
        return len(self._items)

    def key(self, index: int) -> str:
        path = self._items[index]
        folder = path.parent if path.name == "images" else path
        return folder.relative_to(self._root).as_posix() if folder != self._root else folder.name

    def length(self, index: int) -> int:
        path = self._items[index]
        return len(_pictures(path)) if path.is_dir() else len(_times(path))

    def episode(self, index: int) -> Episode:
        path, key = self._items[index], self.key(index)
        if not path.is_dir():
            return video_episode(key, path, _text(path.with_suffix(".txt")))
        files = _pictures(path)
        folder = path.parent if path.name == "images" else path
        actions = None
        if (folder / "actions.npy").is_file():
            try:
                stored = np.load(folder / "actions.npy", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{folder}/actions.npy: not a NumPy array: {error}") from error
            actions = finite(stored, key, "action")
            if len(actions) != len(files):
                raise DataError(f"{folder}: {len(actions)} actions, {len(files)} frames")

        def decode(_: str, indices: np.ndarray) -> np.ndarray:
            return stack([decode_picture(files[i].read_bytes(), str(files[i])) for i in indices], key)

        return Episode(
            key=key,
            timestamps=uniform_times(len(files), self._rate),
            views=self.views,
            instruction=_text(folder / "task_description.txt", folder / "instruction.txt"),
            decode=decode,
            actions=actions,
        )

    def fingerprint(self) -> str:
        return fingerprint(self._items)


def video_episode(key: str, path: Path, instruction: str) -> Episode:
    """A video file as an episode. Raises DataError."""
    times = _times(path)

    def decode(_: str, indices: np.ndarray) -> np.ndarray:
        try:
            return read_frames(path, times[indices], _TOLERANCE_S)
        except VideoError as error:
            raise DataError(str(error)) from error

    return Episode(key, times, (VIEW,), instruction, decode)


def _times(path: Path) -> np.ndarray:
    try:
        times = frame_times(path)
    except VideoError as error:
        raise DataError(str(error)) from error
    if not len(times):
        raise DataError(f"{path}: has no frames")
    return times


def _pictures(folder: Path) -> list[Path]:
    """By the number in the name where all have one, else by name."""
    files = [p for p in folder.iterdir() if p.suffix.lower() in PICTURES]
    numbers = ["".join(c for c in p.stem if c.isdigit()) for p in files]
    return sorted(
        files,
        key=(lambda p: (int("".join(c for c in p.stem if c.isdigit())), p.name)) if all(numbers) else None,
    )


def _text(*candidates: Path) -> str:
    """The first of the files that exists. Raises DataError where it is not UTF-8."""
    for path in candidates:
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 text, save it as that: {error}") from error
    return ""


def stack(pictures: Sequence[np.ndarray], key: str) -> np.ndarray:
    """One array of an episode's pictures. Raises DataError where their sizes differ."""
    if len({p.shape for p in pictures}) > 1:
        raise DataError(f"{key}: its frames differ in size: {sorted({p.shape[:2] for p in pictures})}")
    return np.stack(pictures)


def fingerprint(paths: Iterable[Path]) -> str:
    """Hash of names, sizes and times of files."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]
