"""Several recordings of one robot as one dataset."""

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from episodes import layout
from episodes.demonstration import difference
from episodes.layout import EpisodesError
from episodes.reader import Dataset
from episodes.writer import Writer, finish_interrupted


def merge(
    sources: Sequence[Path],
    out: Path,
    progress: Callable[[int, int], None] = lambda *_: None,
    without: Collection[int] = (),
) -> int:
    """Copy every episode of `sources`, in order, to a new dataset at `out`; the number of episodes.

    without: episodes of a single source that are left out. progress(done, total) after each. Raises
    EpisodesError where two sources differ, naming in what, where an episode to leave out is not there, or
    where `out` is not empty; `out` is removed again then.
    """
    for path in sources:
        finish_interrupted(path)
    datasets = [Dataset(path) for path in sources]
    first = datasets[0]
    if without and len(datasets) > 1:
        raise EpisodesError(
            f"{len(datasets)} datasets: name one when episodes are left out, merge the rest after"
        )
    if missing := sorted(set(without) - set(range(len(first)))):
        raise EpisodesError(f"{first.root} has episodes 0 to {len(first) - 1}, not {missing[0]}")
    for other in datasets[1:]:
        if problem := difference(first.info, other.info):
            raise EpisodesError(f"{first.root} and {other.root} cannot be merged: {problem}")
    if out.exists() and any(out.iterdir()):
        raise EpisodesError(f"{out} is not empty: choose another folder")
    features = {key: first.info["features"][key] for key in layout.recorded(first.info)}
    wanted = [(d, n) for d in datasets for n in range(len(d)) if n not in without]
    writer = Writer.create(out, first.fps, features, first.info["robot_type"])
    try:
        with writer:
            for done, (dataset, episode) in enumerate(wanted, 1):
                writer.copy(dataset, episode)
                writer.save()
                progress(done, len(wanted))
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return len(wanted)
