"""Merged datasets hold every episode as it was."""

import numpy as np
import pytest

from episodes import layout
from episodes.layout import EpisodesError
from episodes.merge import merge
from episodes.reader import Dataset
from episodes.writer import Writer
from tests.episodes import samples


@pytest.mark.parametrize("video", [True, False])
def test_every_episode_is_copied_without_loss(tmp_path, video):
    for name, numbers in {"a": (0, 1, 2), "b": (3, 4)}.items():
        with samples.create(tmp_path / name, video) as writer:
            for number in numbers:
                samples.record(writer, number, frames=9 + number)
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out") == 5
    sources, out = [Dataset(tmp_path / "a"), Dataset(tmp_path / "b")], Dataset(tmp_path / "out")
    places = [(source, i) for source in sources for i in range(len(source))]
    for episode, (source, i) in enumerate(places):
        assert out.tasks(episode) == source.tasks(i)
        for key in out.vectors:
            np.testing.assert_array_equal(out.values(episode, key), source.values(i, key))
        frames = range(out.rows[episode].length)
        np.testing.assert_array_equal(
            out.frames(episode, samples.CAMERA, frames), source.frames(i, samples.CAMERA, frames)
        )
    merged = layout.stats_from_json(layout.read_json(out.root / layout.STATS))
    parts = layout.merge_stats(
        [layout.stats_from_json(layout.read_json(s.root / layout.STATS)) for s in sources]
    )
    for name, value in parts["action"].items():
        np.testing.assert_allclose(merged["action"][name], value)
    for name, value in parts[samples.CAMERA].items():  # of decoded pictures here
        np.testing.assert_allclose(merged[samples.CAMERA][name], value, atol=0.02)
    with Writer(out.root) as writer:  # goes on
        assert samples.record(writer, 5) == 5


def test_datasets_that_differ_are_refused_by_name(tmp_path):
    with samples.create(tmp_path / "a") as writer:
        samples.record(writer, 0)
    with Writer.create(tmp_path / "b", 10, {"action": layout.vector(["x"])}, "test_arm") as writer:
        writer.add({"action": [0.0]}, "t")
        writer.save()
    with pytest.raises(EpisodesError, match="cannot be merged: only one has observation"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(EpisodesError, match="not empty"):
        merge([tmp_path / "a"], tmp_path / "b")
    assert len(Dataset(tmp_path / "b")) == 1
