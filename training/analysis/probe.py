"""How much of the action a linear map reads from latent actions (MVP-LAM section 4.2, appendix B.2)."""

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold

from training.analysis.arrays import AnalysisError, paired, standardised

LEAST = 20  # samples
FOLDS = 5
COMPONENTS = 128
_ALPHAS = np.logspace(-4, 6, 11)


def net_actions(
    actions: np.ndarray, starts: np.ndarray, stride: int, kind: str, grippers: tuple[int, ...] = ()
) -> np.ndarray:
    """What an episode's actions [T, D] do between frames t and t + stride, for t in `starts` -> [n, D].

    deltas: the sum of a_t .. a_{t+stride-1} (MVP-LAM, equation 14). absolute: a_{t+stride} - a_t, the change
    of the commanded pose. `grippers`: dimensions of which the last command counts instead.
    """
    starts = np.asarray(starts)
    actions = np.asarray(actions, float)
    steps = starts[:, None] + np.arange(stride)
    if kind == "deltas":
        net = actions[steps].sum(1)
        last = steps[:, -1]
    elif kind == "absolute":
        last = starts + stride
        net = actions[last] - actions[starts]
    else:
        raise AnalysisError(f"actions {kind!r}: either absolute or deltas")
    if wrong := [g for g in grippers if not 0 <= g < actions.shape[1]]:
        raise AnalysisError(f"gripper {wrong[0]}: the actions have dimensions 0 to {actions.shape[1] - 1}")
    net[:, list(grippers)] = actions[last][:, list(grippers)]
    return net


def probe_nmse(
    latents: np.ndarray,
    actions: np.ndarray,
    episodes: np.ndarray,
    components: int = COMPONENTS,
    permutations: int = 3,
    seed: int = 0,
) -> tuple[float, float]:
    """(NMSE, NMSE with shuffled latent actions) of a ridge probe from latents [n, d] to actions [n, D].

    NMSE is the squared error on episodes the probe has not seen, over that of predicting the mean action of
    those it has: 0 is exact, 1 is nothing. Five folds, split by `episodes` [n]; actions z-scored, latents
    reduced to `components` by PCA on the folds that are trained on. (MVP-LAM trains its probe by Adam; ridge
    solves it.) Shuffled: the pairing permuted over all samples, mean over `permutations`. Actions that never
    change are left out; latents that never change read nothing. Raises AnalysisError for NaN, actions that
    are all constant, and too few samples or episodes.
    """
    x, y = paired(latents, actions, LEAST)
    groups = np.unique(np.asarray(episodes), return_inverse=True)[1]
    if len(groups) != len(x):
        raise AnalysisError(f"{len(groups)} episode numbers for {len(x)} samples")
    if groups.max() < 1:
        raise AnalysisError("all samples are of one episode: the probe needs others to be tested on")
    if not x.std(0).any():
        return 1.0, 1.0
    y, rng = standardised(y), np.random.default_rng(seed)
    shuffled = [y[rng.permutation(len(y))] for _ in range(permutations)]
    nmse = _nmse(x, np.stack([y, *shuffled]), groups, components)
    return float(nmse[0]), float(nmse[1:].mean())


def _nmse(x: np.ndarray, ys: np.ndarray, groups: np.ndarray, components: int) -> np.ndarray:
    """Of one probe for each of m targets: x [n, d], ys [m, n, D] -> [m]."""
    targets = np.hstack(ys)
    error, reference = np.zeros((2, targets.shape[1]))
    for train, test in GroupKFold(min(FOLDS, groups.max() + 1)).split(x, groups=groups):
        size = min(components, x.shape[1], len(train) - 1)
        reduce = PCA(size, svd_solver="covariance_eigh")
        inputs = reduce.fit_transform(x[train])
        scale = max(inputs.std(), 1e-12)
        ridge = RidgeCV(_ALPHAS, alpha_per_target=True).fit(inputs / scale, targets[train])
        predicted = ridge.predict(reduce.transform(x[test]) / scale)
        error += np.square(predicted - targets[test]).sum(0)
        reference += np.square(targets[train].mean(0) - targets[test]).sum(0)
    return error.reshape(len(ys), -1).sum(1) / np.maximum(reference.reshape(len(ys), -1).sum(1), 1e-12)
