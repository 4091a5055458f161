"""Where things are in generated demonstrations, and what can be read of it: the gate of stage 0.

Torch-free: the generator, a process of its own, writes what is read here.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from sklearn.linear_model import RidgeCV

from episodes.layout import INFO
from episodes.reader import Dataset

PLACES = "truth.places"  # feature [K * 3]: x, y, z in m, world, of each hand's fingertips and each thing
EVERY = 5  # frames
EPISODES = 200
_ALPHAS = np.logspace(-3, 5, 9)


def generated(paths: Iterable[str]) -> Path | None:
    """The first dataset that says where things are."""
    for path in map(Path, paths):
        if (path / INFO).is_file() and PLACES in Dataset(path).vectors:
            return path
    return None


def gate(
    path: Path,
    tokens: Callable[[np.ndarray], np.ndarray],
    held_out: Callable[[list[str]], np.ndarray],
) -> dict[str, tuple[float, float]]:
    """Median distance in mm between where a ridge probe from `tokens` (uint8 RGB [n, h, w, 3] -> [n, d]) sees
    each hand and thing and where it is, and the same for always guessing the mean place.

    Probes are fitted to training episodes and tested on others (`held_out` of
    episode keys, bool). Things are told apart by colour
    alone: places of one that are right need the colours to be right.
    """
    data = Dataset(path)
    camera = data.cameras[0]
    count = min(len(data), EPISODES)
    test = held_out([f"episode_{data.rows[i].index:06d}" for i in range(count)])
    inputs, places = [], []
    for index in range(count):
        at = np.arange(0, data.rows[index].length, EVERY)
        inputs.append(tokens(data.frames(index, camera, at)))
        places.append(np.asarray(data.values(index, PLACES))[at])

    def joined(parts: list[np.ndarray], which: bool) -> np.ndarray:
        return np.concatenate([p for p, held in zip(parts, test, strict=True) if held == which]).astype(float)

    x, y, truth = joined(inputs, False), joined(places, False), joined(places, True)
    probe = RidgeCV(_ALPHAS, alpha_per_target=True).fit(x, y)
    guesses = probe.predict(joined(inputs, True)), np.broadcast_to(y.mean(0), truth.shape)
    distances = [np.linalg.norm((g - truth).reshape(len(truth), -1, 3), axis=-1) * 1000 for g in guesses]
    names = [name.removesuffix("_x") for name in data.names(PLACES)[::3]]
    medians = zip(*(np.median(d, axis=0) for d in distances), strict=True)
    return {name: (float(a), float(b)) for name, (a, b) in zip(names, medians, strict=True)}
