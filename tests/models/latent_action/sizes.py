"""A latent action model small enough for a test."""

from models.latent_action.config import LatentActionConfig


def small(**choices) -> LatentActionConfig:
    """Every part, 32 px frames of 8 x 8 patches, 16 codes a step."""
    fields = {
        "name": "small",
        "image_size": 32,
        "patch": 4,
        "width": 32,
        "vit_layers": 1,
        "vit_heads": 2,
        "registers": 2,
        "heads": 2,
        "head_dim": 8,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "dropout": 0.0,
        "code_dim": 8,
    }
    return LatentActionConfig(**(fields | choices))
