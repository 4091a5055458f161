"""Small policies with known behaviour, served by the real server in tests.

`python -m tests.policy_server.policies ADDRESS DELAY_S [KEYS]` serves one in a process of its own.
"""

import sys
import time

import numpy as np

from config.embodiment import Embodiment
from config.loading import load
from policy_server.protocol import Limits, Metadata
from policy_server.scheduler import Request, Result
from policy_server.server import serve, set_up_logging

SIZE = (32, 48)


def embodiment(name: str = "franka_single") -> Embodiment:
    return load(Embodiment, name)


def frames(value: int = 0) -> np.ndarray:
    return np.full((2, *SIZE, 3), value, np.uint8)


class Refusal(RuntimeError):
    code = "bad_task"


class Echo:
    """Answers after `delay_s` with actions that tell the request apart: all equal to its seed.

    The task chooses misbehaviour: `explode` raises, `refuse` raises with a code, `nan` and `short` return
    wrong actions.
    """

    def __init__(
        self, delay_s: float = 0.0, max_batch: int = 4, needs_state: bool = False, robot="franka_single"
    ):
        body = embodiment(robot)
        limits = Limits(action_low=(-3.0,) * body.action_dim, action_high=(3.0,) * body.action_dim)
        self.metadata = Metadata.describe(
            body,
            model="echo",
            parameters=0,
            checkpoint="none",
            image_size=SIZE,
            needs_state=needs_state,
            limits=limits,
        )
        self.delay_s, self.max_batch = delay_s, max_batch
        self.batches: list[list[Request]] = []
        self.prefetched: list[tuple[str, np.ndarray]] = []

    def warm_up(self) -> float:
        return self.delay_s * 1e3

    def infer(self, requests: list[Request]) -> list[Result]:
        self.batches.append(requests)
        time.sleep(self.delay_s)
        if any(request.task == "explode" for request in requests):
            raise RuntimeError("secret path /root/weights")
        if any(request.task == "refuse" for request in requests):
            raise Refusal("the prompt is 99 tokens")
        return [self._result(request) for request in requests]

    def prefetch(self, task: str, image: np.ndarray) -> None:
        self.prefetched.append((task, image))

    def _result(self, request: Request) -> Result:
        horizon, dim = self.metadata.horizon, self.metadata.action_dim
        actions = np.full((horizon, dim), request.seed, np.float32)
        if request.task == "nan":
            actions[3, 1] = np.nan
        if request.task == "short":
            actions = actions[:-1]
        return Result(actions, {"encode": 1.0, "prefill": 2.0, "integrate": 3.0})


if __name__ == "__main__":
    address, delay_s, keys = sys.argv[1], float(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
    set_up_logging()
    sys.exit(serve(Echo(delay_s), address, keys))
