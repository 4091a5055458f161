"""The simulator's own record of the arms: every simulated millisecond, in arrays made beforehand."""

import os
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np


class Recorder:
    """Holds up to `capacity` samples of A arms.

    The file (`save`) holds t [n] s; q, dq [n, A, 7] rad, rad/s; tau [n, A, 7] Nm as applied, gravity
    included; tau_cmd [n, A, 7] Nm as commanded, without gravity; mode [n, A] (franka RobotMode: 1 idle, 2
    move, 4 reflex, 5 user-stopped); torque_control [n, A]: whether a client commanded torques; arms [A]
    names; truncated: whether the capacity ran out.
    """

    def __init__(self, capacity: int, arms: tuple[str, ...]):
        shape = (capacity, len(arms), 7)
        self.arms, self.count, self.truncated = arms, 0, False
        self.t = np.zeros(capacity)
        self.q, self.dq = np.zeros(shape), np.zeros(shape)
        self.tau, self.tau_cmd = np.zeros(shape), np.zeros(shape)
        self.mode = np.zeros(shape[:2], np.int8)
        self.torque_control = np.zeros(shape[:2], bool)

    def add(self, t: float, q, dq, tau, tau_cmd, mode, torque_control) -> None:
        """One sample; shapes without the leading n."""
        n = self.count
        if n == len(self.t):
            self.truncated = True
            return
        self.t[n] = t
        self.q[n], self.dq[n], self.tau[n], self.tau_cmd[n] = q, dq, tau, tau_cmd
        self.mode[n], self.torque_control[n] = mode, torque_control
        self.count = n + 1

    def arrays(self) -> dict[str, np.ndarray]:
        n = self.count
        return {
            "t": self.t[:n],
            "q": self.q[:n],
            "dq": self.dq[:n],
            "tau": self.tau[:n],
            "tau_cmd": self.tau_cmd[:n],
            "mode": self.mode[:n],
            "torque_control": self.torque_control[:n],
            "arms": np.array(self.arms),
            "truncated": np.array(self.truncated),
        }

    def save(self, path: str) -> Future:
        """Write the npz in a thread of its own. The future gives {"path", "samples", "truncated"}."""
        target = Path(path if path.endswith(".npz") else f"{path}.npz")
        future = Future()

        def write():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_suffix(".npz.part")
                with open(part, "wb") as file:
                    np.savez(file, **self.arrays())
                os.replace(part, target)
                future.set_result({"path": str(target), "samples": self.count, "truncated": self.truncated})
            except OSError as error:
                future.set_exception(error)

        threading.Thread(target=write, name="record", daemon=False).start()
        return future
