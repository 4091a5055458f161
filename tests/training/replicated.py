"""A latent action model small enough for a few steps, trained as stage 1 trains: replicated, not sharded."""

import dataclasses
import signal
from pathlib import Path

import torch

from config.training import LatentRecipe
from models.latent_action.config import SIZES
from models.latent_action.model import LatentActionModel
from training import distributed
from training.latent import Terms
from training.latent_stage import LatentStage
from training.loop import train
from training.run import Run

STEPS = 4
SMALL = dataclasses.replace(
    SIZES["laq_tiny"],
    name="small",
    width=32,
    vit_layers=1,
    vit_heads=2,
    heads=2,
    head_dim=16,
    encoder_layers=1,
    decoder_layers=1,
)
RECIPE = LatentRecipe(
    stage="latent",
    model="small",
    steps=STEPS,
    global_batch=2,
    micro_batch=1,
    clip_frames=4,
    optimizer={"learning_rate": 1e-3, "clip": 4.0},
    objective={"refresh": [[100, 2]], "refresh_threshold": 0.1},
    log_every=1,
    checkpoint_every=100,
    validation={"every": 100, "samples": 1},
)


class Clips:
    """Clip n is a function of n."""

    broken = ()

    def __getitem__(self, n: int) -> dict:
        generator = torch.Generator().manual_seed(n)
        frames = torch.randint(256, (4, 64, 64, 3), generator=generator, dtype=torch.uint8)
        return {"frames": frames.numpy(), "n": n, "errors": []}


def run(folder: Path, ranks: distributed.Ranks, stop_at: int = 0) -> dict:
    """Train to the last step, or to a SIGTERM; returns the parameters."""
    torch.manual_seed(0)
    stage = LatentStage(RECIPE, LatentActionModel(SMALL), Terms())
    stage.held = Clips()
    after_step = stage.after_step

    def stopping(step: int, ranks: distributed.Ranks) -> dict[str, float]:
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return after_step(step, ranks)

    stage.after_step = stopping
    log = Run(folder, RECIPE, ranks.rank, ranks.size)
    try:
        train(stage, RECIPE, log, ranks, Clips())
        return distributed.full_weights(stage.module)
    finally:
        log.close()
