"""The numbers of a run, from its logs."""

import importlib.metadata
import platform
from collections.abc import Mapping

import numpy as np

from vipra_ros.report.logs import ArmsLog
from vipra_ros.robot.counters import LATE_S

MOVED_RAD = 0.02  # below this the arms stood still
_PACKAGES = (
    *(
        "vipra_ros",
        "numpy",
        "torch",
        "ros-rclpy",
        "ros-fastdds",
        "franky-control",
        "franky-sim",
        "mujoco",
        "pin",
    ),
    *("coal", "pyzmq", "av"),
)


def summarise(
    log: ArmsLog,
    requests: list[dict],
    *,
    reference_rate_hz: float,
    interventions: Mapping[str, int],
    violations: int,
    real_time_factor: float,
    frames_per_second: float,
) -> dict:
    """The content of report.json. `log` is cut to the time in which the policy was in command.

    `interventions`: what the safety checks changed, by kind; `violations`: samples of the 1 kHz record beyond
    a joint position or velocity limit; real-time factor: simulated seconds a second; frames by capture stamp.
    """
    error = log.q_ref - log.q_meas
    latency = [r["latency_ms"] for r in requests if r.get("latency_ms") is not None]
    return {
        "control_ticks": len(log.t),
        "late_ticks": int((log.late > LATE_S).sum()) + skipped_ticks(log, reference_rate_hz),
        "starved_ticks": int(log.starved.sum()),
        "chunk_latency_ms": {
            f"p{p}": _round(np.percentile(latency, p)) if latency else None for p in (50, 95, 99)
        },
        "tracking_error_rad": {
            "rms": _round(np.sqrt((error**2).mean()), 5) if error.size else None,
            "max": _round(np.abs(error).max(), 5) if error.size else None,
        },
        "arm_skew_ms_p99": _round(1000 * np.percentile(log.skew, 99)) if log.skew.size else None,
        "interventions": dict(interventions),
        "faults": [{"t": round(t, 3), "reason": reason} for t, kind, reason in log.events if kind == "fault"],
        "limit_violations_1khz": violations,
        "real_time_factor": _round(real_time_factor),
        "frames_per_second": _round(frames_per_second),
        "versions": versions(),
    }


def failure(
    report: Mapping, log: ArmsLog, duration_s: float, reference_rate_hz: float, recovered: bool = False
) -> str | None:
    """Why a run of `duration_s` does not count as one that worked, in one line; None when it does.

    `recovered`: its faults were dealt with while it ran.
    """
    expected = duration_s * reference_rate_hz
    if report["faults"] and not recovered:
        return f"fault: {report['faults'][0]['reason']}"
    if report["control_ticks"] < 0.8 * expected:
        return f"only {report['control_ticks']} of {expected:.0f} control ticks"
    if len(log.chunk_seq) < 2:
        return f"only {len(log.chunk_seq)} chunks were executed"
    if np.ptp(log.q_meas, axis=0).max() < MOVED_RAD:
        return f"the arms stood still: no joint moved by {MOVED_RAD} rad"
    if report["limit_violations_1khz"]:
        return f"{report['limit_violations_1khz']} samples beyond a joint limit in the simulator's record"
    if not report["frames_per_second"]:
        return "no camera picture arrived"
    return None


def skipped_ticks(log: ArmsLog, rate_hz: float) -> int:
    """Deadlines of the reference loop that passed without a tick."""
    steps = np.rint(np.diff(log.t - log.late) * rate_hz).astype(int)
    return int(np.maximum(steps - 1, 0).sum())


def versions() -> dict[str, str]:
    """Python, kernel and the packages that matter, as installed."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _round(value, digits: int = 3) -> float:
    return round(float(value), digits)
