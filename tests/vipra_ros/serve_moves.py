"""A small deterministic policy for two arms, served by the real policy server in a process of its own.

`python -m tests.vipra_ros.serve_moves ADDRESS [DELAY_S] [EMBODIMENT] [KEYS]`. It moves every joint by
0.002 rad an action away from the measured state; the first action's gripper opening tells the mean grey level
of o_{t-1}, the second one's that of o_t, 0..1. The task chooses misbehaviour: `nan`, `jump` (1.2 rad), `fast`
(over the velocity limit), `stray` (every fourth chunk 0.2 rad off).
"""

import sys

import numpy as np

from benchmarks.standin import StandIn
from policy_server.scheduler import Request
from policy_server.server import serve

SIZE = (48, 64)


class Moves(StandIn):
    def __init__(self, delay_s: float, robot: str):
        super().__init__(robot, delay_s, SIZE, model="moves", needs_state=True, supports_prefetch=True)
        self._answered = 0

    def actions(self, request: Request) -> np.ndarray:
        self._answered += 1
        stray = request.task == "stray" and self._answered % 4 == 0
        step = 0.5 if request.task == "fast" else 0.002
        ramp = step * np.arange(self.metadata.horizon, dtype=np.float32)[:, None]
        actions = request.state + ramp + (1.2 if request.task == "jump" else 0.2 if stray else 0.0)
        actions[:, self.gripper] = 1.02  # a policy may go a little beyond
        actions[:2, self.gripper] = request.images.mean(axis=(1, 2, 3))[:, None] / 255.0
        if request.task == "nan":
            actions[3, 1] = np.nan
        return actions


if __name__ == "__main__":
    given = sys.argv[1:]
    address, delay_s, robot, keys = given + ["", "0.0", "franka_bimanual", None][len(given) :]
    sys.exit(serve(lambda: Moves(float(delay_s), robot), address, keys))
