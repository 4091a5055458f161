import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.normalization import SCALE_FLOOR, NormalizationError, Normalizer, fit, unfitted

NAMES = ("j1", "j2", "gripper", "j3")
KINDS = ("joint", "joint", "gripper", "joint")


def demonstrations(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Chunks [n, 14, 4] that drift away from states [n, 4]; j3 never moves."""
    rng = np.random.default_rng(seed)
    states = rng.uniform(-2, 2, (n, 4))
    chunks = states[:, None] + np.cumsum(rng.normal(0.02, 0.01, (n, 14, 4)), 1)
    chunks[..., 2] = states[:, None, 2] = rng.random((n, 1)) > 0.5
    chunks[..., 3] = states[:, None, 3] = 0.7
    return chunks, states


finite = st.floats(-10, 10, width=32)


@settings(max_examples=60, deadline=None)
@given(
    chunks=arrays(np.float64, (6, 14, 4), elements=finite),
    states=arrays(np.float64, (6, 4), elements=finite),
    relative=st.booleans(),
    method=st.sampled_from(["mean_std", "quantile"]),
)
def test_demonstrated_actions_survive_the_round_trip(chunks, states, relative, method):
    chunks[..., 2] = np.abs(chunks[..., 2]) / 10
    normalizer = fit(chunks, NAMES, KINDS, states if relative else None, method)
    x = normalizer.normalize(chunks, states if relative else None)
    assert x.dtype == np.float32 and np.isfinite(x).all()
    back = normalizer.denormalize(x, states if relative else None)
    np.testing.assert_allclose(back, chunks, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(
    x=arrays(np.float32, (14, 4), elements=st.floats(-1e6, 1e6, width=32)),
    state=arrays(np.float64, (4,), elements=finite),
    relative=st.booleans(),
)
def test_nothing_leaves_beyond_the_demonstrated_range_and_margin(x, state, relative):
    chunks, states = demonstrations()
    normalizer = fit(chunks, NAMES, KINDS, states if relative else None)
    actions = normalizer.denormalize(x, state if relative else None)
    low, high = chunks.min((0, 1)), chunks.max((0, 1))
    margin = np.maximum(0.05 * (high - low), 0.02)
    joints = [0, 1, 3]
    assert (actions >= (low - margin)[None] - 1e-6)[:, joints].all()
    assert (actions <= (high + margin)[None] + 1e-6)[:, joints].all()
    assert actions[:, 2].min() >= 0 and actions[:, 2].max() <= 1


def test_statistics_are_of_the_demonstrations():
    chunks, _ = demonstrations()
    x = fit(chunks, NAMES, KINDS).normalize(chunks).reshape(-1, 4)
    np.testing.assert_allclose(x[:, :2].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x[:, :2].std(0), 1, atol=1e-5)
    x = fit(chunks, NAMES, KINDS, method="quantile").normalize(chunks).reshape(-1, 4)
    np.testing.assert_allclose(np.quantile(x[:, :2], [0.01, 0.99], axis=0), [[-1, -1], [1, 1]], atol=1e-4)


def test_grippers_are_found_by_kind_and_span_minus_one_to_one():
    chunks, states = demonstrations()
    for given_states in (None, states):
        x = fit(chunks, NAMES, KINDS, given_states).normalize(chunks, given_states)
        assert set(np.unique(x[..., 2])) == {-1.0, 1.0}


def test_relative_chunks_start_where_the_arm_is():
    chunks, states = demonstrations()
    normalizer = fit(chunks, NAMES, KINDS, states)
    still = -np.asarray(normalizer.centre) / normalizer.scale
    actions = normalizer.denormalize(np.tile(still, (14, 1)), states[0])
    np.testing.assert_allclose(actions[:, [0, 1, 3]], np.tile(states[0, [0, 1, 3]], (14, 1)), atol=1e-6)


def test_a_joint_that_never_moved_keeps_a_usable_scale():
    chunks, _ = demonstrations()
    normalizer = fit(chunks, NAMES, KINDS, ranges=5.0)
    assert normalizer.scale[3] == pytest.approx(5.0 * SCALE_FLOOR)
    low, high = normalizer.limits
    assert (low[3], high[3]) == pytest.approx((0.68, 0.72))


def test_json_is_the_normalizer():
    chunks, states = demonstrations()
    normalizer = fit(chunks, NAMES, KINDS, states, "quantile")
    assert Normalizer.from_json(normalizer.to_json()) == normalizer


@pytest.mark.parametrize(
    "change, message",
    [
        ({"names": ["j1", "j1", "g", "j3"]}, "distinct"),
        ({"kinds": ["joint"] * 3}, "kinds"),
        ({"kinds": ["joint", "joint", "hand", "joint"]}, "kinds"),
        ({"representation": "delta"}, "representation 'delta'"),
        ({"method": "minmax"}, "method 'minmax'"),
        ({"scale": [1, 1, 0, 1]}, "scale must be positive"),
        ({"scale": [1, 1, 1]}, "scale must hold 4"),
        ({"centre": [0, 0, float("nan"), 0]}, "centre must hold 4 finite"),
        ({"low": [9, 9, 9, 9]}, "exceeds high"),
        ({"margin": -1}, "margin"),
        ({"extra": 1}, "exactly"),
        ({"centre": "abcd"}, "wrong type"),
        ({"names": None}, "wrong type"),
    ],
)
def test_damaged_statistics_are_refused(change, message):
    data = json.loads(unfitted(NAMES, KINDS).to_json()) | change
    with pytest.raises(NormalizationError, match=message):
        Normalizer.from_json(json.dumps(data))


def test_wrong_shapes_and_missing_states_are_refused():
    normalizer = unfitted(NAMES, KINDS, "relative")
    good, state = np.zeros((14, 4)), np.zeros(4)
    with pytest.raises(NormalizationError, match="need the state"):
        normalizer.denormalize(good)
    with pytest.raises(NormalizationError, match=r"\[\.\.\., H, 4\]"):
        normalizer.denormalize(np.zeros((14, 3)), state)
    for bad in (np.zeros(3), np.full(4, np.nan), np.zeros((2, 4))):
        with pytest.raises(NormalizationError, match="state must be finite"):
            normalizer.denormalize(good, bad)
    with pytest.raises(NormalizationError, match="chunks must be finite"):
        fit(np.full((2, 14, 4), np.inf), NAMES, KINDS)
    with pytest.raises(NormalizationError, match="not JSON"):
        Normalizer.from_json("{")


def test_each_action_of_a_chunk_may_have_its_own_statistics():
    random = np.random.default_rng(0)
    states = random.normal(size=(200, 2))
    steps = np.arange(1, 5)[:, None] * random.normal(size=(200, 1, 2)) * 0.1
    chunks = np.stack([states[:, None, 0] + steps[..., 0], random.integers(2, size=(200, 4))], -1)
    normalizer = fit(chunks, ("a", "hand"), ("joint", "gripper"), states, each_action=True)
    x = normalizer.normalize(chunks, states)
    np.testing.assert_allclose(x[..., 0].std(0), 1, atol=1e-3)
    assert set(np.unique(x[..., 1])) == {-1, 1}
    np.testing.assert_allclose(normalizer.denormalize(x, states), chunks, atol=1e-5)
    again = Normalizer.from_json(normalizer.to_json())
    assert again == normalizer and again.horizon == 4 and again.scale[3][0] > 3 * again.scale[0][0]
    with pytest.raises(NormalizationError, match="4 actions, got 3"):
        normalizer.normalize(chunks[:, :3], states)
    for scale in ((again.scale[0],) * 3, again.scale[0], ((1.0,),) * 4, ((1.0, 1.0), (1.0,))):
        with pytest.raises(NormalizationError):
            dataclasses.replace(again, scale=scale)
