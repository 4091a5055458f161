"""Mutual information of latent actions and actions, in bits, by three estimators (MVP-LAM appendix B.1).

Each has its own bias, so their numbers compare models within one estimator, not estimators. Every estimate
comes with the same number for shuffled pairs, which should be near zero or below.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch import Tensor, nn

from training.analysis.arrays import AnalysisError, paired, standardised, varying

LEAST = 30  # samples
PROJECTED = 8  # dimensions of the latents for KSG, which fails in many
NEIGHBOURS = 3


@dataclass(frozen=True)
class Estimate:
    bits: float
    shuffled_bits: float


@dataclass(frozen=True)
class Network:
    """Size and training of the neural estimators; smaller than MVP-LAM's (4 x 1024, 8000 steps of 1024)."""

    width: int = 128
    depth: int = 2
    steps: int = 1000
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    clip: float = 1.0


def ksg(
    latents: np.ndarray,
    actions: np.ndarray,
    neighbours: int = NEIGHBOURS,
    projected: int | None = PROJECTED,
    seed: int = 0,
) -> Estimate:
    """Kraskov, Stoegbauer and Grassberger 2004, their first estimator, on vectors [n, d] and [n, D].

    Both z-scored; latents of more than `projected` dimensions go through a random Gaussian matrix, which can
    only lose information. Equal values (codes, grippers) are told apart by noise of 1e-6 deviations.
    """
    x, y = _prepared(latents, actions, max(LEAST, neighbours + 2))
    rng = np.random.default_rng(seed)
    if projected is not None and x.shape[1] > projected:
        x = standardised(x @ rng.standard_normal((x.shape[1], projected)) / np.sqrt(x.shape[1]))
    x, y = (v + 1e-6 * rng.standard_normal(v.shape) for v in (x, y))
    return Estimate(_ksg(x, y, neighbours), _ksg(x[rng.permutation(len(x))], y, neighbours))


def _ksg(x: np.ndarray, y: np.ndarray, neighbours: int) -> float:
    joint = np.hstack([x, y])
    distance = cKDTree(joint).query(joint, [neighbours + 1], p=np.inf)[0][:, 0]
    inside = np.nextafter(distance, 0)  # strictly nearer than the k-th neighbour

    def count(values: np.ndarray) -> np.ndarray:
        """Other samples nearer than that in one of the spaces."""
        return cKDTree(values).query_ball_point(values, inside, p=np.inf, return_length=True) - 1

    nats = digamma(neighbours) + digamma(len(x)) - (digamma(count(x) + 1) + digamma(count(y) + 1)).mean()
    return float(nats / np.log(2))


def barber_agakov(
    latents: np.ndarray,
    actions: np.ndarray,
    episodes: np.ndarray,
    network: Network = Network(),
    seed: int = 0,
) -> Estimate:
    """E log q(a | z) - E log p(a), q a Gaussian around an MLP's answer with one learned deviation a dimension
    (Barber and Agakov 2003), p a Gaussian fitted to the training actions; both on held-out episodes.

    Actions are whitened first (MVP-LAM z-scores them): the information is the same, and dimensions that move
    together are not counted twice. A lower bound where the actions are Gaussian; elsewhere the Gaussian
    p(a) can lift it above the truth. Deviations are at least .05, or one exact binary gripper were infinite.
    """
    x, y = _prepared(latents, actions, LEAST)
    split = split_episodes(episodes, len(x), seed)
    x, y = standardised(x, x[split.train]), _whitened(y, split.train)
    z, a = (torch.from_numpy(v).float() for v in (x, y))
    with _seeded(seed):
        model = _mlp(z.shape[1], a.shape[1], network)
        log_deviation = nn.Parameter(torch.zeros(a.shape[1]))

        def gain(z: Tensor, a: Tensor) -> Tensor:
            """log q(a | z) - log p(a) of each sample, nats; p is N(0, I) of the whitened actions."""
            scale = log_deviation.clamp(min=np.log(0.05))
            error = (a - model(z)) * (-scale).exp()
            return (0.5 * a.square() - 0.5 * error.square() - scale).sum(-1)

        _fit([*model.parameters(), log_deviation], lambda z, a: -gain(z, a).mean(), z, a, split, network)
        return _score(lambda z, a: float(gain(z, a).mean()), z, a, split)


