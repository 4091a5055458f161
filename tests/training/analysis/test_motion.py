"""Which way pictures move, which codes go with it, and whether transferred latents move them."""

import numpy as np
import pytest

from tests.training.analysis.scenes import SIDE, STEP, WAYS, Mover, moving_square
from training.analysis import codes, motion, transfer
from training.analysis.arrays import AnalysisError
from training.analysis.transitions import windows


@pytest.mark.parametrize("way", WAYS)
def test_a_moving_square_moves_its_way(way):
    found = motion.clip_motion(moving_square(way, 0))
    assert found == pytest.approx(np.tile(WAYS[way], (4, 1)) * STEP / SIDE, abs=0.3 * STEP / SIDE)
    assert codes.directions(found).tolist() == [way] * 4


def test_a_still_picture_has_no_direction():
    clip = moving_square("up", 0)
    still = np.stack([clip[0], clip[0]])
    assert not motion.clip_motion(still).any()
    assert codes.directions(motion.clip_motion(still)).tolist() == [""]


def test_codes_are_counted_by_position():
    rows = np.array([[0, 2], [0, 3], [1, 3], [0, 3]])
    assert codes.codes_used(rows) == 4
    assert codes.usage(rows, 4).tolist() == [[0.75, 0.25, 0, 0], [0, 0, 0.25, 0.75]]
    found = codes.summary(rows, 8)
    assert (found["codes_used"], found["codebook_size"]) == (4, 8)
    assert found["step_entropy_bits"] == pytest.approx(1.5)
    assert codes.summary(np.tile(np.arange(8), (3, 1)), 8)["entropy_bits"] == pytest.approx(3)
    with pytest.raises(AnalysisError, match="code 3: the codebook has 3"):
        codes.usage(rows, 3)
    with pytest.raises(AnalysisError, match="no latent actions"):
        codes.codes_used(np.zeros((0, 16)))


def test_only_codes_that_depend_on_direction_differ_more_than_chance():
    rng = np.random.default_rng(0)
    names = rng.choice(["up", "down", "left", "right", ""], 400)
    rows = rng.integers(0, 8, (400, 16))
    rows[:, 5] = np.where(names == "up", 2, np.where(names == "down", 6, rows[:, 5]))
    found = codes.differences(rows, 8, names)
    up_down = found["up - down"]
    assert up_down["rms"] > 2 * up_down["shuffled_rms"]
    gap = np.array(up_down["difference"])
    assert np.unravel_index(gap.argmax(), gap.shape) == (5, 2) and gap[5, 2] == 1
    assert np.unravel_index(gap.argmin(), gap.shape) == (5, 6)
    assert found["right - left"]["rms"] < 1.3 * found["right - left"]["shuffled_rms"]
    few = codes.differences(rows[:30], 8, np.array(["up"] * 28 + ["down"] * 2))
    assert few["up - down"] == {"counts": [28, 2]}


def squares() -> transfer.Clips:
    ways = list(WAYS) * 2
    frames = np.stack([moving_square(way, seed) for seed, way in enumerate(ways)])
    moved = np.stack([motion.clip_motion(clip).sum(0) for clip in frames])
    return transfer.Clips(frames, moved, ways)


def test_transfer_pairs_clips_that_move_against_each_other():
    clips = squares()
    partners = transfer.most_opposed(clips.motion)
    opposite = {"right": "left", "left": "right", "up": "down", "down": "up"}
    assert [clips.names[i] for i in partners] == [opposite[name] for name in clips.names]
    assert sorted(partners) == list(range(8))


def test_latents_that_carry_motion_transfer_and_a_deaf_decoder_does_not():
    clips = squares()
    numbers, rolled, targets = transfer.transfer(Mover(), clips)
    assert numbers["transferred"]["mean_cosine"] > 0.95 and numbers["transferred"]["same_way"] == 1
    assert numbers["target"]["mean_cosine"] < -0.95
    assert abs(numbers["other_source"]["mean_cosine"]) < 0.3
    assert np.array_equal(rolled[:, 0], clips.frames[targets, 0])
    deaf = transfer.transfer(Mover(deaf=True), clips)[0]
    assert abs(deaf["transferred"]["mean_cosine"] - deaf["other_source"]["mean_cosine"]) < 0.2


def test_windows_cover_every_step_once_or_more():
    for length, frames in ((2, 8), (8, 8), (9, 8), (10, 8), (15, 8), (16, 8), (5, 2)):
        parts = windows(length, frames)
        assert {t for part in parts for t in part[:-1]} == set(range(length - 1))
        assert {len(part) for part in parts} == {min(length, frames)}
