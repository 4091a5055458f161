"""A small deterministic policy for two arms, served by the real policy server in a process of its own.

`python -m tests.vipra_ros.serve_moves ADDRESS [DELAY_S] [EMBODIMENT]`. It moves every joint by 0.002 rad an
action away from the measured state; the first action's gripper opening tells the mean grey level of o_{t-1},
the second one's that of o_t, 0..1. The task chooses misbehaviour: `nan`, `jump` (1.2 rad), `fast` (over the
velocity limit), `stray` (every fourth chunk 0.2 rad off).
"""

import sys
import time

import numpy as np

from config.embodiment import Embodiment
from config.loading import load
from policy_server.protocol import Limits, Metadata
from policy_server.scheduler import Request, Result
from policy_server.server import serve

SIZE = (48, 64)


class Moves:
    max_batch = 4

    def __init__(self, delay_s: float, robot: str):
        body = load(Embodiment, robot)
        limits = Limits(action_low=(-7.0,) * body.action_dim, action_high=(7.0,) * body.action_dim)
        self.metadata = Metadata.describe(
            body,
            model="moves",
            parameters=0,
            checkpoint="none",
            image_size=SIZE,
            needs_state=True,
            limits=limits,
        )
        self._delay_s = delay_s
        self._gripper = np.array([d.kind == "gripper" for d in body.dimensions])

    def warm_up(self) -> float:
        return 1e3 * self._delay_s

    def infer(self, requests: list[Request]) -> list[Result]:
        time.sleep(self._delay_s)
        return [Result(self._actions(request), {"encode": 1.0}) for request in requests]

    def prefetch(self, task: str, image: np.ndarray) -> None:
        pass

    def _actions(self, request: Request) -> np.ndarray:
        horizon = self.metadata.horizon
        step = 0.5 if request.task == "fast" else 0.002
        ramp = step * np.arange(horizon, dtype=np.float32)[:, None]
        stray = request.task == "stray" and request.seed % 4 == 3
        actions = request.state + ramp + (1.2 if request.task == "jump" else 0.2 if stray else 0.0)
        actions[:, self._gripper] = 1.02  # a policy may go a little beyond
        actions[:2, self._gripper] = request.images.mean(axis=(1, 2, 3))[:, None] / 255.0
        if request.task == "nan":
            actions[3, 1] = np.nan
        return actions


if __name__ == "__main__":
    address, delay_s, robot = (*sys.argv[1:], *("0.0", "franka_bimanual")[len(sys.argv) - 2 :])
    sys.exit(serve(lambda: Moves(float(delay_s), robot), address))
