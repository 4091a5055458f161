"""Every format gives the same thing: the right frame at the right time, its action, state and instruction."""

import cv2
import h5py
import numpy as np
import pytest

from config.dataset import DatasetConfig
from tests.training.data import made
from training.data.episode import DataError
from training.data.open import kind_of, open_dataset


def read(path, **config):
    return open_dataset(DatasetConfig(path=str(path), **config))


@pytest.fixture
def bridge(tmp_path):
    """(the real sample, or a shard like it; whether it is real)."""
    real = made.SHARED / "bridge_v2_sample"
    return (real, True) if real.is_dir() else (made.bridge(tmp_path / "bridge", 25), False)


def test_the_bridge_sample(bridge):
    path, real = bridge
    reader = read(path)
    assert len(reader) == 25
    assert reader.broken == []
    for index in range(25):
        episode = reader.episode(index)
        assert episode.length == reader.length(index) == 10
        assert episode.actions.shape == episode.state.shape == (10, 7)
        np.testing.assert_allclose(episode.timestamps, np.arange(10) / 5)
        assert episode.instruction
        # three cameras saw the scene, the last view is black
        assert episode.views == (("image_0", "image_1", "image_2") if real else ("image_0", "image_1"))
        if real:  # metres and radians of a fifth of a second, gripper 0..1
            assert np.abs(episode.actions[:, :3]).max() < 0.05
            assert np.abs(episode.actions[:, 3:6]).max() < 0.3
            assert 0 <= episode.actions[:, 6].min() <= episode.actions[:, 6].max() <= 1
    frames = reader.episode(3).frames("image_0", [9, 0, 0])
    assert frames.dtype == np.uint8
    assert frames.shape[0] == 3
    np.testing.assert_array_equal(frames[1], frames[2])
    assert np.abs(frames[0].astype(int) - frames[1]).mean() > 0.5
    if real:
        instructions = {reader.episode(i).instruction for i in range(25)}
        assert "put carrot on plate" in instructions
        assert len(instructions) == 4
        assert frames.std() > 30


def test_a_generated_shard_is_read_as_written(tmp_path):
    reader = read(made.bridge(tmp_path / "b", instruction="поставь морковь на тарелку"))
    episode = reader.episode(2)
    np.testing.assert_allclose(episode.actions, made.actions(2))
    np.testing.assert_allclose(episode.state, 2)
    frames = episode.frames("image_0", [7, 1])
    assert [made.index_of(f) for f in frames] == [7, 1]
    assert made.episode_of(frames[0]) == 2
    assert episode.instruction == "поставь морковь на тарелку"


@pytest.mark.parametrize(("name", "rate"), [("fractal20220817_data", 3), ("kuka", 10)])
def test_open_x_layouts(tmp_path, name, rate):
    reader = read(made.open_x(tmp_path / name / "0.1.0", name))
    episode = reader.episode(0)
    np.testing.assert_allclose(episode.actions, made.actions(0), atol=1e-6)
    assert episode.state.shape == (10, 8)
    assert episode.rate_hz == pytest.approx(rate)
    assert episode.instruction == "pick coke can"
    assert made.index_of(episode.frames("image", [4])[0]) == 4
    chosen = read(tmp_path / name, action_key="action/world_vector", state_key="observation/gripper_closed")
    assert chosen.episode(0).actions.shape == (10, 3)


def test_damaged_shards(tmp_path):
    shard = next(made.bridge(tmp_path / "b").glob("*.tfrecord*"))
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data[:-50])
    reader = read(tmp_path / "b")
    assert len(reader) == 3
    assert "ends inside" in reader.broken[0][1]
    with pytest.raises(DataError, match="checksum"):
        reader.episode(0)
    assert reader.episode(1).length == 10


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"action_key": "action/velocity"}, "no feature"),
        ({"views": ("wrist",)}, r"no view \['wrist'\]; it has image_0"),
        ({"path": "/nowhere/at/all"}, "no such folder"),
    ],
)
def test_wrong_configurations_name_what_there_is(tmp_path, config, what):
    path = config.pop("path", None) or made.bridge(tmp_path / "b")
    with pytest.raises(DataError, match=what):
        read(path, **config)


