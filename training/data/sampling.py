"""The order in which a run sees its data: sample n is a pure function of (seed, n).

Nothing is counted along the way, so a run resumes at any n, and any number of ranks and workers share one
global order. Datasets take turns in blocks of `BLOCK` samples that hold each one's exact quota in a shuffled
order; within a dataset every unit (episode or frame) comes once an epoch, in that epoch's order.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from config.dataset import Augmentation, Mixture
from training.data.augment import draw
from training.data.episode import DataError, Episode
from training.data.index import lengths
from training.data.open import open_dataset
from training.data.windows import Cut, Window, check_usable

Subset = Literal["train", "validation", "all"]
BLOCK = 4096
_ATTEMPTS = 16  # replacements for an unreadable sample before the run is told


def permuted(position: int, size: int, key: int) -> int:
    """Where a keyed permutation of 0 .. size-1 sends `position`, without holding it.

    A four-round Feistel network over the next even power of two, walked until it lands inside (Black and
    Rogaway 2002).
    """
    half = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
    low = (1 << half) - 1
    while True:
        left, right = position >> half, position & low
        for round_number in range(4):
            left, right = right, left ^ (_mix(right, key, round_number) & low)
        position = left << half | right
        if position < size:
            return position


def _mix(value: int, key: int, round_number: int) -> int:
    """splitmix64 of the three."""
    mask = (1 << 64) - 1
    z = (value + (key & mask) + (round_number + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Samples of each dataset in a block, by largest remainder. Raises DataError where one gets none."""
    share = np.asarray(weights, float) / np.sum(weights) * BLOCK
    count = np.floor(share).astype(int)
    for index in np.argsort(count - share, kind="stable")[: BLOCK - count.sum()]:
        count[index] += 1
    if (count == 0).any():
        raise DataError(f"weight {weights[int(count.argmin())]} is below 1/{BLOCK} of the sum: raise it")
    return count


