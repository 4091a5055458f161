"""Several recordings of one robot as one dataset."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from episodes import layout
from episodes.demonstration import difference
from episodes.layout import EpisodesError
from episodes.reader import Dataset
from episodes.writer import Writer


def merge(sources: Sequence[Path], out: Path, progress: Callable[[int, int], None] = lambda *_: None) -> int:
    """Copy every episode of `sources`, in order, to a new dataset at `out`; the number of episodes.

    progress(done, total) after each. Raises EpisodesError where two sources differ, naming in what, or where
    `out` is not empty; `out` is removed again then.
    """
    datasets = [Dataset(path) for path in sources]
    first = datasets[0]
    for other in datasets[1:]:
        if problem := difference(first.info, other.info):
            raise EpisodesError(f"{first.root} and {other.root} cannot be merged: {problem}")
    if out.exists() and any(out.iterdir()):
        raise EpisodesError(f"{out} is not empty: choose another folder")
    features = {key: first.info["features"][key] for key in layout.recorded(first.info)}
    total, done = sum(len(d) for d in datasets), 0
    try:
        with Writer.create(out, first.fps, features, first.info["robot_type"]) as writer:
            for dataset in datasets:
                for episode in range(len(dataset)):
                    writer.copy(dataset, episode)
                    writer.save()
                    done += 1
                    progress(done, total)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return done
