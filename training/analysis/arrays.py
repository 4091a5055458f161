"""Checks that every measurement shares: finite, enough, not constant."""

import numpy as np


class AnalysisError(ValueError):
    """The data or the options do not allow the measurement; the message names the value and the fix."""


def finite(values: np.ndarray, what: str) -> np.ndarray:
    """`values` as float64 [n, d] (a vector becomes [n, 1]). Raises AnalysisError for NaN and infinity."""
    values = np.asarray(values, float)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.shape[1] == 0:
        raise AnalysisError(f"{what} must be [samples, dimensions], got {list(values.shape)}")
    bad = ~np.isfinite(values).all(1)
    if bad.any():
        raise AnalysisError(
            f"{what}: {int(bad.sum())} of {len(values)} samples hold NaN or infinity, the first is "
            f"{int(bad.argmax())}: remove them"
        )
    return values


def varying(values: np.ndarray, what: str) -> np.ndarray:
    """Finite `values` [n, d] without dimensions that never change. Raises AnalysisError if none is left."""
    values = finite(values, what)
    spread = values.std(0)
    keep = spread > 1e-9 * np.maximum(np.abs(values).max(0), 1e-6)
    if not keep.any():
        raise AnalysisError(f"{what} are constant: nothing can be learned from or about them")
    return values[:, keep]


def paired(latents: np.ndarray, actions: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Both [n, d], finite, actions without constant dimensions. Raises AnalysisError where n < `least`."""
    x, y = finite(latents, "latent actions"), finite(actions, "actions")
    if len(x) != len(y):
        raise AnalysisError(f"{len(x)} latent actions, {len(y)} actions: they must be of the same steps")
    if len(x) < least:
        raise AnalysisError(f"{len(x)} samples, at least {least} are needed: use more episodes")
    return x, varying(y, "actions")


def standardised(values: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """Zero mean and unit deviation in each dimension, by the statistics of `like` (default: its own).

    A dimension that is constant in `like` is only shifted.
    """
    like = values if like is None else like
    spread = like.std(0)
    return (values - like.mean(0)) / np.where(spread > 1e-9, spread, 1.0)
