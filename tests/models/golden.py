"""The released byte formats of `shared/data/golden` in our names, read by the real converters."""

import json
from pathlib import Path

import pytest
import torch

from models.config import VQGANConfig
from models.convert import lwm, vqgan
from models.convert.streaming import Stream

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "data" / "golden"


def folder(name: str) -> Path:
    """A folder of golden data, or skip."""
    path = GOLDEN / name
    if not path.is_dir():
        pytest.skip(f"no golden data at {path}")
    return path


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def vqgan_state(path: Path) -> tuple[VQGANConfig, dict[str, torch.Tensor]]:
    """LWM's VQGAN at its size of 64 px."""
    return vqgan.read(path, read_json(path.parent / "config.json")["resolution"])


def backbone_state(path: Path, heads: int) -> dict[str, torch.Tensor]:
    """LWM's LLaMA, fp32."""
    with Stream(path) as stream:
        small = VQGANConfig(64, (64, 32, 32), 2, 16, 256, stem_channels=32)
        plan = lwm.plan(stream, small, heads)
        tensors = {name: plan.source.read(recipe).float() for name, recipe in plan.recipes.items()}
    return {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
