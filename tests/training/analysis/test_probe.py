import numpy as np
import pytest

from training.analysis.arrays import AnalysisError
from training.analysis.probe import net_actions, probe_nmse

RNG = np.random.default_rng(0)
LATENTS = RNG.standard_normal((600, 12))
ACTIONS = LATENTS @ RNG.standard_normal((12, 3)) + 5
EPISODES = np.arange(600) // 20


def test_linear_data_are_read_exactly_and_shuffled_ones_not_at_all():
    nmse, shuffled = probe_nmse(LATENTS, ACTIONS, EPISODES)
    assert nmse < 1e-3
    assert shuffled == pytest.approx(1, abs=0.05)


def test_what_identifies_the_episode_does_not_help():
    # the latent names the episode and each episode has its own mean: in unseen ones that says nothing
    episodes = np.arange(600) // 20
    latents = np.eye(30)[episodes]
    actions = RNG.standard_normal(30)[episodes][:, None] + 0.1 * RNG.standard_normal((600, 1))
    nmse, _ = probe_nmse(latents, actions, episodes)
    assert nmse > 0.9


def test_half_of_the_variance_is_half_the_error():
    actions = LATENTS[:, :1] + RNG.standard_normal((600, 1))
    assert probe_nmse(LATENTS, actions, EPISODES)[0] == pytest.approx(0.5, abs=0.1)


def test_constant_dimensions_are_left_out():
    padded = np.hstack([ACTIONS, np.full((600, 2), 0.7)])
    assert probe_nmse(LATENTS, padded, EPISODES) == pytest.approx(probe_nmse(LATENTS, ACTIONS, EPISODES))


def test_latents_that_never_change_read_nothing():
    assert probe_nmse(LATENTS * 0, ACTIONS, EPISODES) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((LATENTS, ACTIONS * 0, EPISODES), "actions are constant"),
        ((LATENTS, ACTIONS * np.nan, EPISODES), "600 of 600 samples hold NaN"),
        ((LATENTS[:9], ACTIONS[:9], EPISODES[:9]), "9 samples, at least 20"),
        ((LATENTS, ACTIONS, EPISODES * 0), "one episode"),
        ((LATENTS, ACTIONS[:-1], EPISODES), "600 latent actions, 599 actions"),
    ],
)
def test_what_cannot_be_probed_is_said(arguments, says):
    with pytest.raises(AnalysisError, match=says):
        probe_nmse(*arguments)


def test_net_actions_are_what_happens_between_two_frames():
    actions = np.arange(12.0).reshape(6, 2) ** 2
    deltas = net_actions(actions, [0, 2], 2, "deltas", grippers=(1,))
    assert deltas.tolist() == [[0 + 4, 9], [16 + 36, 49]]  # summed; the gripper's last command
    absolute = net_actions(actions, [0, 2], 2, "absolute", grippers=(1,))
    assert absolute.tolist() == [[16 - 0, 25], [64 - 16, 81]]
    with pytest.raises(AnalysisError, match="gripper 2: the actions have dimensions 0 to 1"):
        net_actions(actions, [0], 1, "deltas", grippers=(2,))
