"""Whatever happens to the recorder, every saved episode is there and the dataset goes on."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from episodes import writer as writing
from episodes.layout import EpisodesError
from episodes.merge import merge
from episodes.reader import Dataset
from episodes.video import VideoError
from episodes.writer import Writer, finish_interrupted
from tests.episodes import samples
from tests.episodes.samples import CAMERA

ROOT = Path(__file__).resolve().parents[2]


def assert_whole(root: Path, episodes: int, frames: int = 12) -> None:
    """The dataset has these episodes, and pictures, vectors and tasks belong together."""
    data = Dataset(root)
    assert [row.length for row in data.rows] == [frames] * episodes
    for number in range(episodes):
        np.testing.assert_array_equal(data.values(number, "frame_index"), np.arange(frames))
        np.testing.assert_allclose(data.values(number, "timestamp"), np.arange(frames) / 10, atol=1e-6)
        np.testing.assert_array_equal(data.values(number, "index"), number * frames + np.arange(frames))
        np.testing.assert_array_equal(
            data.values(number, "observation.state")[:, :2].astype(int), [[number, k] for k in range(frames)]
        )
        assert set(data.tasks(number)) == {f"task {number % 2}"}
        wanted = [frames - 1, 0, 5]
        pictures = data.frames(number, CAMERA, wanted)
        assert [samples.bar_at(p) for p in pictures] == wanted
        assert abs(int(pictures[0][0, 0, 0]) - 40 * (number % 5)) < 8


@pytest.mark.parametrize("video", [True, False])
def test_what_is_recorded_is_read_back(tmp_path, video):
    with samples.create(tmp_path / "d", video) as writer:
        assert [samples.record(writer, n) for n in range(3)] == [0, 1, 2]
    assert_whole(tmp_path / "d", 3)


def test_a_later_session_appends(tmp_path):
    with samples.create(tmp_path / "d") as writer:
        samples.record(writer, 0)
    with Writer(tmp_path / "d") as writer:
        assert samples.record(writer, 1) == 1
    assert_whole(tmp_path / "d", 2)
    assert len(list((tmp_path / "d").rglob("*.mp4"))) == 1


def test_a_discarded_episode_leaves_nothing(tmp_path):
    with samples.create(tmp_path / "d") as writer:
        writer.add(samples.frame(7, 0), "mistake")
        writer.discard()
        samples.record(writer, 0)
    assert_whole(tmp_path / "d", 1)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [".lock", "data", "meta", "videos"]


def test_full_files_are_followed_by_new_ones(tmp_path):
    with samples.create(tmp_path / "d", video=False, data_file_mb=0.01) as writer:
        for number in range(3):
            samples.record(writer, number)
    assert len(list((tmp_path / "d/data").rglob("*.parquet"))) == 3
    assert_whole(tmp_path / "d", 3)
    with samples.create(tmp_path / "v", video_file_mb=0.003) as writer:
        for number in range(3):
            samples.record(writer, number)
    assert len(list((tmp_path / "v").rglob("*.mp4"))) > 1
    assert_whole(tmp_path / "v", 3)


class Crash(BaseException):
    """Stands for the process ending at this very call."""


@pytest.mark.parametrize("call", range(7))
def test_a_crash_between_any_two_moves_loses_at_most_the_running_episode(tmp_path, monkeypatch, call):
    writer = samples.create(tmp_path / "d")
    samples.record(writer, 0)
    done, real = [], os.replace

    def replace(source, target):
        if len(done) == call:
            raise Crash
        if Path(source).name != "info.part" and Path(source).name != "stats.part":
            done.append(target)
        real(source, target)

    monkeypatch.setattr(writing.os, "replace", replace)
    with pytest.raises(Crash):
        samples.record(writer, 1)
    monkeypatch.undo()
    os.close(writer._lock)  # as the end of the process does
    saved = call > 0  # the first move is the one that counts
    before = Dataset(tmp_path / "d")  # opens as it lies there, nothing repaired
    assert len(before) in (1, 1 + saved)
    assert samples.bar_at(before.frames(0, CAMERA, [3])[0]) == 3
    with Writer(tmp_path / "d") as again:
        assert again.episodes == 1 + saved
        samples.record(again, again.episodes)
    assert_whole(tmp_path / "d", 2 + saved)


def test_an_interrupted_save_is_finished_before_it_is_copied(tmp_path, monkeypatch):
    writer = samples.create(tmp_path / "d")
    samples.record(writer, 0)
    settle = writing._settle

    def crash(root):
        if (root / ".saved").is_dir():
            raise Crash
        settle(root)

    monkeypatch.setattr(writing, "_settle", crash)
    with pytest.raises(Crash):
        samples.record(writer, 1)
    monkeypatch.undo()
    finish_interrupted(tmp_path / "d")  # the writer is at work: it is left to it
    assert len(Dataset(tmp_path / "d")) == 1
    os.close(writer._lock)  # as the end of the process does
    assert merge([tmp_path / "d", tmp_path / "d"], tmp_path / "both") == 4
    assert_whole(tmp_path / "d", 2)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_video_that_got_damaged_keeps_no_new_episode_from_being_saved(tmp_path, damage):
    with samples.create(tmp_path / "d") as writer:
        samples.record(writer, 0)
        (old,) = (tmp_path / "d" / "videos").rglob("*.mp4")
        old.write_bytes(old.read_bytes()[:300]) if damage == "cut" else old.unlink()
        samples.record(writer, 1)
    data = Dataset(tmp_path / "d")
    assert len(data) == 2 and samples.bar_at(data.frames(1, CAMERA, [3])[0]) == 3


RECORDER = """
import sys
sys.path.insert(0, {root!r})
from tests.episodes import samples
from pathlib import Path
from episodes.writer import Writer
writer = Writer(Path({dataset!r}))
while True:
    number = writer.episodes
    for index in range(12):
        writer.add(samples.frame(number, index), f"task {{number % 2}}")
        print("frame", index, flush=True)
    writer.save()
    print("saved", number, flush=True)
