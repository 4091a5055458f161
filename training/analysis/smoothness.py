"""How smooth a sequence of actions is: jerk, spikes, largest step, spectral arc length (figures 6 and 8).

Actions are positions [T, D] in rad and opening (deltas are summed up first), one every 1 / rate_hz seconds.
"""

import numpy as np

from training.analysis.arrays import AnalysisError, finite

LEAST = 8  # actions
SPIKE = 6.0  # robust deviations
ACCELERATION = 10.0  # rad/s^2, what an FR3 allows every joint (Franka Robotics, FCI documentation)


def stitch(chunks: np.ndarray, execute: int, length: int | None = None) -> np.ndarray:
    """Chunks [n, H, D], one every `execute` actions -> what is executed of them [n * execute, D], cut to
    `length`.
    """
    if not 1 <= execute <= chunks.shape[1]:
        raise AnalysisError(f"execute {execute}: a chunk has {chunks.shape[1]} actions")
    return chunks[:, :execute].reshape(-1, chunks.shape[-1])[:length]


def jerk(positions: np.ndarray, rate_hz: float) -> np.ndarray:
    """Root mean square third derivative of positions [T, D] -> [D], rad/s^3."""
    return np.sqrt(np.square(np.diff(positions, 3, axis=0)).mean(0)) * rate_hz**3


def departures(positions: np.ndarray) -> np.ndarray:
    """How far each action lies from the middle of its neighbours, [T - 2, D]."""
    return positions[1:-1] - (positions[:-2] + positions[2:]) / 2


def spike_limit(references: list[np.ndarray], rate_hz: float) -> np.ndarray:
    """From what departure [D] on an action is a spike: SPIKE robust deviations of the references' own, and an
    acceleration of at least ACCELERATION.
    """
    every = np.concatenate([departures(positions) for positions in references])
    return np.maximum(SPIKE * 1.4826 * np.median(np.abs(every), axis=0), ACCELERATION / (2 * rate_hz**2))


def spikes(positions: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Which actions of [T, D] are spikes: bool [T - 2, D]."""
    return np.abs(departures(positions)) > limit


def spectral_arc_length(
    speed: np.ndarray, rate_hz: float, cutoff_hz: float = 10.0, threshold: float = 0.05, padding: int = 4
) -> float:
    """SPARC of a speed profile [T]: minus the length of its normalised amplitude spectrum's curve.

    Balasubramanian, Melendez-Calderon, Roby-Brami and Burdet 2015 with their constants: zero-padded by
    2^padding, up to the last frequency below `cutoff_hz` whose amplitude is at least `threshold` of the
    largest. About -1.4 for one minimum-jerk reach whatever its length and size, lower the less smooth.
    """
    speed = np.asarray(speed, float)
    if speed.ndim != 1 or len(speed) < LEAST or not np.isfinite(speed).all():
        raise AnalysisError(f"a speed profile needs {LEAST} finite values, got {list(speed.shape)}")
    if not speed.any():
        raise AnalysisError("the speed is zero throughout: nothing moves whose smoothness could be told")
    size = 2 ** (int(np.ceil(np.log2(len(speed)))) + padding)
    frequency = np.fft.rfftfreq(size, 1 / rate_hz)
    amplitude = np.abs(np.fft.rfft(speed, size))
    amplitude /= amplitude.max()
    below = frequency <= cutoff_hz
    frequency, amplitude = frequency[below], amplitude[below]
    strong = np.flatnonzero(amplitude >= threshold)
    kept = slice(strong[0], strong[-1] + 1)
    frequency, amplitude = frequency[kept], amplitude[kept]
    if len(frequency) < 2:
        raise AnalysisError("the speed has no spectrum below the cut-off: use a longer recording")
    across = np.diff(frequency) / (frequency[-1] - frequency[0])
    return -float(np.hypot(across, np.diff(amplitude)).sum())


def measure(
    episodes: list[np.ndarray], rate_hz: float, limit: np.ndarray, joints: np.ndarray | None = None
) -> dict:
    """Numbers of positions [T, D] of several episodes. joints: bool [D], what moves continuously (default:
    all); grippers are left out of speed, jerk and spectral arc length but not of spikes.
    """
    if not (np.isfinite(rate_hz) and rate_hz > 0):
        raise AnalysisError(f"rate {rate_hz} Hz must be positive: give --rate")
    checked = [finite(e, "actions") for e in episodes]
    if not checked:
        raise AnalysisError("no episode to measure")
    short = min(map(len, checked))
    if short < LEAST:
        raise AnalysisError(f"an episode has {short} actions, at least {LEAST} are needed")
    joints = np.ones(checked[0].shape[1], bool) if joints is None else joints
    steps = [np.diff(e, axis=0)[:, joints] * rate_hz for e in checked]
    speeds = [np.linalg.norm(step, axis=1) for step in steps]
    moving = [speed for speed in speeds if speed.max() > 1e-9]
    if not moving:
        raise AnalysisError("the actions are constant: nothing moves whose smoothness could be told")
    found = [spikes(e, limit) for e in checked]
    count = sum(map(len, checked))
    return {
        "episodes": len(checked),
        "actions": count,
        "jerk_rms": float(np.mean([jerk(e[:, joints], rate_hz).mean() for e in checked])),
        "jerk_rms_by_dimension": np.mean([jerk(e, rate_hz) for e in checked], 0).tolist(),
        "spikes_per_100_actions": 100 * float(sum(f.any(1).sum() for f in found)) / count,
        "spikes_by_dimension": sum(f.sum(0) for f in found).tolist(),
        "largest_step_per_s": float(max(np.abs(step).max() for step in steps)),
        "spectral_arc_length": float(np.mean([spectral_arc_length(s, rate_hz) for s in moving])),
    }
