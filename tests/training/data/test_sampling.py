"""Sample n is a function of (seed, n): whoever asks, whenever, on however many ranks."""

from collections import Counter

import numpy as np
import pytest
import torch

from config.dataset import Augmentation, DatasetConfig, Mixture
from tests.training.data import made
from training.data import index, sampling
from training.data.augment import draw, prepare
from training.data.episode import DataError
from training.data.loader import Loader
from training.data.sampling import BLOCK, Samples, held_out, permuted, quotas
from training.data.windows import Chunks, Clips, Cut, history


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {
        "bridge": made.bridge(root / "bridge", 6),
        "lerobot": made.lerobot(root / "lerobot", 4, 20),
        "ssv2": made.something(root / "ssv2", ["a", "b"]),
    }


def mixture(paths, *names, **options) -> Mixture:
    extra = {k: options.pop(k) for k in list(options) if k in ("validation_share", "on_error")}
    return Mixture(datasets=tuple(DatasetConfig(path=str(paths[n]), **options) for n in names), **extra)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_permutations_hit_everything_once(size):
    for key in (0, 12345678901234567890):
        assert sorted(permuted(k, size, key) for k in range(size)) == list(range(size))
    if size > 100:
        moved = np.array([permuted(k, size, 3) for k in range(size)])
        assert abs(np.corrcoef(moved, np.arange(size))[0, 1]) < 0.15
        assert (moved != [permuted(k, size, 4) for k in range(size)]).mean() > 0.9