@functools.lru_cache(8)
def _block(seed: int, block: int, quota: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(dataset [BLOCK], how many of that dataset came before in the block [BLOCK])."""
    order = np.random.default_rng([seed, block, 1]).permutation(np.repeat(np.arange(len(quota)), quota))
    rank = np.empty(BLOCK, int)
    for dataset in range(len(quota)):
        rank[order == dataset] = np.arange(quota[dataset])
    return order, rank


def turn(seed: int, n: int, quota: tuple[int, ...]) -> tuple[int, int]:
    """(dataset of sample n, how many samples of that dataset came before)."""
    block, within = divmod(n, BLOCK)
    order, rank = _block(seed, block, quota)
    dataset = int(order[within])
    return dataset, block * quota[dataset] + int(rank[within])


def held_out(keys: Sequence[str], share: float) -> np.ndarray:
    """Which episodes are the validation subset, bool [n]: those whose names have the lowest hashes.

    At least one where `share` is above 0 and there are two. Every stage asks for all of a dataset's
    episodes, readable or not: then equal shares hold out the same ones, and a larger share holds out those
    of a smaller one too.
    """
    place = np.array([int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") for key in keys])
    count = max(round(share * len(keys)), 1) if share > 0 and len(keys) > 1 else 0
    chosen = np.zeros(len(keys), bool)
    chosen[np.argsort(place, kind="stable")[:count]] = True
    return chosen


class Samples(Dataset):
    """An endless map-style dataset: `samples[n]` for any n >= 0, cut as `window` says.

    Every sample also has `instruction`, `key` (dataset/episode), `frame`, `dataset`, `n` and `errors`
    [(key, message)], the unreadable ones it was taken instead of.
    """

    def __init__(
        self,
        mixture: Mixture,
        window: Window,
        seed: int,
        augmentation: Augmentation | None = None,
        subset: Subset = "train",
    ):
        """Raises DataError where a dataset is missing, or holds nothing this window can be cut from."""
        self.mixture, self.window, self.seed = mixture, window, seed
        self.augmentation, self.subset = augmentation, subset
        self.readers = [open_dataset(config) for config in mixture.datasets]
        self.broken = [entry for reader in self.readers for entry in reader.broken]
        self._quota = tuple(int(q) for q in quotas([config.weight for config in mixture.datasets]))
        self._episodes, self._ends = [], []
        for config, reader in zip(mixture.datasets, self.readers, strict=True):
            keep = np.arange(len(reader))
            if subset != "all":
                out = held_out([reader.key(i) for i in keep], mixture.validation_share)
                keep = keep[out == (subset == "validation")]
            if window.unit == "frame":
                counts, errors = lengths(reader)
                self.broken += errors
                short = [
                    (reader.key(i), f"has {counts[i]} frames, needs {config.min_frames}")
                    for i in keep
                    if 0 < counts[i] < config.min_frames
                ]
                self.broken += short
                keep = keep[counts[keep] >= config.min_frames]
                ends = np.cumsum(counts[keep])
            else:
                ends = np.arange(1, len(keep) + 1)
            if not len(keep):
                raise DataError(f"{config.path}: no episode for the {subset!r} subset that can be used")
            self._episodes.append(keep)
            self._ends.append(ends)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Units (episodes or frames) of each dataset."""
        return tuple(int(ends[-1]) for ends in self._ends)

    def place(self, n: int, attempt: int = 0) -> tuple[int, int, int | None]:
        """(dataset, episode of its reader, frame) of sample n; frame None is drawn once the length is known.

        attempt > 0: the sample taken instead, of the same dataset, after so many failures.
        """
        dataset, before = turn(self.seed, n, self._quota)
        size = self.sizes[dataset]
        if attempt:
            unit = _mix(n, self.seed + (attempt << 32), dataset) % size
        else:
            epoch, position = divmod(before, size)
            unit = permuted(position, size, _mix(self.seed, epoch, dataset))
        return (dataset, *self._unit(dataset, unit))

    def _unit(self, dataset: int, unit: int) -> tuple[int, int | None]:
        at = int(np.searchsorted(self._ends[dataset], unit, side="right"))
        first = int(self._ends[dataset][at - 1]) if at else 0
        return int(self._episodes[dataset][at]), unit - first if self.window.unit == "frame" else None

    def sample(self, n: int, attempt: int = 0) -> dict[str, Any]:
        """Sample n. Raises DataError where it cannot be read."""
        rng = np.random.default_rng([self.seed, n, attempt])
        dataset, index, frame = self.place(n, attempt)
        episode, cut = self._cut(dataset, index, frame, rng, self.augmentation)
        return {**self.window.read(episode, cut), **self._about(dataset, episode, cut), "n": n, "errors": []}

    def read(self, dataset: int, index: int, frame: int | None) -> dict[str, Any]:
        """The sample at a place, not augmented; where `frame` is None, from a fixed random start."""
        episode, cut = self._cut(dataset, index, frame, np.random.default_rng([self.seed, dataset, index]))
        return {**self.window.read(episode, cut), **self._about(dataset, episode, cut)}

    def _cut(
        self,
        dataset: int,
        index: int,
        frame: int | None,
        rng: np.random.Generator,
        augmentation: Augmentation | None = None,
    ) -> tuple[Episode, Cut]:
        config = self.mixture.datasets[dataset]
        episode = self.readers[dataset].episode(index)
        check_usable(episode, config)
        if frame is None:
            frame = self.window.first(episode.length, config.stride, rng)
        change = draw(augmentation, rng) if augmentation else None
        return episode, Cut(frame, config.stride, config.views, rng, change)

    def _about(self, dataset: int, episode: Episode, cut: Cut) -> dict[str, Any]:
        return {
            "instruction": episode.instruction,
            "key": f"{dataset}/{episode.key}",
            "frame": cut.at,
            "dataset": dataset,
        }

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Sample n; where it is unreadable and `on_error` is skip, another of its dataset."""
        errors: list[tuple[str, str]] = []
        for attempt in range(_ATTEMPTS):
            try:
                return {**self.sample(n, attempt), "errors": errors}
            except DataError as error:
                if self.mixture.on_error == "raise":
                    raise
                dataset, index, _ = self.place(n, attempt)
                errors.append((f"{dataset}/{self.readers[dataset].key(index)}", str(error)))
        raise DataError(f"sample {n}: {_ATTEMPTS} samples in a row are unreadable, the last: {errors[-1][1]}")
