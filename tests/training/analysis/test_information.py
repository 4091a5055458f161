"""Estimates of mutual information against Gaussians, whose true value is -d/2 log2(1 - r^2) bits."""

import numpy as np
import pytest
import torch

from training.analysis.arrays import AnalysisError
from training.analysis.information import Network, barber_agakov, ksg, mine, split_episodes

QUICK = Network(width=64, steps=300, batch=256)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussians(n: int, dimensions: int, r: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dimensions))
    y = r * x + np.sqrt(1 - r * r) * rng.standard_normal((n, dimensions))
    return x, y, -dimensions / 2 * np.log2(1 - r * r)


@pytest.mark.parametrize(("dimensions", "r"), [(1, 0.6), (1, 0.9), (2, 0.8)])
def test_ksg_finds_the_information_of_gaussians_within_five_per_cent(dimensions, r):
    x, y, bits = gaussians(4000, dimensions, r)
    found = ksg(x, y)
    assert found.bits == pytest.approx(bits, rel=0.05)
    assert abs(found.shuffled_bits) < 0.06


def test_ksg_counts_codes_whose_every_value_repeats():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 4, (2000, 1))
    actions = codes + 0.01 * rng.standard_normal((2000, 1))
    assert ksg(codes, actions).bits == pytest.approx(2.0, rel=0.05)


def test_projecting_many_dimensions_only_loses_information():
    x, y, bits = gaussians(2000, 1, 0.9)
    wide = np.hstack([x, np.random.default_rng(1).standard_normal((2000, 15))])
    assert 0 < ksg(wide, y).bits < 0.5 * bits


@pytest.mark.parametrize("mixed", [False, True])
def test_barber_agakov_stays_below_the_truth_and_near_it(mixed):
    x, y, bits = gaussians(6000, 2, 0.8)
    if mixed:  # correlated action dimensions hold the same information, not twice
        y = y @ np.array([[1.0, 0.9], [0.9, 1.0]])
    found = barber_agakov(x, y, np.arange(6000) // 20, QUICK)
    assert 0.85 * bits < found.bits < 1.03 * bits  # 3 %: 1200 test samples
    assert found.shuffled_bits < 0


def test_mine_is_not_above_the_truth_by_more_than_noise():
    x, y, bits = gaussians(6000, 2, 0.8)
    found = mine(x, y, np.arange(6000) // 20, QUICK)
    assert 0.8 * bits < found.bits < 1.1 * bits
    assert found.shuffled_bits < 0


def test_independent_variables_share_nothing():
    rng = np.random.default_rng(0)
    x, y, episodes = rng.standard_normal((2000, 4)), rng.standard_normal((2000, 3)), np.arange(2000) // 20
    for found in (ksg(x, y), barber_agakov(x, y, episodes, QUICK), mine(x, y, episodes, QUICK)):
        assert found.bits < 0.08


def test_a_latent_constant_in_training_does_not_blow_up_on_the_rest():
    x, y, bits = gaussians(600, 1, 0.9)
    episodes = np.arange(600) // 20
    rare = np.zeros(600)
    rare[split_episodes(episodes, 600).test[:3]] = 1
    found = barber_agakov(np.column_stack([x, rare]), y, episodes, QUICK)
    assert 0.5 * bits < found.bits < 1.3 * bits


def test_episodes_are_never_split():
    episodes = np.repeat(np.arange(7), 5)
    split = split_episodes(episodes, 35)
    parts = [set(episodes[p]) for p in (split.train, split.validation, split.test)]
    assert all(parts) and set.union(*parts) == set(range(7))
    assert sum(map(len, parts)) == 7


def test_the_estimators_leave_torchs_generator_alone():
    x, y, _ = gaussians(200, 1, 0.5)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    mine(x, y, np.arange(200) // 10, Network(width=8, steps=5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("estimator", ["ksg", "barber_agakov", "mine"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, y: (x, y * 0 + 0.3), "actions are constant"),
        (lambda x, y: (x * 0, y), "latent actions are constant"),
        (
            lambda x, y: (x, np.where(np.arange(100)[:, None] == 7, np.nan, y)),
            "NaN or infinity, the first is 7",
        ),
        (lambda x, y: (x[:10], y[:10]), "10 samples, at least 30"),
        (lambda x, y: (x[:50], y), "50 latent actions, 100 actions"),
    ],
)
def test_what_cannot_be_estimated_is_said(estimator, change, says):
    x, y = change(*gaussians(100, 2, 0.5)[:2])
    run = {
        "ksg": ksg,
        "barber_agakov": lambda x, y: barber_agakov(x, y, np.arange(len(x)) // 10, QUICK),
        "mine": lambda x, y: mine(x, y, np.arange(len(x)) // 10, QUICK),
    }[estimator]
    with pytest.raises(AnalysisError, match=says):
        run(x, y)


def test_too_few_episodes_are_said():
    x, y, _ = gaussians(100, 1, 0.5)
    with pytest.raises(AnalysisError, match="2 episodes: at least 3"):
        mine(x, y, np.arange(100) // 50, QUICK)
