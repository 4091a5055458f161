"""The gate between frame tokens and everything that is learned from them: are hand and cups still in there?

A small convolutional probe reads where things are, once from the pixels the policy is shown and once from
their tokens. It is fitted to training episodes and tested on held-out ones, and attends to a place of its
own for each thing, so that it can find what the policy's attention could find. Tokens that have lost a cup
cannot be made good by any later stage.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from config.dataset import DatasetConfig
from episodes.reader import Dataset
from models.vqgan import VQGAN
from training.data.augment import prepare
from training.data.open import open_dataset
from training.data.sampling import held_out
from training.data.windows import pick_view
from training.run import TrainingError
from training.seen import ABSENT, PLACES

LIMIT_MM = 5.0
BATCH, LEARNING_RATE, WIDTH = 64, 3e-3, 48


@dataclass(frozen=True)
class Seen:
    """n frames with their truth."""

    frames: np.ndarray  # uint8 RGB [n, s, s, 3]
    places: np.ndarray  # float32 [n, K, 3] m, world; z ABSENT where a thing is not there
    names: tuple[str, ...]  # [K]
    test: np.ndarray  # bool [n]: of held-out episodes


def read(dataset: DatasetConfig, size: int, share: float, every: int = 5, episodes: int = 400) -> Seen:
    """Every `every`-th frame of `episodes` episodes, evenly from all over a dataset with PLACES, as the
    policy is shown them. Things that are in none of them are left out.

    share: of the episodes held out, as the tokenizer's training held them out. Raises TrainingError.
    """
    data, reader = Dataset(Path(dataset.path).expanduser()), open_dataset(dataset)
    out = held_out([reader.key(i) for i in range(len(reader))], share)
    frames, places, test = [], [], []
    for index in np.unique(np.linspace(0, len(reader) - 1, episodes).round().astype(int)):
        episode = reader.episode(index)
        at = np.arange(index % every, episode.length, every)
        frames.append(prepare(episode.frames(pick_view(episode, dataset.views), at), size))
        places.append(np.asarray(data.values(index, PLACES), np.float32)[at].reshape(len(at), -1, 3))
        test.append(np.full(len(at), out[index]))
    truth = np.concatenate(places)
    there = (truth[..., 2] > ABSENT + 0.5).any(0)
    if not there.any():
        raise TrainingError(f"{dataset.path}: {PLACES} says of nothing where it is")
    names = [name.removesuffix("_x") for name in data.names(PLACES)[::3]]
    seen = tuple(name for name, shown in zip(names, there, strict=True) if shown)
    return Seen(np.concatenate(frames), truth[:, there], seen, np.concatenate(test))


class Probe(nn.Module):
    """Features [B, c, g, g] -> places [B, K, 3], in units of their spread: one place attended to a thing."""

    def __init__(self, stem: nn.Module, channels: int, things: int):
        super().__init__()
        self.stem = stem
        self.body = nn.Sequential(
            nn.Conv2d(channels + 2, WIDTH, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.GELU(),
        )
        self.attend = nn.Conv2d(WIDTH, things, 1)
        self.place = nn.Parameter(torch.randn(things, WIDTH + 2, 64) / 7)
        self.out = nn.Parameter(torch.zeros(things, 64, 3))
        self.bias = nn.Parameter(torch.zeros(things, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        line = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        grid = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(x), -1, -1, -1)
        features = torch.cat([self.body(torch.cat([x, grid], 1)), grid], 1).flatten(2)  # [B, c, n]
        weights = self.attend(features[:, :-2].unflatten(2, x.shape[-2:])).flatten(2).softmax(-1)
        found = torch.einsum("bkn,bcn->bkc", weights, features)
        hidden = nn.functional.gelu(torch.einsum("bkc,kch->bkh", found, self.place))
        return torch.einsum("bkh,khd->bkd", hidden, self.out) + self.bias


def pixel_stem() -> nn.Module:
    """uint8 RGB [B, s, s, 3] as [B, 3, s, s] floats -> [B, WIDTH, s/8, s/8]."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 5, stride=2, padding=2),
        nn.GELU(),
        nn.Conv2d(24, WIDTH, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
        nn.GELU(),
    )


