"""The released stage-2 data: JSON lines with latent actions, and a cache of VQGAN codes by picture.

As the official data code reads it (repository sroutray/vipra, policy/data.py); the released files themselves
(cotrain-dynamics14, cotrain-vqgan-vision-cache) were not at hand. A line has `id`, `instruction` (the whole
prompt), `image` [o_{t-1}, o_t], `latent_state` [o_{t+14}] and `latent_action_idxs` (14 x 16, row after row);
a line of the cache has `image_id` and `image_encodings` (256 codes).
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from training.data.episode import DataError
from training.data.index import cache_folder
from training.data.videos import fingerprint

FRAME_CODES = 256
LATENT_CODES = 16


class JsonlTokens:
    """`tokens[i]` -> prompt str, codes i64 [3, 256] (o_{t-1}, o_t, o_{t+H}), latents i64 [H, 16], id str.

    Both files stay on disk; where their lines start is counted once and kept in the user's cache folder.
    """

    def __init__(self, jsonl: Path, vision_cache: Path, cache: Path | None = None):
        """Raises DataError where a file is missing."""
        for path in (jsonl, vision_cache):
            if not Path(path).is_file():
                raise DataError(f"{path}: no such file")
        self._lines, self._codes = Path(jsonl), Path(vision_cache)
        folder = cache or cache_folder()
        self._starts, _ = _index(self._lines, None, folder)
        starts, names = _index(self._codes, "image_id", folder)
        order = np.argsort(names, kind="stable")
        self._names, self._places = names[order], starts[order]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises DataError for a damaged line or a picture the cache lacks."""
        line = _line(self._lines, int(self._starts[index]))
        try:
            dataset = dataset_of(line["id"])
            pictures = [*line["image"], *line["latent_state"]]
            latents = np.array(line["latent_action_idxs"], np.int64)
            if len(pictures) != 3 or latents.size % LATENT_CODES:
                raise DataError(
                    f"{self._lines}: {line['id']}: {len(pictures)} pictures (3 needed), {latents.size} "
                    f"latent codes (a multiple of {LATENT_CODES} needed)"
                )
            return {
                "id": line["id"],
                "prompt": line["instruction"],
                "codes": np.stack([self._picture(cache_key(dataset, path)) for path in pictures]),
                "latents": latents.reshape(-1, LATENT_CODES),
            }
        except (KeyError, TypeError) as error:
            raise DataError(f"{self._lines}: line {index}: lacks {error}") from error

    def _picture(self, name: str) -> np.ndarray:
        digest = _digest(name)
        at = int(np.searchsorted(self._names, digest))
        while at < len(self._names) and self._names[at] == digest:
            line = _line(self._codes, int(self._places[at]))
            if line["image_id"] == name:
                codes = np.array([int(c) for c in line["image_encodings"]], np.int64)
                if codes.size != FRAME_CODES:
                    raise DataError(f"{self._codes}: {name}: {codes.size} codes, {FRAME_CODES} needed")
                return codes
            at += 1
        raise DataError(f"{self._codes}: has no picture {name}")


def dataset_of(identifier: str) -> str:
    """bridge/.. fractal/.. kuka/.. ssv2_.. libero_.. of a line's id. Raises DataError."""
    for name in ("bridge/", "fractal/", "kuka/", "ssv2_", "libero_"):
        if identifier.startswith(name):
            return name[:-1]
    raise DataError(f"id {identifier!r} is of none of bridge, fractal, kuka, ssv2, libero")


def cache_key(dataset: str, picture: str) -> str:
    """The cache's name of a picture's path, as in the official `image_path_to_cache_key`."""
    path = Path(picture)
    if dataset == "ssv2":
        return f"{path.parent.name}_{path.name}"
    if dataset == "libero":
        suite = next((p for p in path.parts if p.startswith("libero_") and p.endswith("_modified")), None)
        if suite is None:
            return f"libero_{path.parent.name}_{path.stem}.png"
        return f"{suite.removesuffix('_modified')}_{path.parent.name}_{path.stem}.png"
    episode = next((p.removeprefix("episode_") for p in path.parts if p.startswith("episode_")), None)
    if episode is None:
        return picture
    prefix = {"fractal": "fractal20220817_data_episode", "bridge": "bridge_episode", "kuka": "kuka_episode"}[
        dataset
    ]
    return f"{prefix}_{episode}_{path.stem}.png"


def _digest(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big"))


def _line(path: Path, start: int) -> dict[str, Any]:
    with open(path, "rb") as file:
        file.seek(start)
        try:
            return json.loads(file.readline())
        except ValueError as error:
            raise DataError(f"{path}: the line at byte {start} is not JSON: {error}") from error


def _index(path: Path, field: str | None, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(start of each line in bytes, digest of each line's `field`)."""
    kept = folder / f"lines-{fingerprint([path])}.npz"
    if kept.is_file():
        with np.load(kept, allow_pickle=False) as data:
            return data["starts"], data["names"]
    starts, names, at = [], [], 0
    with open(path, "rb") as file, Progress(transient=True) as progress:
        bar = progress.add_task(f"indexing {path.name}", total=path.stat().st_size)
        for line in file:
            if line.strip():
                starts.append(at)
                if field:
                    try:
                        names.append(_digest(json.loads(line)[field]))
                    except (ValueError, KeyError, TypeError):
                        starts.pop()  # a cut line, as at the end of an interrupted download
            at += len(line)
            if len(starts) % 4096 == 0:
                progress.update(bar, completed=at)
    result = np.array(starts, np.int64), np.array(names, np.uint64)
    folder.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}.part.npz")
    np.savez(part, starts=result[0], names=result[1])
    os.replace(part, kept)
    return result
