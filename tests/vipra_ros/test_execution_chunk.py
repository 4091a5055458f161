"""Hands that change their mind within a chunk."""

import numpy as np
import pytest

from vipra_ros.execution.chunk import Chunk


def chunk(*openings: list[float]) -> Chunk:
    """One column of openings a hand."""
    hands = np.array(openings, float).T
    return Chunk(0, 10.0, 15.0, np.zeros((len(hands), 7)), hands)


@pytest.mark.parametrize(
    ("openings", "before", "sustained"),
    [
        (
            [0.9, 0.8, 0.1, 0.1, 0.0, 0.0],
            0.0,
            [0.0, 0.0, 0.1, 0.1, 0.0, 0.0],
        ),  # arriving? it has closed before
        ([0.9, 0.8, 0.1, 0.1, 0.0, 0.0], 1.0, [0.9, 0.8, 0.1, 0.1, 0.0, 0.0]),  # closes, for long enough
        ([0.9, 0.8, 0.1, 0.1, 0.0, 0.0], None, [0.9, 0.8, 0.1, 0.1, 0.0, 0.0]),  # the first chunk
        ([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], 1.0, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], 0.0, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),  # the next chunk will tell
        ([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], 0.0, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
        ([0.2, 0.3, 0.2, 0.3, 0.2, 0.3], 0.0, [0.2, 0.3, 0.2, 0.3, 0.2, 0.3]),
    ],
)
def test_a_hand_changes_for_at_least_so_many_actions_or_not_at_all(openings, before, sustained):
    one = chunk(openings).sustained(3, None if before is None else np.array([before]))
    assert one.grippers[:, 0].tolist() == sustained
    assert (one.seq, one.t0, one.rate_hz) == (0, 10.0, 15.0)


def test_each_hand_is_judged_alone_and_the_chunk_it_came_from_stays():
    given = chunk([1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0])
    found = given.sustained(2, np.array([1.0, 1.0]))
    assert found.grippers.T.tolist() == [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    assert given.grippers[1, 0] == 0.0
