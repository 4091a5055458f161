import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models import bins
from models.bins import ActionBins, BinsError

NAMES, KINDS = ("a", "b", "grip"), ("joint", "joint", "gripper")


def fit(actions, count=15) -> ActionBins:
    return bins.fit(np.asarray(actions, float), NAMES, KINDS, count)


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 60), st.just(3)), elements=st.floats(-8, 8, width=32)),
    st.integers(1, 40),
)
def test_a_demonstrated_value_comes_back_within_its_bin(actions, count):
    fitted = fit(actions, count)
    ids = fitted.encode(actions)
    assert np.all(ids < fitted.counts) and np.all(ids >= 0)
    back = fitted.decode(ids).astype(float)
    assert np.array_equal(fitted.encode(back)[..., 2], ids[..., 2])
    for d in range(2):
        values, limits = actions[:, d].astype(float), np.asarray(fitted.boundaries[d])
        edges = np.concatenate([[values.min()], limits, [values.max()]])
        width = edges[ids[:, d] + 1] - edges[ids[:, d]]
        assert np.all(np.abs(back[:, d] - values) <= width + 1e-6)
        if len(np.unique(values)) <= count:
            np.testing.assert_array_equal(back[:, d], values)
    assert set(np.unique(back[:, 2])) <= {0.0, 1.0}
    assert ActionBins.from_json(fitted.to_json()) == fitted


def test_bins_hold_equal_shares_and_the_paper_counts_are_reached():
    actions = np.random.default_rng(0).normal(size=(20_000, 3))
    for count in (bins.PAPER_BINS, bins.OFFICIAL_BINS):
        fitted = fit(actions, count)
        assert fitted.counts == (count, count, 2) and fitted.vocab == count + 1
        shares = np.bincount(fitted.encode(actions)[:, 0], minlength=count)
        assert shares.min() >= 20_000 // count - 1 and shares.max() <= 20_000 // count + 2


def test_equal_quantiles_are_dropped_so_dimensions_differ():
    generator = np.random.default_rng(0)
    rest = np.where(generator.random(5000) < 0.6, 0.0, generator.normal(size=5000))
    fitted = fit(np.stack([rest, generator.normal(size=5000), rest > 0], -1), 100)
    assert fitted.counts[0] < 50 < fitted.counts[1] == 100


def test_a_joint_that_never_moved_has_one_bin_at_its_place():
    fitted = fit([[0.3, 1.0, 0.0], [0.3, 2.0, 1.0]])
    assert fitted.counts == (1, 2, 2)
    np.testing.assert_allclose(fitted.decode(fitted.encode([[9.0, 9.0, 0.4]])), [[0.3, 2.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("ids", [[[0, 2, 0]], [[0, 0, -1]], [[1, 0, 0]]])
def test_ids_a_dimension_does_not_have_are_refused(ids):
    fitted = fit([[0.3, 1.0, 0.0], [0.3, 2.0, 1.0]])
    with pytest.raises(BinsError, match=r"below the bin counts \(1, 2, 2\)"):
        fitted.decode(np.array(ids))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra": 1}, "exactly"),
        ({"names": ["a", "a", "grip"]}, "distinct"),
        ({"names": "abc"}, "a list for each"),
        ({"centres": [[0.3], [1.0], [0.0, 1.0]]}, "b: 1 centres need 0 boundaries"),
        ({"centres": [["0.3"], [1.0, 2.0], [0.0, 1.0]]}, "a: .* must be numbers"),
        ({"boundaries": [[], [float("nan")], [0.5]]}, "b: .* finite"),
        ({"boundaries": [[], [3.0], [0.5]]}, "b: boundaries must increase"),
        ({"boundaries": [[], []]}, "one list for each of 3"),
        ({"boundaries": [1, 2, 3]}, "wrong type"),
    ],
)
def test_damaged_bins_are_refused_by_name(change, message):
    data = json.loads(fit([[0.3, 1.0, 0.0], [0.3, 2.0, 1.0]]).to_json()) | change
    with pytest.raises(BinsError, match=message):
        ActionBins.from_json(json.dumps(data))


def test_what_cannot_be_binned_is_refused():
    for actions, message in (
        (np.zeros((4, 2)), r"must be \[\.\.\., 3\]"),
        (np.zeros((0, 3)), "not empty"),
        (np.full((2, 3), np.nan), "finite"),
    ):
        with pytest.raises(BinsError, match=message):
            fit(actions)
    with pytest.raises(BinsError, match="bins 0"):
        fit(np.zeros((2, 3)), 0)
    with pytest.raises(BinsError, match=r"actions must be finite"):
        fit(np.zeros((2, 3))).encode(np.zeros((2, 4)))
    with pytest.raises(BinsError, match="not JSON"):
        ActionBins.from_json("{")
