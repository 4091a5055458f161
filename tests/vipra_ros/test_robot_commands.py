"""Commands are checked, put together and refused before anything of them reaches the reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vipra_ros.execution.chunk import Chunk, Rejected
from vipra_ros.robot.commands import Assembler, Lease, Tag, check_part, joint_names

TAG = Tag("abcd", 3, 7)
TIMES = [i / 22 for i in range(14)]
ROWS = [[0.1 * j for j in range(7)] + [1.0] for _ in range(14)]


def part(arm="left", **change):
    given = {
        "gripper": True,
        "tag": TAG,
        "names": joint_names(arm),
        "stamp": 5.0,
        "times": TIMES,
        "rows": ROWS,
    }
    return check_part(arm, **{**given, **change})


def test_a_tag_survives_the_wire():
    assert Tag.parse(str(TAG)) == TAG


@given(st.text(max_size=40))
def test_no_text_breaks_the_tag_parser(text):
    try:
        assert Tag.parse(text).lease
    except Rejected as error:
        assert error.code == "tag"


def test_two_matching_parts_are_one_chunk():
    assembler = Assembler(("left", "right"))
    assert assembler.feed("left", part("left")) is None
    chunk = assembler.feed("right", part("right", rows=[[1.0] * 7 + [0.0]] * 14))
    assert isinstance(chunk, Chunk)
    assert chunk.joints.shape == (14, 14) and chunk.grippers.shape == (14, 2)
    assert chunk.seq == 7 and chunk.t0 == 5.0 and chunk.rate_hz == pytest.approx(22.0)
    assert (chunk.joints[:, 7:] == 1.0).all() and (chunk.grippers == [1.0, 0.0]).all()


def test_times_in_whole_nanoseconds_are_evenly_spaced_enough():
    rounded = [round(t * 1e9) * 1e-9 for t in TIMES]
    assert len(part(times=rounded).times) == 14


@pytest.mark.parametrize(
    "change, code",
    [
        ({"names": joint_names("right")}, "names"),
        ({"names": joint_names("left")[:7]}, "names"),
        ({"rows": [row[:7] for row in ROWS]}, "shape"),
        ({"rows": ROWS * 5, "times": TIMES * 5}, "shape"),
        ({"rows": ROWS[:1], "times": TIMES[:1]}, "shape"),
        ({"rows": [[np.nan] * 8] * 14}, "non_finite"),
        ({"rows": [[np.inf] * 8] * 14}, "non_finite"),
        ({"times": [*TIMES[:-1], 9.0]}, "times"),
        ({"times": [t + 0.1 for t in TIMES]}, "times"),
        ({"times": [0.0] * 14}, "times"),
        ({"times": TIMES[::-1]}, "times"),
        ({"times": [*TIMES[:-1], float("nan")]}, "times"),
    ],
)
def test_a_wrong_part_is_refused_with_its_code(change, code):
    with pytest.raises(Rejected) as caught:
        part(**change)
    assert caught.value.code == code


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.floats(allow_nan=True), max_size=9), max_size=6), st.lists(st.floats(), max_size=6)
)
def test_any_rows_are_either_a_part_of_finite_numbers_or_refused(rows, times):
    try:
        made = part(rows=rows, times=times)
    except Rejected:
        return
    assert np.isfinite(made.joints).all() and len(made.times) == len(made.joints) == len(rows)


@pytest.mark.parametrize(
    "change", [{"stamp": 5.001}, {"times": [2 * t for t in TIMES]}, {"rows": ROWS[:9], "times": TIMES[:9]}]
)
def test_parts_that_differ_in_stamp_rate_or_length_do_not_match(change):
    assembler = Assembler(("left", "right"))
    assembler.feed("left", part("left"))
    with pytest.raises(Rejected) as caught:
        assembler.feed("right", part("right", **change))
    assert caught.value.code == "mismatch"


def test_a_part_that_is_overtaken_incomplete_is_reported_and_the_new_one_goes_on():
    assembler = Assembler(("left", "right"))
    assembler.feed("left", part("left"))
    newer = Tag("abcd", 3, 8)
    with pytest.raises(Rejected) as caught:
        assembler.feed("left", part("left", tag=newer))
    assert caught.value.code == "incomplete"
    assert assembler.feed("right", part("right", tag=newer)).seq == 8


def test_a_topic_that_runs_ahead_does_not_lose_the_newest_command():
    """DDS keeps order within a topic, not between the arms' topics."""
    assembler = Assembler(("left", "right"))
    newer = Tag("abcd", 3, 8)
    assembler.feed("left", part("left"))
    with pytest.raises(Rejected):
        assembler.feed("left", part("left", tag=newer))
    assert assembler.feed("right", part("right")) is None
    assert assembler.feed("right", part("right", tag=newer)).seq == 8


def test_no_points_from_both_arms_is_a_let_go():
    assembler = Assembler(("left", "right"))
    assert assembler.feed("left", part("left", names=(), times=[], rows=[])) is None
    assert assembler.feed("right", part("right", names=(), times=[], rows=[])) == TAG


def test_one_holder_at_a_time_and_the_lease_ends_with_silence():
    lease = Lease(timeout_s=5.0)
    holder, epoch = lease.acquire(100.0).split(":")
    assert epoch == "0"
    with pytest.raises(Rejected) as caught:
        lease.acquire(104.9)
    assert caught.value.code == "lease"
    lease.feed(0, 104.9)
    with pytest.raises(Rejected):
        lease.acquire(109.8)
    assert lease.acquire(110.0).split(":")[0] != holder


def test_only_the_holders_next_command_of_this_epoch_passes():
    lease = Lease(timeout_s=5.0)
    holder = lease.acquire(0.0).split(":")[0]
    lease.check(Tag(holder, 0, 4), 0.0)
    lease.feed(4, 0.0)
    for tag, code in [
        (Tag(holder, 0, 4), "stale"),
        (Tag(holder, 1, 5), "epoch"),
        (Tag("someone", 0, 5), "lease"),
        (Tag("", 0, 5), "lease"),
    ]:
        with pytest.raises(Rejected) as caught:
            lease.check(tag, 0.0)
        assert caught.value.code == code
    lease.next_epoch()
    with pytest.raises(Rejected) as caught:
        lease.check(Tag(holder, 0, 5), 0.0)
    assert caught.value.code == "epoch"
    with pytest.raises(Rejected) as caught:
        lease.check(Tag("", 1, 5), 0.0)
    assert caught.value.code == "lease"