def mine(
    latents: np.ndarray,
    actions: np.ndarray,
    episodes: np.ndarray,
    network: Network = Network(),
    seed: int = 0,
    shuffles: int = 8,
) -> Estimate:
    """The Donsker-Varadhan bound E T(z, a) - log E exp T(z, a') with a critic T (Belghazi et al. 2018), a'
    the shuffled actions of the batch; on held-out episodes, the second term over `shuffles` of them.
    """
    x, y = _prepared(latents, actions, LEAST)
    split = split_episodes(episodes, len(x), seed)
    z, a = (torch.from_numpy(standardised(v, v[split.train])).float() for v in (x, y))
    with _seeded(seed):
        critic = _mlp(z.shape[1] + a.shape[1], 1, network)

        def bound(z: Tensor, a: Tensor, repeats: int = 1) -> Tensor:
            joint = critic(torch.cat([z, a], 1)).mean()
            orders = [torch.randperm(len(a)) for _ in range(repeats)]
            apart = torch.cat([critic(torch.cat([z, a[order]], 1)) for order in orders])
            return joint - apart.logsumexp(0)[0] + np.log(len(apart))

        _fit(list(critic.parameters()), lambda z, a: -bound(z, a), z, a, split, network)
        return _score(lambda z, a: float(bound(z, a, shuffles)), z, a, split)


# what the neural estimators share


@dataclass(frozen=True)
class Split:
    """Sample numbers; no episode is in two of them."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_episodes(episodes: np.ndarray, count: int, seed: int = 0) -> Split:
    """60 % of the episodes [n] to train on, 20 % to stop early, 20 % for the estimate."""
    names, groups = np.unique(np.asarray(episodes), return_inverse=True)
    if len(groups) != count:
        raise AnalysisError(f"{len(groups)} episode numbers for {count} samples")
    if len(names) < 3:
        raise AnalysisError(
            f"{len(names)} episodes: at least 3 are needed to train, stop and test on different ones"
        )
    place = np.random.default_rng(seed).permutation(len(names))[groups]
    fifth = max(len(names) // 5, 1)
    parts = place >= 2 * fifth, place < fifth, (place >= fifth) & (place < 2 * fifth)
    return Split(*(np.flatnonzero(part) for part in parts))


def _prepared(latents: np.ndarray, actions: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = paired(latents, actions, least)
    return standardised(varying(x, "latent actions")), standardised(y)


def _whitened(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Uncorrelated with unit variance over the samples `like`; directions with next to none are dropped."""
    mean, covariance = values[like].mean(0), np.atleast_2d(np.cov(values[like].T))
    variances, axes = np.linalg.eigh(covariance)
    keep = variances > 1e-6 * variances.max()
    return (values - mean) @ axes[:, keep] / np.sqrt(variances[keep])


class _seeded:
    """torch's generator at a seed inside, as it was after."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self):
        self.before = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *error):
        torch.set_rng_state(self.before)


def _mlp(inputs: int, outputs: int, network: Network) -> nn.Sequential:
    widths = [inputs] + [network.width] * network.depth
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def _fit(
    parameters: list[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    a: Tensor,
    split: Split,
    network: Network,
) -> None:
    """Minimise `loss` on the training samples; keep what was best on the validation samples."""
    optimizer = torch.optim.Adam(parameters, network.learning_rate, weight_decay=network.weight_decay)
    train, validation = torch.from_numpy(split.train), torch.from_numpy(split.validation)
    best, kept = np.inf, None
    for step in range(network.steps + 1):
        if step % 50 == 0 or step == network.steps:
            with torch.no_grad():
                value = float(loss(z[validation], a[validation]))
            if value < best:
                best, kept = value, copy.deepcopy([p.data for p in parameters])
        chosen = train[torch.randint(len(train), (min(network.batch, len(train)),))]
        optimizer.zero_grad()
        loss(z[chosen], a[chosen]).backward()
        nn.utils.clip_grad_norm_(parameters, network.clip)
        optimizer.step()
    if kept is None:
        raise AnalysisError("the estimator's loss is not finite from the start: check the actions' scale")
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data = value


@torch.no_grad()
def _score(nats: Callable[[Tensor, Tensor], float], z: Tensor, a: Tensor, split: Split) -> Estimate:
    z, a = z[split.test], a[split.test]
    shuffled = z[torch.randperm(len(z))]
    return Estimate(float(nats(z, a) / np.log(2)), float(nats(shuffled, a) / np.log(2)))
