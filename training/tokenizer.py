"""Stage 0: a small VQGAN frame tokenizer, trained on the frames that the policy will see.

L1 reconstruction plus the quantisation losses, with unused codes restarted at seen latents. The L1 term
weighs each pixel by how much it varies over the dataset: the arms are a small part of a picture that
otherwise stands still. No perceptual term: it needs a pretrained network, and a random one would mean
nothing.
"""

import numpy as np
import torch
from rich.progress import track

from models.config import VQGANConfig
from models.vqgan import VQGAN


def train(
    frames: np.ndarray,
    config: VQGANConfig,
    steps: int,
    batch: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> tuple[VQGAN, dict]:
    """Fit a VQGAN to uint8 RGB `frames` [N, h, w, 3]. Returns it and {l1, codes_used}, measured on 512
    frames.

    L1 is in units of the 0..255 picture.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = VQGAN(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    spread = torch.from_numpy(frames[rng.integers(len(frames), size=512)].std(0).mean(-1))  # [h, w]
    weight = (spread / spread.mean()).clamp(0.3, 5.0)
    for step in track(range(steps), "tokenizer"):
        x = model.to_input(torch.from_numpy(frames[rng.integers(len(frames), size=batch)]))
        out = model(x)
        loss = ((out.reconstruction - x).abs() * weight).mean() + out.loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 and step < 0.8 * steps:
            restarted = model.restart_codes(out.latents, out.codes)
            print(f"step {step}: weighted L1 {loss.item():.4f}, {restarted} codes restarted", flush=True)
    with torch.no_grad():  # so that the checkpoint holds it in half the bytes, exactly
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.eval(), evaluate(model, frames[rng.integers(len(frames), size=512)])


@torch.no_grad()
def evaluate(model: VQGAN, frames: np.ndarray) -> dict:
    """{l1: mean absolute error in 0..255, codes_used: distinct codes} over `frames`."""
    codes = encode(model, frames)
    pictures = np.concatenate([model.decode(codes[i : i + 64]).numpy() for i in range(0, len(codes), 64)])
    decoded = np.clip((pictures.transpose(0, 2, 3, 1) + 1) * 127.5, 0, 255)
    return {"l1": float(np.abs(decoded - frames).mean()), "codes_used": int(codes.unique().numel())}


@torch.no_grad()
def encode(model: VQGAN, frames: np.ndarray, batch: int = 128) -> torch.Tensor:
    """Codes int64 [N, tokens a frame] of uint8 RGB `frames`."""
    parts = (torch.from_numpy(frames[i : i + batch]) for i in range(0, len(frames), batch))
    return torch.cat([model.encode(model.to_input(part)) for part in parts])