def test_weights_are_proportions(paths):
    samples = Samples(
        Mixture(
            datasets=(
                DatasetConfig(path=str(paths["bridge"]), weight=3),
                DatasetConfig(path=str(paths["lerobot"]), weight=1),
            )
        ),
        Chunks(4, 32),
        seed=5,
        subset="all",
    )
    counts = Counter(samples.place(n)[0] for n in range(2 * BLOCK))
    assert counts == {0: 2 * BLOCK * 3 // 4, 1: 2 * BLOCK // 4}
    first = Counter(samples.place(n)[0] for n in range(400))
    assert 0.65 < first[0] / 400 < 0.85  # and not one after the other
    with pytest.raises(DataError, match="raise it"):
        quotas([1.0, 1e-6])


def test_an_epoch_sees_every_frame_once_in_a_new_order(paths):
    samples = Samples(mixture(paths, "bridge"), Chunks(4, 32), 0, subset="all")
    size = samples.sizes[0]
    assert size == 60
    epochs = [[samples.place(n)[1:] for n in range(e * size, (e + 1) * size)] for e in range(2)]
    assert set(epochs[0]) == set(epochs[1]) == {(e, t) for e in range(6) for t in range(10)}
    assert epochs[0] != epochs[1]


def test_samples_do_not_depend_on_what_came_before(paths):
    make = lambda seed: Samples(mixture(paths, "lerobot", "bridge"), Clips(4, 32), seed, Augmentation())  # noqa: E731
    one, two = make(1), make(1)
    forward = [one[n] for n in range(6)]
    backward = [two[n] for n in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    assert not all(same(a, b) for a, b in zip(forward, [make(2)[n] for n in range(6)], strict=True))


def test_resuming_and_ranks_keep_the_global_order(paths):
    samples = Samples(mixture(paths, "bridge", "lerobot"), Chunks(5, 32), 0, Augmentation())
    whole = list(Loader(samples, 4, steps=4))
    resumed = list(Loader(samples, 4, start_step=2, steps=2, workers=2))
    for a, b in zip(whole[2:], resumed, strict=True):
        assert a["key"] == b["key"]
        assert all(torch.equal(a[k], b[k]) for k in ("frames", "actions", "mask", "n", "frame"))
    ranks = [list(Loader(samples, 4, steps=4, rank=r, ranks=2)) for r in range(2)]
    for step, batch in enumerate(whole):
        joined = torch.cat([ranks[r][step]["frames"] for r in range(2)])
        assert torch.equal(joined, batch["frames"])
        assert batch["n"].tolist() == list(range(4 * step, 4 * step + 4))
    with pytest.raises(DataError, match="does not divide"):
        Loader(samples, 5, ranks=2)


def test_validation_holds_out_whole_episodes(paths):
    data = mixture(paths, "bridge", validation_share=0.34)
    parts = {}
    for subset in ("train", "validation", "all"):
        samples = Samples(data, Chunks(2, 32), 0, subset=subset)
        parts[subset] = {samples.place(n)[1] for n in range(samples.sizes[0])}
    assert parts["train"] & parts["validation"] == set()
    assert parts["train"] | parts["validation"] == parts["all"] == set(range(6))
    assert len(parts["validation"]) == 2
    keys = [f"e{k}" for k in range(100)]
    assert held_out(keys, 0.2).sum() == 20
    assert held_out(keys[:2], 0.01).sum() == 1


def test_clips_are_the_frames_they_say(paths):
    reader = Samples(mixture(paths, "bridge"), Clips(4, 32), 0, subset="all").readers[0]
    for at, frames, valid in ((1, [1, 3, 5, 7], [1, 1, 1, 1]), (5, [5, 7, 9, 9], [1, 1, 1, 0])):
        clip = Clips(4, 32).read(reader.episode(3), Cut(at, 2, ("image_0",), np.random.default_rng(0)))
        assert [made.index_of(f) for f in clip["frames"]] == frames
        assert clip["valid"].tolist() == [bool(v) for v in valid]


def test_chunks_are_the_actions_of_their_frame(paths):
    samples = Samples(mixture(paths, "lerobot"), Chunks(14, 32, history_seconds=2 / 15), 0, subset="all")
    sample = samples.read(0, 2, 10)
    assert [made.index_of(f) for f in sample["frames"]] == [8, 10]
    np.testing.assert_allclose(sample["actions"][:10, 0], 2 + np.arange(10, 20) / 100, atol=1e-6)
    np.testing.assert_allclose(sample["actions"][10:, 0], 2.19, atol=1e-6)  # the last command stands
    assert sample["mask"].tolist() == [True] * 10 + [False] * 4
    np.testing.assert_allclose(sample["state"], 2)
    assert [made.index_of(f) for f in samples.read(0, 2, 1)["frames"]] == [0, 1]  # no earlier frame
    assert history(np.array([0.0, 0.1, 0.2, 0.55]), 3, 0.4) == 2


def test_clips_of_two_views_are_synchronised(paths):
    samples = Samples(mixture(paths, "bridge", "ssv2"), Clips(4, 32, views=2), 0, subset="all")
    both = [samples[n] for n in range(12)]
    assert {bool(s["paired"]) for s in both} == {True, False}
    for sample in both:
        one, other = sample["frames"]
        if sample["paired"]:  # the second view is the first one mirrored
            error = np.abs(one.astype(int) - other[:, :, ::-1]).mean()
            assert error < 6
        else:
            np.testing.assert_array_equal(one, other)


def test_one_change_for_all_frames_of_a_sample():
    rng = np.random.default_rng(0)
    still = np.repeat(rng.integers(0, 255, (1, 60, 80, 3), np.uint8), 5, axis=0)
    strong = Augmentation(crop_area=(0.5, 0.9), crop_ratio=(0.8, 1.25), hue=30)
    changes = [draw(strong, np.random.default_rng(k)) for k in range(4)]
    pictures = [prepare(still, 48, change) for change in changes]
    for frames in pictures:
        assert all(np.array_equal(frame, frames[0]) for frame in frames)
    assert len({frames[0].tobytes() for frames in pictures}) == 4
    assert all(
        min(c.crop[2:]) < 1 and c.crop[0] + c.crop[2] <= 1 and c.crop[1] + c.crop[3] <= 1 for c in changes
    )
    quiet = Augmentation(crop_area=(1, 1), brightness=0, contrast=0, hue=0, saturation=0, value=0)
    error = np.abs(prepare(still, 48, draw(quiet, rng)).astype(int) - prepare(still, 48))
    assert error.max() <= 4  # there and back through HSV


def test_corrupt_files_are_counted_and_replaced(paths, tmp_path):
    root = made.something(tmp_path / "s", ["a", "b", "c", "d"])
    videos = root / "20bn-something-something-v2"
    (videos / "101.webm").write_bytes((videos / "101.webm").read_bytes()[:300])
    made.video(videos / "102.webm", 2, 1)  # a single frame
    samples = Samples(Mixture(datasets=(DatasetConfig(path=str(root)),)), Clips(3, 32), 0, subset="all")
    loader = Loader(samples, 4, steps=4, workers=1)
    batches = list(loader)
    assert [b["frames"].shape[0] for b in batches] == [4] * 4
    assert {k for b in batches for k in b["key"]} == {"0/100", "0/103"}
    assert {key for key, _ in loader.errors} == {"0/101", "0/102"}
    assert sum(loader.errors.values()) >= 8  # each came once an epoch
    assert any("has 1 frames, needs 2" in message for _, message in loader.errors)
    again = Loader(samples, 4, steps=4)
    assert [b["key"] for b in again] == [b["key"] for b in batches]  # replacements too are functions of n
    strict = Mixture(datasets=(DatasetConfig(path=str(root)),), on_error="raise")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"\A[^\n]*(101|1 frames)[^\n]*\Z"):
            list(Loader(Samples(strict, Clips(3, 32), 0, subset="all"), 4, steps=2, workers=workers))


def test_nothing_readable_ends_the_run(tmp_path):
    root = made.something(tmp_path / "s", ["a"])
    (root / "20bn-something-something-v2/100.webm").write_bytes(b"")
    samples = Samples(Mixture(datasets=(DatasetConfig(path=str(root)),)), Clips(3, 32), 0)
    with pytest.raises(DataError, match="in a row are unreadable"):
        samples[0]
    with pytest.raises(DataError, match="no episode"):
        Samples(Mixture(datasets=(DatasetConfig(path=str(root)),)), Chunks(3, 32), 0)


def test_lengths_are_counted_once(paths, tmp_path, monkeypatch):
    reader = Samples(mixture(paths, "ssv2"), Clips(3, 32), 0).readers[0]
    counts, errors = index.lengths(reader, tmp_path / "c")
    assert (counts.tolist(), errors) == ([14, 14], [])
    monkeypatch.setattr(type(reader), "length", lambda *_: pytest.fail("counted again"))
    assert index.lengths(reader, tmp_path / "c")[0].tolist() == [14, 14]


def test_uninstructed_episodes_on_request(tmp_path):
    root = made.something(tmp_path / "s", ["", "say"])
    kept = Samples(Mixture(datasets=(DatasetConfig(path=str(root), instructed_only=True),)), Clips(2, 32), 0)
    assert {kept[n]["instruction"] for n in range(6)} == {"say"}


def test_different_robots_do_not_batch(paths, tmp_path):
    three = {**paths, "three": made.lerobot(tmp_path / "three", 1, 5, ("x", "y", "z"))}
    samples = Samples(mixture(three, "lerobot", "three"), Chunks(3, 32), 0, subset="all")
    with pytest.raises(DataError, match="actions differ in shape"):
        list(Loader(samples, 8, steps=2))


def test_blocks_are_cached_not_needed():
    sampling._block.cache_clear()
    one = sampling._block(3, 7, (3000, 1096))
    sampling._block.cache_clear()
    two = sampling._block(3, 7, (3000, 1096))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
