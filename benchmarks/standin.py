"""A policy that computes nothing, to serve where only the server, transport or robot side is meant."""

import time
from collections import deque

import numpy as np

from config.embodiment import Embodiment
from config.loading import load
from policy_server.protocol import Limits, Metadata
from policy_server.scheduler import Request, Result


class StandIn:
    """Answers after `delay_s` with actions of zero. Subclasses say otherwise in `actions`.

    It remembers the last prefetched frames with their tasks, and requests find them as they do in an engine.
    """

    def __init__(
        self,
        embodiment: str,
        delay_s: float = 0.0,
        image_size: tuple[int, int] = (256, 256),
        max_batch: int = 4,
        **metadata,
    ):
        """metadata: what is to differ in `Metadata`, e.g. needs_state."""
        body = load(Embodiment, embodiment)
        bound = np.full(body.action_dim, 7.0)
        fields = {
            "model": "standin",
            "parameters": 0,
            "checkpoint": "none",
            "image_size": image_size,
            "needs_state": False,
            "limits": Limits(action_low=tuple(-bound), action_high=tuple(bound)),
        }
        self.metadata = Metadata.describe(body, **fields | metadata)
        self.gripper = np.array([dimension.kind == "gripper" for dimension in body.dimensions])
        self.delay_s, self.max_batch = delay_s, max_batch
        self._ahead: deque[tuple[str, bytes]] = deque(maxlen=16)

    def warm_up(self) -> float:
        return self.delay_s * 1e3

    def infer(self, requests: list[Request]) -> list[Result]:
        if self.delay_s:
            time.sleep(self.delay_s)
        return [self._result(request) for request in requests]

    def prefetch(self, task: str, image: np.ndarray) -> None:
        self._ahead.append((task, image.tobytes()))

    def memory(self) -> dict[str, int]:
        return {}

    def actions(self, request: Request) -> np.ndarray:
        """float32 [H, D]"""
        return np.zeros((self.metadata.horizon, self.metadata.action_dim), np.float32)

    def _result(self, request: Request) -> Result:
        hit = bool(self._ahead) and (request.task, request.images[0].tobytes()) in self._ahead
        return Result(self.actions(request), {"encode": 1.0, "prefill": 2.0, "integrate": 3.0}, hit)