"""


def test_kill_9_while_recording(tmp_path):
    root = tmp_path / "d"
    samples.create(root).close()
    code = RECORDER.format(root=str(ROOT), dataset=str(root))
    saved, rng = 0, np.random.default_rng(0)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        seen = 0
        for line in process.stdout:
            if line.startswith("saved"):
                seen = int(line.split()[1]) + 1
            if seen > saved and line.startswith("frame 6"):
                time.sleep(rng.uniform(0, 0.05))  # somewhere in the rest of the episode or in its saving
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        process.wait()
        assert len(Dataset(root)) >= seen
        with Writer(root) as writer:
            saved = writer.episodes
        assert saved >= seen
        assert_whole(root, saved)


def test_only_one_writer(tmp_path):
    with samples.create(tmp_path / "d"), pytest.raises(EpisodesError, match="another writer"):
        Writer(tmp_path / "d")
    Writer(tmp_path / "d").close()


def test_of_two_that_create_one_dataset_the_second_changes_nothing(tmp_path, monkeypatch):
    real, refused = writing._write_json, []

    def meanwhile(path, data):  # another recorder, before this one has written what it makes
        monkeypatch.undo()
        with pytest.raises(EpisodesError, match="another writer") as error:
            samples.create(tmp_path / "d", video=False)
        refused.append(error)
        assert not path.exists()
        real(path, data)

    monkeypatch.setattr(writing, "_write_json", meanwhile)
    with samples.create(tmp_path / "d") as writer:
        samples.record(writer, 0)
    assert refused and Dataset(tmp_path / "d").info["features"][CAMERA]["dtype"] == "video"


def test_a_full_disk_keeps_the_dataset_and_the_episode(tmp_path, monkeypatch):
    with samples.create(tmp_path / "d") as writer:
        samples.record(writer, 0)

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writing, "_sync", full)
        with pytest.raises(OSError, match="No space"):
            samples.record(writer, 1)
        assert_whole(tmp_path / "d", 1)
        monkeypatch.undo()
        writer.save()  # space was made
    assert_whole(tmp_path / "d", 2)


def test_an_episode_whose_files_cannot_be_moved_is_saved_all_the_same(tmp_path, monkeypatch):
    """The disk fills between the rename that counts and the last move: later saves and writers go on."""
    real, moves = os.replace, []

    def full(source, target):
        if f"{writing._SAVED}/" in str(source):
            moves.append(target)
            if len(moves) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    with samples.create(tmp_path / "d") as writer:
        samples.record(writer, 0)
        monkeypatch.setattr(writing.os, "replace", full)
        samples.record(writer, 1)
        assert writer.episodes == 2 and len(Dataset(tmp_path / "d")) == 1
        with pytest.raises(OSError, match="No space"):
            samples.record(writer, 2)
        assert writer.frames and writer.episodes == 2, "kept for another try"
        monkeypatch.undo()
        assert writer.save() == 2
    assert_whole(tmp_path / "d", 3)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"action": np.array([0.0, np.nan, 0.0])}, "not finite"),
        ({"action": np.zeros(4)}, "shape"),
        ({CAMERA: np.zeros((48, 64, 3))}, "uint8"),
        ({"depth": np.zeros(1)}, "no feature"),
    ],
)
def test_a_wrong_frame_is_refused_and_the_episode_goes_on(tmp_path, change, what):
    with samples.create(tmp_path / "d") as writer:
        writer.add(samples.frame(0, 0), "task 0")
        with pytest.raises(EpisodesError, match=what):
            writer.add({**samples.frame(0, 1), **change}, "task 0")
        for index in range(1, 12):
            writer.add(samples.frame(0, index), "task 0")
        writer.save()
    assert_whole(tmp_path / "d", 1)


def test_refusals(tmp_path):
    with pytest.raises(EpisodesError, match="not a LeRobotDataset"):
        Writer(tmp_path)
    with samples.create(tmp_path / "d") as writer, pytest.raises(EpisodesError, match="without frames"):
        writer.save()
    with samples.create(tmp_path / "d") as writer:  # without an episode it is nobody's yet
        samples.record(writer, 0)
    with pytest.raises(EpisodesError, match="holds a dataset already"):
        samples.create(tmp_path / "d")
    odd = {CAMERA: {"dtype": "video", "shape": [47, 64, 3], "names": None}}
    with Writer.create(tmp_path / "odd", 10, odd) as writer, pytest.raises(VideoError, match="64x47"):
        writer.add({CAMERA: np.zeros((47, 64, 3), np.uint8)}, "task")


@pytest.mark.parametrize("kind", ["video", "images"])
def test_a_dataset_that_lerobot_wrote_is_continued(tmp_path, kind):
    shutil.copytree(samples.reference(kind), tmp_path / "d", copy_function=shutil.copyfile)
    for path in [tmp_path / "d", *(tmp_path / "d").rglob("*")]:
        path.chmod(0o755)
    rgb = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with Writer(tmp_path / "d") as writer:
        assert writer.episodes == 3
        for k in range(5):
            values = {"observation.state": np.full(16, k), "action": np.full(16, k)}
            writer.add({CAMERA: rgb, **values}, "clear the table")
        assert writer.save() == 3
    data = Dataset(tmp_path / "d")
    assert [row.length for row in data.rows] == [100, 100, 100, 5]
    np.testing.assert_array_equal(data.values(3, "index"), np.arange(300, 305))
    assert set(data.tasks(3)) == {"clear the table"}
    assert set(data.tasks(0)) == {"stack the cups"}
    assert np.abs(data.frames(3, CAMERA, [4])[0].astype(int) - rgb).mean() < 20
    original = Dataset(samples.reference(kind))
    np.testing.assert_array_equal(data.frames(2, CAMERA, [99]), original.frames(2, CAMERA, [99]))
