"""How well two arms follow a chunk stream, on the simulator's own 1 kHz record.

    python -m benchmarks.motion [--seconds 20] [--json FILE]

Real franky and libfranka, the real executor and safety gate, the simulated workcell with its watchdog and
reflexes; no ROS and no policy. Chunks of 14 actions at 22 Hz, replanned after 7, along a smooth 0.5 rad
motion, every second chunk off by 0.02 rad. Simulated arms, not real ones.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from config.loading import load
from config.robot import Robot, safety_of
from config.safety import Safety
from config.workcell import Workcell
from simulation.check import extremes, violations
from simulation.control import SimulationControl
from vipra_ros.clock import SimulatedClock
from vipra_ros.execution.chunk import Chunk
from vipra_ros.process import Child, reserve_slot, wait_for
from vipra_ros.robot.commands import Tag
from vipra_ros.robot.executor import ArmsExecutor
from vipra_ros.robot.franka import FrankaArm
from vipra_ros.safety.limits import JointLimits

RATE_HZ, HORIZON, REPLAN, STEP_RAD = 22.0, 14, 7, 0.02
LIMITS = {  # what the motion must reach
    "tracking_rms_rad": ("<=", 0.01),
    "lag_ms": ("<=", 30.0),
    "measured_acceleration_rad_s2": ("<=", 10.0),
    "reference_jerk_share_of_limit": ("<=", 0.5),
    "torque_step_nm_per_ms": ("<=", 1.0),
    "limit_violations": ("<=", 0),
    "starved_ticks": ("<=", 0),
    "real_time_factor": (">=", 0.8),
}


def path(t: np.ndarray, q0: np.ndarray) -> np.ndarray:
    """Joint positions [n, 14] at `t` [n] s: joints 1 and 4 of both arms swing 0.5 and 0.2 rad at 0.25 Hz."""
    wave = 0.25 * (1 - np.cos(2 * np.pi * 0.25 * np.maximum(t, 0.0)))
    q = np.tile(q0, (len(t), 1))
    q[:, [0, 7]] -= wave[:, None]
    q[:, [3, 10]] += 0.4 * wave[:, None]
    return q


def stream(executor: ArmsExecutor, clock: SimulatedClock, q0: np.ndarray, seconds: float) -> float:
    """Send chunks for `seconds` of simulated time; returns the executor time of the first action."""
    lease, epoch = executor.acquire_lease().split(":")
    start = clock.now() + 0.1
    for k in range(int(seconds * RATE_HZ / REPLAN)):
        t = (REPLAN * k + np.arange(HORIZON)) / RATE_HZ
        joints = path(t, q0)
        joints[:, [0, 7]] += STEP_RAD * (k % 2)
        chunk = Chunk(k, start + t[0], RATE_HZ, joints, np.ones((HORIZON, 2)))
        executor.submit(Tag(lease, int(epoch), k), chunk)
        clock.sleep_until(start + REPLAN * (k + 1) / RATE_HZ - 0.1)
    executor.submit(Tag(lease, int(epoch), k + 1), None)
    return start


def measure(record: dict, log: dict, start: float, q0: np.ndarray, safety: Safety, seconds: float) -> dict:
    """Quality of the motion between 1 s after the start and 1 s before the end."""
    inside = (record["t"] > start + 1.0) & (record["t"] < start + seconds - 1.0)
    t, q = record["t"][inside] - start, record["q"][inside].reshape(-1, 14)
    ticks = (log["t"] > start + 1.0) & (log["t"] < start + seconds - 1.0)
    reference = np.stack([np.interp(t, log["t"][ticks] - start, r) for r in log["q_ref"][ticks].T], -1)

    def rms(lag: float) -> float:
        return float(np.sqrt(np.mean((q - path(t - lag, q0) - _steps(t - lag)) ** 2)))

    lags = np.arange(0.0, 0.1, 0.002)
    dt = np.diff(log["t"][ticks])
    jerk = np.diff(np.diff(log["dq_ref"][ticks], axis=0) / dt[:, None], axis=0) / dt[1:, None]
    limits = JointLimits.of(safety, 2)
    piece = {key: record[key][inside] for key in ("t", "q", "dq", "tau_cmd", "torque_control")}
    worst = extremes(piece)
    return {
        "tracking_rms_rad": rms(0.0),
        "tracking_of_reference_rms_rad": float(np.sqrt(np.mean((q - reference) ** 2))),
        "lag_ms": float(1000 * lags[np.argmin([rms(lag) for lag in lags])]),
        "measured_acceleration_rad_s2": worst["acceleration_rad_s2"],
        "reference_jerk_share_of_limit": float((np.abs(jerk) / limits.jerk).max()),
        "torque_step_nm_per_ms": worst["torque_step_nm"],
        "limit_violations": sum(
            sum(j.values()) for j in violations({**piece, "arms": record["arms"]}).values()
        ),
    }


def _steps(t: np.ndarray) -> np.ndarray:
    """What every second chunk is off by, on joint 1 of each arm [n, 14]."""
    steps = np.zeros((len(t), 14))
    steps[:, [0, 7]] = (STEP_RAD * (np.floor(t * RATE_HZ / REPLAN) % 2))[:, None]
    return steps


def run(seconds: float, folder: Path) -> dict:
    robot, slot = load(Robot, "sim_bimanual"), reserve_slot()
    safety, scene = safety_of(robot), load(Workcell, robot.workcell)
    hosts = {arm: slot.host(i + 1) for i, arm in enumerate(robot.arms)}
    name = f"{slot.name}_motion"
    argv = [sys.executable, "-m", "simulation.server", "--name", name, "--die-with-parent"]
    argv += ["--hostnames", ",".join(f"{arm}={host}" for arm, host in hosts.items())]
    simulator = Child("simulator", argv, folder / "simulator.log")
    executor = None
    try:
        wait_for(lambda: simulator.find("^ready"), 60, "simulator", [simulator], simulator)
        clock, control = SimulatedClock(name, 10.0), SimulationControl(name, 10.0)
        arms = {
            arm: FrankaArm(
                arm, config.model_copy(update={"hostname": hosts[arm]}), robot.control, safety, False
            )
            for arm, config in robot.arms.items()
        }
        for arm in arms.values():
            arm.connect()
        homes = {arm: np.array(config.home_rad) for arm, config in robot.arms.items()}
        executor = ArmsExecutor(arms, {}, homes, clock, robot.control, safety, scene)
        executor.start()
        clock.sleep_until(clock.now() + 0.5)
        q0 = np.concatenate([homes[arm] for arm in arms])
        control.record_start(seconds + 5.0)
        wall = time.monotonic()
        began = clock.now()
        start = stream(executor, clock, q0, seconds)
        factor = (clock.now() - began) / (time.monotonic() - wall)
        starved = executor.counters.starved_ticks
        file = control.record_stop(folder / "record")["path"]
        late, ticks = executor.counters.late_ticks, executor.counters.ticks
        faults = executor.faults
        executor.shutdown()
        executor.log.save(folder / "arms.npz", [], [])
        with np.load(file) as record, np.load(folder / "arms.npz") as log:
            result = measure(dict(record), dict(log), start, q0, safety, seconds)
        control.close()
        clock.close()
    finally:
        if executor is not None and executor.alive:
            executor.shutdown()
        simulator.stop(5.0)
    return {
        **result,
        "starved_ticks": starved,
        "late_ticks": late,
        "ticks": ticks,
        "faults": faults,
        "real_time_factor": factor,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of simulated motion")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    sys.setswitchinterval(0.0005)
    with tempfile.TemporaryDirectory() as folder:
        result = run(args.seconds, Path(folder))
    table = Table(
        "what", "measured", "must be", title=f"two simulated arms, {args.seconds:g} s at {RATE_HZ:g} Hz"
    )
    met = True
    for key, value in result.items():
        sense, limit = LIMITS.get(key, ("", ""))
        good = not sense or (value <= limit if sense == "<=" else value >= limit)
        met &= good
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(key, shown, f"{sense} {limit}" + ("" if good else "  MISSED"))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    sys.stdout.flush()
    os._exit(0 if met else 1)  # unloading franky below a thread that still waits in it crashes


if __name__ == "__main__":
    main()
