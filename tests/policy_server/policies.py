"""Small policies with known behaviour, served by the real server in tests.

`python -m tests.policy_server.policies ADDRESS DELAY_S [KEYS]` serves one in a process of its own.
"""

import sys
import threading

import numpy as np

from benchmarks.standin import StandIn
from config.embodiment import Embodiment
from config.loading import load
from policy_server.scheduler import DeviceFailed, Request, Result
from policy_server.server import serve, set_up_logging

SIZE = (32, 48)


def embodiment(name: str = "franka_single") -> Embodiment:
    return load(Embodiment, name)


def frames(value: int = 0) -> np.ndarray:
    return np.full((2, *SIZE, 3), value, np.uint8)


class Refusal(RuntimeError):
    code = "bad_task"


class Echo(StandIn):
    """Answers after `delay_s` with actions that tell the request apart: all equal to its seed.

    The task chooses misbehaviour: `explode` raises, `refuse` raises with a code, `nan` and `short` return
    wrong actions, `lost` loses the device.
    """

    def __init__(self, delay_s: float = 0.0, max_batch: int = 4, robot="franka_single", **metadata):
        super().__init__(robot, delay_s, SIZE, max_batch, model="echo", **metadata)
        self.batches: list[list[Request]] = []
        self.prefetched: list[tuple[str, np.ndarray]] = []

    def infer(self, requests: list[Request]) -> list[Result]:
        self.batches.append(requests)
        tasks = {request.task for request in requests}
        if "explode" in tasks:
            raise RuntimeError("secret path /root/weights")
        if "refuse" in tasks:
            raise Refusal("the prompt is 99 tokens")
        results = super().infer(requests)
        if "lost" in tasks:  # half-way
            raise DeviceFailed("CUDA error: an illegal memory access was encountered")
        return results

    def prefetch(self, task: str, image: np.ndarray) -> None:
        super().prefetch(task, image)
        self.prefetched.append((task, image))
        if task == "lost":
            raise DeviceFailed("CUDA error: unspecified launch failure")

    def actions(self, request: Request) -> np.ndarray:
        actions = super().actions(request) + np.float32(request.seed)
        if request.task == "nan":
            actions[3, 1] = np.nan
        return actions[:-1] if request.task == "short" else actions


class Gate(Echo):
    """Runs until the test releases `opened`."""

    def __init__(self, **options):
        super().__init__(**options)
        self.entered, self.opened = threading.Semaphore(0), threading.Semaphore(0)

    def infer(self, requests):
        self.entered.release()
        assert self.opened.acquire(timeout=20)
        return super().infer(requests)


if __name__ == "__main__":
    address, delay_s, keys = sys.argv[1], float(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
    set_up_logging()
    sys.exit(serve(Echo(delay_s), address, keys))
