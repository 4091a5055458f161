"""Where things are in generated demonstrations, and what can be read of it: the gate of stage 0.

Torch-free: the generator, a process of its own, writes what is read here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.linear_model import RidgeCV

from config.dataset import DatasetConfig
from episodes.layout import INFO
from episodes.reader import Dataset
from training.data.open import open_dataset
from training.data.windows import pick_view

PLACES = "truth.places"  # feature [K * 3]: x, y, z in m, world, of each hand's fingertips and each thing
LIMIT_MM = 5.0
EVERY = 5  # frames
EPISODES = 200
_ALPHAS = np.logspace(-3, 5, 9)


@dataclass(frozen=True)
class Seen:
    """Of each hand and thing, on held-out frames."""

    off_mm: dict[str, float]  # median distance between where it is seen and where it is
    told_apart: dict[
        str, float
    ]  # share of frames in which no other of its kind is nearer to where it is seen


def generated(datasets: Iterable[DatasetConfig]) -> DatasetConfig | None:
    """The first dataset that says where things are."""
    for dataset in datasets:
        path = Path(dataset.path).expanduser()
        if (path / INFO).is_file() and PLACES in Dataset(path).vectors:
            return dataset
    return None


def gate(
    dataset: DatasetConfig,
    inputs: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    held_out: Callable[[list[str]], np.ndarray],
) -> dict[str, Seen]:
    """What a ridge probe reads from each of `inputs` (uint8 RGB [n, h, w, 3] -> [n, d]), and, as `mean`, what
    always guessing the mean place gives.

    Probes are fitted to training episodes and tested on others (`held_out` of the keys of all episodes,
    bool), EPISODES at most. Cups differ by colour alone, so that telling them apart is seeing their colours.
    """
    data, reader = Dataset(Path(dataset.path).expanduser()), open_dataset(dataset)
    out = held_out([reader.key(i) for i in range(len(reader))])
    tested = np.flatnonzero(out)[: EPISODES // 4]
    fitted = np.flatnonzero(~out)[: EPISODES - len(tested)]
    test = np.repeat([False, True], [len(fitted), len(tested)])
    features, places = {name: [] for name in inputs}, []
    for index in map(int, [*fitted, *tested]):
        episode = reader.episode(index)
        at = np.arange(0, episode.length, EVERY)
        frames = episode.frames(pick_view(episode, dataset.views), at)
        for name, read in inputs.items():
            features[name].append(read(frames))
        places.append(np.asarray(data.values(index, PLACES))[at])

    def joined(parts: list[np.ndarray], which: bool) -> np.ndarray:
        return np.concatenate([p for p, held in zip(parts, test, strict=True) if held == which]).astype(float)

    known, truth = joined(places, False), joined(places, True)
    names = [name.removesuffix("_x") for name in data.names(PLACES)[::3]]
    found = {}
    for name, parts in features.items():
        probe = RidgeCV(_ALPHAS, alpha_per_target=True).fit(joined(parts, False), known)
        found[name] = _seen(probe.predict(joined(parts, True)), truth, names)
    return found | {"mean": _seen(np.broadcast_to(known.mean(0), truth.shape), truth, names)}


def _seen(guess: np.ndarray, truth: np.ndarray, names: list[str]) -> Seen:
    """Guesses and truth [n, K * 3] m."""
    kinds = np.array([name.rpartition("_")[2] for name in names])  # red_cup is a cup
    guess, truth = (x.reshape(len(x), -1, 3) for x in (guess, truth))
    off = np.linalg.norm(guess[:, :, None] - truth[:, None], axis=-1) * 1000  # [n, guessed, true]
    alike = kinds[:, None] == kinds[None]
    nearest = np.where(alike, off, np.inf).argmin(-1)
    own = np.arange(len(names))
    median, right = np.median(off[:, own, own], axis=0), (nearest == own).mean(0)
    several = alike.sum(0) > 1
    return Seen(
        dict(zip(names, median.tolist(), strict=True)),
        {name: float(share) for name, share, more in zip(names, right, several, strict=True) if more},
    )
