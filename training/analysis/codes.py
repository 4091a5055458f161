"""Which codes a latent action model uses, at which position of a step, and for which direction (figure 4)."""

import numpy as np

from training.analysis.arrays import AnalysisError
from training.analysis.motion import STILL

DIRECTIONS = ("right", "left", "down", "up")
GROUPS = {  # the three panels of figure 4: first minus second
    "vertical - horizontal": (("up", "down"), ("left", "right")),
    "right - left": (("right",), ("left",)),
    "up - down": (("up",), ("down",)),
}
LEAST = 5  # steps of a group that are compared


def codes_used(codes: np.ndarray) -> int:
    """How many different codes occur in codes int [..., N]. Raises AnalysisError if there are none."""
    codes = np.asarray(codes)
    if codes.size == 0:
        raise AnalysisError("no latent actions: nothing was encoded")
    return len(np.unique(codes))


def usage(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """Codes int [n, N] -> share of each code at each position [N, K]; rows sum to 1."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.size == 0:
        raise AnalysisError(f"codes must be [steps, positions], got {list(codes.shape)}")
    if codes.min() < 0 or codes.max() >= codebook_size:
        raise AnalysisError(f"code {codes.max()}: the codebook has {codebook_size}, 0 to {codebook_size - 1}")
    return np.stack([np.bincount(column, minlength=codebook_size) for column in codes.T]) / len(codes)


def entropy_bits(share: np.ndarray) -> np.ndarray:
    """Entropy of shares [..., K] that sum to 1 -> bits [...]."""
    return -(share * np.log2(np.where(share > 0, share, 1.0))).sum(-1)


def directions(motion: np.ndarray, still: float = STILL) -> np.ndarray:
    """Motions [n, 2] (right, down) -> one of DIRECTIONS [n], by the larger part; "" where all but still."""
    axis = np.abs(motion).argmax(1)
    positive = motion[np.arange(len(motion)), axis] > 0
    name = np.where(axis == 0, np.where(positive, "right", "left"), np.where(positive, "down", "up"))
    return np.where(np.linalg.norm(motion, axis=1) < still, "", name)


def differences(
    codes: np.ndarray, codebook_size: int, names: np.ndarray, permutations: int = 200, seed: int = 0
) -> dict[str, dict]:
    """Figure 4: for each of GROUPS the usage [N, K] of its first set of directions minus the second's.

    names: direction of each step [n]. Each value has `counts` (first, second), `difference`, its root mean
    square `rms`, and `shuffled_rms`, the 95th percentile of the same with directions permuted: only an
    `rms` above it says that codes depend on direction. Groups with fewer than LEAST steps have counts only.
    """
    found, rng = {}, np.random.default_rng(seed)
    for title, (first, second) in GROUPS.items():
        masks = np.isin(names, first), np.isin(names, second)
        counts = [int(mask.sum()) for mask in masks]
        found[title] = {"counts": counts}
        if min(counts) < LEAST:
            continue
        rows = np.concatenate([codes[mask] for mask in masks])

        def gap(order: np.ndarray, rows=rows, split=counts[0]) -> np.ndarray:
            return usage(rows[order[:split]], codebook_size) - usage(rows[order[split:]], codebook_size)

        true = gap(np.arange(len(rows)))
        chance = [np.sqrt(np.square(gap(rng.permutation(len(rows)))).mean()) for _ in range(permutations)]
        found[title] |= {
            "difference": true.tolist(),
            "rms": float(np.sqrt(np.square(true).mean())),
            "shuffled_rms": float(np.quantile(chance, 0.95)),
        }
    return found


def summary(codes: np.ndarray, codebook_size: int) -> dict:
    """Numbers of codes int [n, N]: how many are used, their shares, and entropies in bits.

    `step_entropy_bits` is of the whole step's N codes as one symbol, at most log2(n) (MVP-LAM table 7).
    """
    shares = usage(codes, codebook_size)
    _, repeats = np.unique(codes, axis=0, return_counts=True)
    return {
        "steps": len(codes),
        "codebook_size": codebook_size,
        "codes_used": codes_used(codes),
        "share": shares.mean(0).tolist(),
        "usage_by_position": shares.tolist(),
        "entropy_bits": float(entropy_bits(shares.mean(0))),
        "position_entropy_bits": entropy_bits(shares).tolist(),
        "step_entropy_bits": float(entropy_bits(repeats / len(codes))),
        "step_entropy_limit_bits": float(np.log2(len(codes))),
    }