def test_an_unknown_rate_has_to_be_given(tmp_path):
    made.rlds(tmp_path / "toto", "toto", {"is_first": made._tensor()}, [{"steps/is_first": [1, 0]}])
    with pytest.raises(DataError, match="set rate_hz"):
        read(tmp_path / "toto")
    assert read(tmp_path / "toto", rate_hz=30).episode(0).rate_hz == pytest.approx(30)


@pytest.mark.parametrize("kind", ["video", "images"])
def test_lerobots_own_datasets(kind):
    path = made.SHARED / f"lerobot_v3_{kind}"
    if not path.is_dir():
        pytest.skip(f"no dataset written by lerobot at {path}")
    reader = read(path)
    episode = reader.episode(1)
    assert (len(reader), episode.length, episode.views) == (3, 100, ("front",))
    assert episode.actions.shape == (100, 16)
    assert reader.action_names[0] == "a0"
    assert episode.rate_hz == pytest.approx(20, rel=1e-3)
    np.testing.assert_allclose(episode.timestamps, np.arange(100) / 20, atol=1e-5)
    assert episode.frames("front", [99, 3]).shape == (2, 256, 256, 3)
    assert episode.instruction == "stack the cups"


def test_lerobot(tmp_path):
    episode = read(made.lerobot(tmp_path / "d")).episode(2)
    frames = episode.frames("front", [11, 0, 17])
    assert [made.index_of(f) for f in frames] == [11, 0, 17]
    np.testing.assert_allclose(episode.actions[:, 0], 2 + np.arange(20) / 100, atol=1e-6)


def test_something_something(tmp_path):
    reader = read(made.something(tmp_path / "ssv2", ["Pushing a cup", "", "杯を押す"]))
    assert len(reader) == 3
    assert [reader.episode(i).instruction for i in range(3)] == ["Pushing a cup", "", "杯を押す"]
    episode = reader.episode(1)
    assert episode.length == reader.length(1) == 14
    assert episode.rate_hz == pytest.approx(12, rel=0.01)
    assert episode.actions is None
    frames = episode.frames("video", [13, 2, 6])
    assert [made.index_of(f) for f in frames] == [13, 2, 6]
    assert {made.episode_of(f) for f in frames} == {1}


def test_missing_videos_are_listed(tmp_path):
    root = made.something(tmp_path / "ssv2", ["one", "two"])
    (root / "20bn-something-something-v2/101.webm").unlink()
    reader = read(root)
    assert len(reader) == 1
    assert reader.broken == [("101.webm", "labelled, but no such file")]


def test_libero(tmp_path):
    reader = read(made.libero(tmp_path / "libero"))
    episode = reader.episode(1)
    np.testing.assert_allclose(episode.actions, made.actions(1), atol=1e-7)
    assert episode.state.shape == (10, 9)
    assert episode.instruction == "put the bowl on the plate"
    assert episode.rate_hz == pytest.approx(20)
    frames = episode.frames("agentview", [8, 0, 8])
    assert [made.index_of(f) for f in frames] == [8, 0, 8]  # the bar is in the lower half again


def test_folders_of_videos_and_frames(tmp_path):
    made.video(tmp_path / "v" / "deep" / "clip.mp4", 3, 9, codec="libx264")
    (tmp_path / "v/deep/clip.txt").write_text("wipe the table\n")
    reader = read(tmp_path / "v")
    episode = reader.episode(0)
    assert (episode.key, episode.instruction, episode.length) == ("deep/clip.mp4", "wipe the table", 9)
    assert made.index_of(episode.frames("video", [5])[0]) == 5

    folder = made.pictures(tmp_path / "f/processed/episode_000003/images", 1, 12)
    np.save(folder.parent / "actions.npy", made.actions(0, 12))
    (folder.parent / "task_description.txt").write_text("open the drawer")
    with pytest.raises(DataError, match="set rate_hz"):
        read(tmp_path / "f")
    episode = read(tmp_path / "f", rate_hz=5).episode(0)
    assert (episode.instruction, episode.length, episode.actions.shape) == ("open the drawer", 12, (12, 7))
    # 10.png comes after 9.png
    assert [made.index_of(f) for f in episode.frames("video", [2, 10])] == [2, 10]


