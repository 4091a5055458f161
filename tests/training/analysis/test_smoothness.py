import numpy as np
import pytest

from training.analysis import smoothness
from training.analysis.arrays import AnalysisError
from training.analysis.smoothness import jerk, measure, spectral_arc_length, spike_limit, spikes, stitch


def reach(count: int = 120, dimensions: int = 2) -> np.ndarray:
    """A minimum-jerk reach of 1 rad."""
    t = np.linspace(0, 1, count)[:, None]
    return (10 * t**3 - 15 * t**4 + 6 * t**5) * np.ones(dimensions)


def speed_of(path: np.ndarray, rate_hz: float = 100.0) -> np.ndarray:
    return np.linalg.norm(np.diff(path, axis=0), axis=1) * rate_hz


def test_spectral_arc_length_is_the_authors_number():
    t = np.arange(-1, 1, 0.01)  # the example in the authors' own code: -1.41403
    assert spectral_arc_length(np.exp(-5 * t**2), 100.0) == pytest.approx(-1.41403, abs=1e-5)


def test_a_reach_is_as_smooth_at_any_size_and_duration():
    values = [spectral_arc_length(k * speed_of(reach(n)), 100.0) for k, n in ((1, 60), (9, 120), (1, 240))]
    assert np.ptp(values) < 0.05 and np.mean(values) == pytest.approx(-1.4, abs=0.1)


def test_submovements_and_noise_lower_the_spectral_arc_length():
    one = speed_of(reach(100))
    two = np.concatenate([one, np.zeros(60), one])
    rng = np.random.default_rng(0)
    noisy = speed_of(reach(100) + 0.01 * rng.standard_normal((100, 2)))
    assert spectral_arc_length(two, 100.0) < spectral_arc_length(one, 100.0) - 0.5
    assert spectral_arc_length(noisy, 100.0) < spectral_arc_length(one, 100.0) - 0.5


def test_jerk_of_a_cubic_is_its_third_derivative():
    t = np.arange(50)[:, None] / 15.0
    assert jerk(2 * t**3, 15.0) == pytest.approx([12.0], rel=1e-6)


def test_a_bin_flip_is_a_spike_and_the_reach_has_none():
    path = reach()
    limit = spike_limit([path], 15.0)
    flipped = path.copy()
    flipped[40, 1] += 0.05
    assert not spikes(path, limit).any()
    assert np.argwhere(spikes(flipped, limit)).tolist() == [[38, 1], [39, 1], [40, 1]]


def test_quantised_actions_measure_rougher_than_the_ones_they_come_from():
    smooth = reach()
    binned = np.round(smooth / 0.05) * 0.05
    a, b = (measure([path], 15.0, spike_limit([smooth], 15.0)) for path in (smooth, binned))
    assert b["jerk_rms"] > 100 * a["jerk_rms"]
    assert a["spikes_per_100_actions"] == 0 < b["spikes_per_100_actions"]
    assert b["spectral_arc_length"] < a["spectral_arc_length"] - 1
    assert a["actions"] == 120


def test_grippers_count_for_spikes_only():
    path = np.column_stack([reach(dimensions=1), (np.arange(120) > 60).astype(float)])
    limit, joints = spike_limit([path], 15.0), np.array([True, False])
    found = measure([path], 15.0, limit, joints)
    assert found["jerk_rms"] == pytest.approx(measure([path[:, :1]], 15.0, limit[:1])["jerk_rms"])
    assert found["spikes_by_dimension"][1] > 0


def test_chunks_are_stitched_from_what_is_executed():
    chunks = np.stack([np.arange(14.0) + 7 * k for k in range(4)])[..., None]
    assert stitch(chunks, 7, 25)[:, 0].tolist() == list(np.arange(25.0))
    assert len(stitch(chunks, 14)) == 56
    with pytest.raises(AnalysisError, match="execute 15: a chunk has 14"):
        stitch(chunks, 15)


@pytest.mark.parametrize(
    ("episodes", "says"),
    [
        ([np.full((20, 3), 0.4)], "actions are constant"),
        ([np.where(np.arange(20)[:, None] == 3, np.inf, reach(20))], "NaN or infinity, the first is 3"),
        ([reach(5)], "5 actions, at least 8"),
        ([], "no episode"),
    ],
)
def test_what_cannot_be_measured_is_said(episodes, says):
    with pytest.raises(AnalysisError, match=says):
        measure(episodes, 15.0, np.ones(3 if episodes and episodes[0].shape[1] == 3 else 2))
    with pytest.raises(AnalysisError, match="zero throughout"):
        smoothness.spectral_arc_length(np.zeros(50), 15.0)
