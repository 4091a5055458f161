"""Sizes and choices of a latent action model: one frozen dataclass, stored as `config.json` with its weights.

The defaults are the paper's (table 3), which are also the released model's. Where they differ from each other
the field says so.
"""

import dataclasses
import math
from dataclasses import dataclass

from models.config import _check_types, _choice, _from_dict, _require


@dataclass(frozen=True)
class LatentActionConfig:
    """Raises ModelConfigError for anything impossible."""

    name: str
    image_size: int = 224  # px, square
    patch: int = 14  # px, square
    width: int = 768  # of every token, DINOv2's included
    vit_layers: int = 12
    vit_heads: int = 12
    registers: int = 4  # DINOv2's extra tokens; 0: a model without
    heads: int = 16  # of the spatio-temporal blocks
    head_dim: int = 64
    encoder_layers: int = 6
    decoder_layers: int = 8
    dropout: float = 0.1  # in feed-forward layers (official; the paper does not say)
    codebook_size: int = 8  # K
    code_dim: int = 32
    code_grid: int = 4  # codes along one side: code_grid ** 2 codes a step
    deltas: bool = False  # quantise the change of a token between frames (LAPA), not the token
    decoder: str = "causal"  # causal: sees o_0..o_t, z_0..z_t | cross: o_t alone, cross-attending z_t (LAPA)
    residual: bool = False  # predict the change of the frame, none at first: small models, short training
    target: str = "pixels"  # pixels | features: of a frozen DINOv2 (MVP-LAM)

    def __post_init__(self):
        _check_types(self)
        for name in ("deltas", "residual"):
            value = getattr(self, name)
            _require(type(value) is bool, f"{name}: expected true or false, got {value!r}")
        for field in dataclasses.fields(self):
            if field.type is int and field.name != "registers":
                value = getattr(self, field.name)
                _require(value > 0, f"{field.name}: {value} must be positive")
        _require(self.registers >= 0, f"registers: {self.registers} must not be negative")
        _require(
            self.image_size % self.patch == 0,
            f"image_size: {self.image_size} is not a multiple of patch {self.patch}",
        )
        _require(
            self.width % self.vit_heads == 0,
            f"width: {self.width} is not a multiple of vit_heads {self.vit_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim: {self.head_dim} must be even (rotary positions)")
        halvings = math.log2(self.grid / self.code_grid)
        _require(
            halvings >= 0 and halvings == int(halvings),
            f"code_grid: {self.code_grid} must be the patch grid {self.grid} halved a whole number of times",
        )
        _require(0 <= self.dropout < 1, f"dropout: {self.dropout} must be in [0, 1)")
        _choice("decoder", self.decoder, ("causal", "cross"))
        _choice("target", self.target, ("pixels", "features"))
        _require(not self.residual or self.target == "pixels", "residual: needs target pixels")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch

    @property
    def codes(self) -> int:
        """Codes a step, N_latent."""
        return self.code_grid**2

    @property
    def strides(self) -> tuple[int, ...]:
        """Spatial strides of the quantiser's convolutions, at least two: they halve the patch grid."""
        halvings = int(math.log2(self.grid // self.code_grid))
        return (2,) * halvings + (1,) * (2 - halvings)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> "LatentActionConfig":
        """Strict: every field present, none unknown. Raises ModelConfigError."""
        return _from_dict(cls, data, "latent action model")


# Changes in, changes out: after a hundred steps the decoder reads the latents; without either it still copies
# the last frame.
_TINY = LatentActionConfig(
    name="laq_tiny",
    image_size=64,
    patch=8,
    width=64,
    vit_layers=1,
    vit_heads=2,
    registers=0,
    heads=2,
    head_dim=32,
    encoder_layers=2,
    decoder_layers=2,
    dropout=0.0,
    deltas=True,
    residual=True,
)
_LAPA = {"code_grid": 2, "deltas": True, "decoder": "cross"}

SIZES = {
    "laq_base": LatentActionConfig(name="laq_base"),
    "laq_tiny": _TINY,
    "laq_sim": dataclasses.replace(
        _TINY,
        name="laq_sim",
        image_size=96,
        patch=6,
        width=128,
        vit_layers=2,
        vit_heads=4,
        heads=4,
        encoder_layers=3,
        decoder_layers=3,
    ),
    "lapa_base": LatentActionConfig(name="lapa_base", **_LAPA),
    "lapa_tiny": dataclasses.replace(_TINY, name="lapa_tiny", **_LAPA),
    "mvp_lam_base": LatentActionConfig(name="mvp_lam_base", target="features"),
}
