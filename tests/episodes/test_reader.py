"""Datasets that lerobot wrote are read frame by frame as it wrote them."""

import pickle

import numpy as np
import pytest

from episodes import layout
from episodes.layout import EpisodesError
from episodes.reader import Dataset
from episodes.video import VideoError, frame_times, read_frames
from tests.episodes import samples
from tests.episodes.samples import CAMERA


def test_video_frames_are_those_of_their_index():
    """The two references hold the same pictures, one of them losslessly."""
    video, images = Dataset(samples.reference("video")), Dataset(samples.reference("images"))
    for episode in range(3):
        wanted = [99, 0, 42, 43, 7, 43]
        coded, exact = (d.frames(episode, CAMERA, wanted).astype(int) for d in (video, images))
        error = np.abs(coded[:, None] - exact[None]).mean((2, 3, 4))  # every pair
        assert error.argmin(1).tolist() == [0, 1, 2, 3, 4, 3]
        np.testing.assert_allclose(video.values(episode, "timestamp"), np.arange(100) / 20, atol=1e-5)
        np.testing.assert_array_equal(video.values(episode, "action"), images.values(episode, "action"))
        assert video.values(episode, "action").shape == (100, 16)
        assert set(video.tasks(episode)) == {"stack the cups"}


def test_names_and_cameras():
    data = Dataset(samples.reference("video"))
    assert data.cameras == (CAMERA,)
    assert data.names("action")[:2] == ("a0", "a1")
    assert len(pickle.loads(pickle.dumps(data)).values(2, "index")) == 100


def test_errors_name_what_is_there(tmp_path):
    with samples.create(tmp_path / "d") as writer:
        samples.record(writer, 0)
    data = Dataset(tmp_path / "d")
    with pytest.raises(EpisodesError, match=r"no camera 'wrist'.*front"):
        data.frames(0, "wrist", [0])
    with pytest.raises(EpisodesError, match="frames 0 to 11"):
        data.frames(0, CAMERA, [12])
    with pytest.raises(EpisodesError, match=r"no feature 'force'.*action"):
        data.names("force")
    video = next((tmp_path / "d").rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:200])
    with pytest.raises(VideoError, match="not a readable video"):
        data.frames(0, CAMERA, [0])


def test_an_older_version_names_the_converter(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / layout.INFO).write_text('{"codebase_version": "v2.1"}')
    with pytest.raises(EpisodesError, match=r"v2\.1.*convert_dataset_v21_to_v30"):
        Dataset(tmp_path)


def test_times_and_frames_of_a_video(tmp_path):
    with samples.create(tmp_path / "d") as writer:
        samples.record(writer, 0, 15)
    path = next((tmp_path / "d").rglob("*.mp4"))
    times = frame_times(path)
    np.testing.assert_allclose(times, np.arange(15) / 10, atol=1e-3)
    assert [samples.bar_at(f) for f in read_frames(path, times[[14, 2, 2, 9]], 1e-3)] == [14, 2, 2, 9]
    with pytest.raises(VideoError, match="no frame at"):
        read_frames(path, [0.25], 0.01)
    with pytest.raises(VideoError, match="ends before"):
        read_frames(path, [9.0], 0.01)
