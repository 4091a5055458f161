"""Configurations small enough for a test."""

from models.config import ModelConfig, VQGANConfig


def small(**choices) -> ModelConfig:
    """Every part of the model, two layers, 16 px frames of 16 tokens."""
    fields = {
        "name": "small",
        "hidden": 32,
        "mlp_hidden": 64,
        "layers": 2,
        "heads": 4,
        "text_vocab": 300,
        "vision_vocab": 34,
        "vqgan": VQGANConfig(16, (8, 8, 16), 1, 8, 32, norm_groups=4),
        "max_text_tokens": 128,
        "max_positions": 256,
        "rope_theta": 1e4,
        "action_dim": 8,
        "horizon": 14,
    }
    return ModelConfig(**(fields | choices))
