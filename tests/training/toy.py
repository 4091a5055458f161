"""A stage small enough to kill: a two-layer network with dropout that learns noisy sums.

python tests/training/toy.py RUN STEPS [KILL_AT]     (or under torchrun; with LATENT=RUN also `replicated`)
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from config.training import Optimizer, Recipe, Schedule, Validation
from training import distributed
from training.loop import Stage, train
from training.run import Run


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 1)

    def forward(self, batch, step):
        h = nn.functional.dropout(self.first(batch["x"]).tanh(), 0.2, self.training)
        noise = 0.1 * torch.randn(len(h), 1)
        return {"loss": (self.last(h) + noise - batch["x"].sum(-1, keepdim=True)).square().mean()}


class Samples:
    """Sample n is a function of n; one of eight is taken instead of a torn one."""

    broken = (("0/lost", "0/lost: no such file"),)

    def __getitem__(self, n: int) -> dict:
        x = torch.randn(6, generator=torch.Generator().manual_seed(n))
        return {"x": x.numpy(), "n": n, "errors": [("0/torn", "0/torn: cut off")] if n % 8 == 5 else []}


class Toy(Stage):
    def __init__(self, kill_at: int = 0, stop_at: int = 0):
        torch.manual_seed(3)
        self.module = Net()
        self.layers = [self.module.first]
        self.kill_at, self.stop_at = kill_at, stop_at

    def after_step(self, step, ranks):
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}


def recipe(steps: int, **changes) -> Recipe:
    fields = {
        "stage": "toy",
        "model": "toy",
        "steps": steps,
        "global_batch": 8,
        "micro_batch": 2,
        "optimizer": Optimizer(learning_rate=1e-2, weight_decay=0.01),
        "schedule": Schedule(kind="cosine", warmup=3),
        "ema": 0.9,
        "log_every": 1,
        "checkpoint_every": 5,
        "validation": Validation(every=1000),
    }
    return Recipe(**{**fields, **changes})


def run(folder: Path, steps: int, stage: Toy, **changes) -> tuple[bool, dict]:
    """Train and return (finished, whole weights on rank 0)."""
    with started() as ranks:
        return run_in(ranks, folder, recipe(steps, **changes), stage)


@contextmanager
def started() -> Iterator[distributed.Ranks]:
    try:
        yield distributed.start("cpu")
    finally:
        distributed.stop()


def run_in(ranks: distributed.Ranks, folder: Path, plan: Recipe, stage: Toy) -> tuple[bool, dict]:
    log = Run(folder, plan, ranks.rank, ranks.size)
    try:
        finished = train(stage, plan, log, ranks, Samples())
    finally:
        log.close()
    return finished, distributed.full_weights(stage.module)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, steps, *kill_at = sys.argv[1:]
    with started() as ranks:
        done = {place: run_in(ranks, Path(place), recipe(int(steps)), Toy(*map(int, kill_at)))[1]}
        if latent := os.environ.get("LATENT"):  # one start of two ranks for both
            from tests.training import replicated

            done[latent] = replicated.run(Path(latent), ranks)
    for folder, weights in done.items():
        if weights:
            torch.save(weights, Path(folder) / "weights.pt")
