"""Where things are in generated demonstrations, and what can be read of it: the gate of stage 0.

Torch-free: the generator, a process of its own, writes what is read here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.linear_model import RidgeCV

from episodes.layout import INFO
from episodes.reader import Dataset

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


def generated(paths: Iterable[str]) -> Path | None:
    """The first dataset that says where things are."""
    for path in map(Path, paths):
        if (path / INFO).is_file() and PLACES in Dataset(path).vectors:
            return path
    return None


def gate(
    path: Path,
    inputs: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    held_out: Callable[[list[str]], np.ndarray],
) -> dict[str, Seen]:
    """What a ridge probe reads from each of `inputs` (uint8 RGB [n, h, w, 3] -> [n, d]), and, as `mean`, what
    always guessing the mean place gives.

    Probes are fitted to training episodes and tested on others (`held_out` of episode keys, bool). Cups
    differ by colour alone, so that telling them apart is seeing their colours.
    """
    data = Dataset(path)
    camera = data.cameras[0]
    count = min(len(data), EPISODES)
    test = held_out([f"episode_{data.rows[i].index:06d}" for i in range(count)])
    features, places = {name: [] for name in inputs}, []
    for index in range(count):
        at = np.arange(0, data.rows[index].length, EVERY)
        frames = data.frames(index, camera, at)
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