def distances(
    inputs: Callable[[np.ndarray], Tensor],
    make: Callable[[], Probe],
    seen: Seen,
    steps: int,
    device: str,
    seed: int = 0,
) -> dict[str, float]:
    """Median distance in mm, on held-out frames, between where a probe of `inputs` (rows of `seen` ->
    [B, c, g, g]) sees each thing and where it is. Raises TrainingError without held-out frames.
    """
    train, test = np.flatnonzero(~seen.test), np.flatnonzero(seen.test)
    if not len(train) or not len(test):
        raise TrainingError(f"the gate needs training and held-out frames, got {len(train)} and {len(test)}")
    there = seen.places[..., 2] > ABSENT + 0.5
    known = [seen.places[train][there[train, k], k] for k in range(len(seen.names))]
    mean = np.stack([k.mean(0) if len(k) else np.zeros(3) for k in known])
    scale = np.stack([k.std(0).clip(1e-3) if len(k) else np.ones(3) for k in known])
    wanted = torch.tensor((seen.places - mean) / scale, dtype=torch.float32, device=device)
    mask = torch.tensor(there, device=device)
    metres = torch.tensor(scale, dtype=torch.float32, device=device)
    torch.manual_seed(seed)
    probe = make().to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    order = np.random.default_rng(seed)
    for _ in range(steps):
        rows = order.choice(train, BATCH)
        error = (probe(inputs(rows)) - wanted[rows]) * metres * 100  # cm
        distance = (error.square().sum(-1) + 1e-4).sqrt()
        loss = (distance * mask[rows]).sum() / mask[rows].sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    probe.eval()
    with torch.no_grad():
        parts = [probe(inputs(test[at : at + 256])) for at in range(0, len(test), 256)]
    off = ((torch.cat(parts) - wanted[test]) * metres).norm(dim=-1).cpu().numpy() * 1000
    return {
        name: float(np.median(off[there[test, k], k])) if there[test, k].any() else float("nan")
        for k, name in enumerate(seen.names)
    }


def from_pixels(seen: Seen, steps: int, device: str) -> dict[str, float]:
    """What can be read at the policy's resolution at all."""

    def inputs(rows: np.ndarray) -> Tensor:
        return torch.from_numpy(seen.frames[rows]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1

    things = len(seen.names)
    return distances(inputs, lambda: Probe(pixel_stem(), WIDTH, things), seen, steps, device)


@torch.no_grad()
def tokens(vqgan: VQGAN, frames: np.ndarray) -> Tensor:
    """Codebook vectors [n, z, g, g] of uint8 frames, as the policy's tokens name them."""
    device = next(vqgan.parameters()).device
    parts = [
        vqgan.encode(vqgan.to_input(torch.from_numpy(frames[at : at + 128]).to(device)))
        for at in range(0, len(frames), 128)
    ]
    return vqgan.lookup(torch.cat(parts)).float()


def from_tokens(vqgan: VQGAN, seen: Seen, steps: int, device: str) -> dict[str, float]:
    features = tokens(vqgan, seen.frames).to(device)
    features = (features - features.mean()) / features.std().clamp(min=1e-6)
    things = len(seen.names)
    make = lambda: Probe(nn.Identity(), features.shape[1], things)  # noqa: E731
    return distances(lambda rows: features[rows], make, seen, steps, device)


def report(pixels: dict[str, float], read: dict[str, float]) -> tuple[dict, list[str]]:
    """(gate.json, what fails it): the tokens' distance of every thing must be under LIMIT_MM."""
    failed = [f"{name} {off:.1f} mm" for name, off in read.items() if not off < LIMIT_MM]
    return {"limit_mm": LIMIT_MM, "pixels_mm": pixels, "tokens_mm": read, "passed": not failed}, failed


def run(vqgan: VQGAN, dataset: DatasetConfig, share: float, steps: int, device: str, out: Path) -> list[str]:
    """Measure, write `out` (gate.json); what fails the gate."""
    seen = read(dataset, vqgan.config.image_size, share)
    found, failed = report(from_pixels(seen, steps, device), from_tokens(vqgan, seen, steps, device))
    out.write_text(json.dumps(found, indent=1))
    return failed