@pytest.mark.parametrize("content", [b"", b"not a video at all"])
def test_a_video_without_frames(tmp_path, content):
    made.video(tmp_path / "a.mp4", 0, 5, codec="libx264")
    (tmp_path / "b.mp4").write_bytes(content)
    reader = read(tmp_path)
    assert reader.episode(0).length == 5
    with pytest.raises(DataError, match=r"b\.mp4"):
        reader.episode(1)


def test_actions_that_are_not_numbers(tmp_path):
    root = made.libero(tmp_path / "libero")
    with h5py.File(next(root.glob("*.hdf5")), "r+") as file:
        file["data/demo_0/actions"][4, 2] = np.nan
    reader = read(root)
    with pytest.raises(DataError, match=r"demo_0: action of frame 4 is not finite \(1 frames\)"):
        reader.episode(0)
    assert reader.episode(1).length == 10


def _array(path, content):
    made.pictures(path / "e/images", 0, 3)
    if isinstance(content, bytes):
        (path / "e/actions.npy").write_bytes(content)
    else:
        np.save(path / "e/actions.npy", content)


def _text(path):
    made.pictures(path / "e", 0, 3)
    (path / "e/instruction.txt").write_bytes(b"\xff\xfe wipe")


def _sizes(path):
    made.pictures(path / "e", 0, 3)
    cv2.imwrite(str(path / "e/9.png"), made.picture(0, 0, 16, 20))


def _libero(path, name, rows):
    with h5py.File(next(made.libero(path / "l").glob("*.hdf5")), "r+") as file:
        stored = file[f"data/demo_0/{name}"][:rows]
        del file[f"data/demo_0/{name}"]
        file[f"data/demo_0/{name}"] = stored


def _description(path):
    (made.bridge(path / "b", 1) / "dataset_info.json").write_text('{"name": "bri')


@pytest.mark.parametrize(
    ("make", "what", "options"),
    [
        (lambda p: _array(p, b""), r"actions\.npy: not a NumPy array", {}),
        (lambda p: _array(p, b"\x93NUMPY half"), r"actions\.npy: not a NumPy array", {}),
        (lambda p: _array(p, np.zeros(3)), r"action is float64 \[3\], needs numbers \[frames, dim", {}),
        (lambda p: _array(p, np.zeros((3, 2), str)), r"action is <U1 \[3, 2\], needs numbers", {}),
        (lambda p: _array(p, np.zeros((2, 7))), "2 actions, 3 frames", {}),
        (_text, r"instruction\.txt: not UTF-8 text, save it as that", {}),
        (_sizes, r"e: its frames differ in size: \[\(16, 20\), \(32, 40\)\]", {}),
        (lambda p: _libero(p, "obs/agentview_rgb", 6), "demo_0: 10 actions, 6 frames of agentview", {}),
        (lambda p: _libero(p, "obs/gripper_states", 6), "demo_0: all the input array dimensions", {}),
        (lambda p: _libero(p, "obs/joint_states", 6), "10 actions, 6 frames of state",
         {"state_key": "obs/joint_states"}),
        (_description, r"dataset_info\.json: not a TFDS description", {"rate_hz": None}),
        (lambda p: made.bridge(p / "b", 1), "language_instruction is not numbers",
         {"action_key": "language_instruction"}),
    ],
)  # fmt: skip
def test_damage_is_a_data_error_of_one_line(tmp_path, make, what, options):
    make(tmp_path)
    with pytest.raises(DataError, match=what) as caught:
        episode = read(tmp_path, **({"rate_hz": 5} | options)).episode(0)
        episode.frames(episode.views[0], range(episode.length))
    assert "\n" not in str(caught.value)


def test_kinds_are_told_from_the_files(tmp_path):
    assert kind_of(made.bridge(tmp_path / "a")) == "rlds"
    assert kind_of(made.libero(tmp_path / "b")) == "libero"
    assert kind_of(made.something(tmp_path / "c", ["x"])) == "ssv2"
    assert kind_of(made.lerobot(tmp_path / "d", 1, 3)) == "lerobot"
    assert kind_of(made.video(tmp_path / "e/x.mp4", 0, 3, codec="libx264").parent) == "folder"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"LeRobot.*RLDS.*LIBERO"):
        kind_of(tmp_path / "empty")
