"""How the arms of a trial moved. Positions are those measured, [T, J] rad, one every 1 / rate_hz seconds."""

import numpy as np

from config.safety import GripperLimits

LEAST = 8  # samples; fewer tell nothing
CUTOFF_HZ, THRESHOLD, PADDING = 10.0, 0.05, 4  # of the spectral arc length, as its authors chose


def measure(
    positions: np.ndarray, openings: np.ndarray, rate_hz: float, hand: GripperLimits
) -> dict[str, float | None]:
    """The fields of a `Result` that this file knows. openings: commanded, as of `retries`."""
    return {
        "jerk_rms": jerk_rms(positions, rate_hz),
        "spectral_arc_length": spectral_arc_length(positions, rate_hz),
        "retries": retries(openings, hand),
    }


def retries(openings: np.ndarray, hand: GripperLimits) -> int | None:
    """How often hands were told to close again, of commanded openings [T, hands]; None without any."""
    if not openings.size:
        return None
    count = 0
    for opening in openings.T:
        clear = opening[(opening < hand.close_below) | (opening > hand.open_above)]
        closings = int(np.count_nonzero(np.diff((clear < hand.close_below).astype(int)) == 1))
        count += max(closings - 1, 0)
    return count


def jerk_rms(positions: np.ndarray, rate_hz: float) -> float | None:
    """Root mean square third derivative over all joints, rad/s^3; None when there is too little."""
    if len(positions) < LEAST:
        return None
    return float(np.sqrt(np.square(np.diff(positions, 3, axis=0)).mean()) * rate_hz**3)


def spectral_arc_length(positions: np.ndarray, rate_hz: float) -> float | None:
    """SPARC of the joint speed (Balasubramanian et al. 2015): about -1.4 for one smooth reach, lower the less
    smooth. None when there is too little, or nothing moves.
    """
    if len(positions) < LEAST + 1:
        return None
    speed = np.linalg.norm(np.diff(positions, axis=0), axis=1) * rate_hz
    if speed.max() < 1e-6:
        return None
    size = 2 ** (int(np.ceil(np.log2(len(speed)))) + PADDING)
    frequency = np.fft.rfftfreq(size, 1 / rate_hz)
    amplitude = np.abs(np.fft.rfft(speed, size))
    amplitude /= amplitude.max()
    frequency, amplitude = frequency[frequency <= CUTOFF_HZ], amplitude[frequency <= CUTOFF_HZ]
    strong = np.flatnonzero(amplitude >= THRESHOLD)
    kept = slice(strong[0], strong[-1] + 1)
    frequency, amplitude = frequency[kept], amplitude[kept]
    if len(frequency) < 2:
        return None
    across = np.diff(frequency) / (frequency[-1] - frequency[0])
    return -float(np.hypot(across, np.diff(amplitude)).sum())
