"""Sizes and choices of a model: one frozen dataclass, stored as `config.json` with its weights.

`SIZES["vipra_tiny"]`, `SIZES["vipra_100m"]` and `SIZES["vipra_7b"]` run through the same code; only these
numbers differ. `with_embodiment` sets the action size. Every choice that changes what the weights mean is
here, none in the code.
"""

import dataclasses
from dataclasses import dataclass, replace


class ModelConfigError(ValueError):
    """A size or choice is impossible; the message names the field, its value and what is allowed."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ModelConfigError(message)


def _check_types(config) -> None:
    """Each field holds its declared type (bool is not an int); an int where a float belongs is converted."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is float and type(value) is int:
            object.__setattr__(config, field.name, float(value))
        elif field.type in (int, float, str, bool):
            ok = type(value) is field.type
            _require(
                ok, f"{type(config).__name__}.{field.name}: expected {field.type.__name__}, got {value!r}"
            )


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name}: {value!r} is not one of {', '.join(allowed)}")


def _from_dict(cls, data: object, where: str):
    _require(isinstance(data, dict), f"{where}: expected a map, got {type(data).__name__}")
    names = {field.name for field in dataclasses.fields(cls)}
    unknown, missing = sorted(set(data) - names), sorted(names - set(data))
    _require(not unknown, f"{where}: unknown keys {unknown}")
    _require(not missing, f"{where}: missing keys {missing}")
    return cls(**data)


@dataclass(frozen=True)
class VQGANConfig:
    """Frame tokenizer. Official: LWM's VQGAN, 256 px, five levels, 16x16 codes of 8192."""

    image_size: int = 256  # px, square
    channels: tuple[int, ...] = (
        128,
        256,
        256,
        512,
        768,
    )  # one level each; every level but the last halves the image
    blocks_per_level: int = 2  # residual blocks; the decoder has one more
    latent_channels: int = 64
    codebook_size: int = 8192
    norm_groups: int = 32  # of GroupNorm
    stem_channels: int = 0  # out of the encoder's first convolution; 0: channels[0]

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))
        _check_types(self)
        _require(
            len(self.channels) > 0 and all(type(c) is int and c > 0 for c in self.channels),
            f"vqgan.channels: {self.channels} must be positive integers",
        )
        for name in ("image_size", "blocks_per_level", "latent_channels", "codebook_size", "norm_groups"):
            _require(getattr(self, name) > 0, f"vqgan.{name}: {getattr(self, name)} must be positive")
        _require(self.stem_channels >= 0, f"vqgan.stem_channels: {self.stem_channels} must not be negative")
        bad = [c for c in (*self.channels, self.stem_channels) if c % self.norm_groups]
        _require(not bad, f"vqgan.channels: {bad} are not multiples of norm_groups {self.norm_groups}")
        _require(
            self.image_size % self.downsampling == 0,
            f"vqgan.image_size: {self.image_size} is not a multiple of {self.downsampling}",
        )

    @property
    def downsampling(self) -> int:
        """Image pixels per code along one side."""
        return 2 ** (len(self.channels) - 1)

    @property
    def grid(self) -> int:
        """Codes along one side."""
        return self.image_size // self.downsampling


@dataclass(frozen=True)
class ModelConfig:
    """ViPRA: LLaMA over text, vision and latent-action tokens, with continuous action heads (paper sections 3
    and 4).

    Raises ModelConfigError for anything impossible.
    """

    name: str
    hidden: int
    mlp_hidden: int
    layers: int
    heads: int
    text_vocab: int
    vision_vocab: int  # VQGAN codes, then end-of-frame, end-of-vision, and unused rows
    vqgan: VQGANConfig
    max_text_tokens: int = 128  # prompt slots at serving; official server: 128
    max_positions: int = 768  # longest stage-3 sequence, real tokens
    norm_eps: float = 1e-6
    rope_theta: float = 5e7
    rope_precision: str = (
        "fp32"  # bf16: frequencies, angles, sines rounded as the official code trains and serves
    )
    latent_codes: int = 8  # K; id K closes a step
    latent_tokens: int = 16  # codes a step
    latent_head: str = (
        "linear"  # H_psi: linear (released weights) | mlp (paper: one hidden layer of hidden/2)
    )
    horizon: int = 14  # H
    action_dim: int = 8  # D
    action_heads: str = "flow"  # flow (ViPRA-FM) | ar (ViPRA-AR) | none: pretrained, cannot act yet
    action_vocab: int = 0  # ar: largest bin count of a dimension, and the id that ends an action
    activation: str = "silu"  # of E_gamma: silu (official) | gelu (paper table 5)
    dropout: float = 0.0  # official 0, paper 0.1
    vision_positions: str = (
        "none"  # none (released weights) | grid: a learned vector for each place in a frame
    )
    time_embedding: str = "periods"  # official: freq 1e4^(-i/(n-1)) | periods: 4e-3 to 4, resolved in [0, 1]
    chunk_attention: str = "causal"  # between a chunk's actions: causal (official) | bidirectional
    objective: str = "corrected"  # see models.flow; paper_literal is for study only
    representation: str = "absolute"  # joints: absolute | relative to the state at t_obs
    future_frame: bool = False  # actions follow a predicted o_{t+H} (+SP3, paper table 2); cannot be served

    def __post_init__(self):
        if isinstance(self.vqgan, dict):
            object.__setattr__(self, "vqgan", _from_dict(VQGANConfig, self.vqgan, "vqgan"))
        _check_types(self)
        for field in dataclasses.fields(self):
            if field.type is int and field.name != "action_vocab":
                value = getattr(self, field.name)
                _require(value > 0, f"{field.name}: {value} must be positive")
        _require(
            self.hidden % (2 * self.heads) == 0,
            f"hidden: {self.hidden} must be a multiple of 2*heads {self.heads}",
        )
        _require(self.hidden % 4 == 0, f"hidden: {self.hidden} must be a multiple of 4 (time embedding)")
        _require(
            self.vision_vocab >= self.vqgan.codebook_size + 2,
            f"vision_vocab: {self.vision_vocab} must hold {self.vqgan.codebook_size} codes and 2 specials",
        )
        _require(
            self.max_positions >= self.max_text_tokens + self.vision_tokens + self.horizon,
            f"max_positions: {self.max_positions} is shorter than text, frames and a chunk",
        )
        _require(0 <= self.dropout < 1, f"dropout: {self.dropout} must be in [0, 1)")
        _require(
            self.norm_eps > 0 and self.rope_theta > 1, "norm_eps must be positive and rope_theta above 1"
        )
        _choice("rope_precision", self.rope_precision, ("fp32", "bf16"))
        _choice("latent_head", self.latent_head, ("linear", "mlp"))
        _choice("action_heads", self.action_heads, ("flow", "ar", "none"))
        _choice("activation", self.activation, ("silu", "gelu"))
        _choice("vision_positions", self.vision_positions, ("none", "grid"))
        _choice("time_embedding", self.time_embedding, ("official", "periods"))
        _choice("chunk_attention", self.chunk_attention, ("causal", "bidirectional"))
        _choice("objective", self.objective, ("corrected", "paper_literal"))
        _choice("representation", self.representation, ("absolute", "relative"))
        if self.action_heads == "ar":
            _require(self.action_vocab >= 2, "action_heads: ar needs an action_vocab of at least 2")
            _require(
                self.representation == "absolute", "action_heads: ar bins raw actions, not relative ones"
            )
        else:
            _require(self.action_vocab == 0, f"action_vocab: {self.action_vocab} needs action_heads ar")

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def frame_tokens(self) -> int:
        """N, codes of one frame."""
        return self.vqgan.grid**2

    @property
    def frames(self) -> int:
        """Before the actions: o_{t-1}, o_t, and o_{t+H} where it is predicted."""
        return 3 if self.future_frame else 2

    @property
    def vision_tokens(self) -> int:
        """Tokens of the frames before the actions, each with its end."""
        return self.frames * (self.frame_tokens + 1)

    @property
    def end_of_frame(self) -> int:
        return self.vqgan.codebook_size

    @property
    def end_of_vision(self) -> int:
        return self.vqgan.codebook_size + 1

    @property
    def end_of_step(self) -> int:
        """Closes a step's latent codes."""
        return self.latent_codes

    @property
    def end_of_action(self) -> int:
        """Closes the codes of one discrete action."""
        return self.action_vocab - 1

    def with_embodiment(self, action_dim: int, horizon: int, **choices) -> "ModelConfig":
        """The same network for a robot with D = `action_dim` and H = `horizon`; `choices` replace further
        fields.
        """
        return replace(self, action_dim=action_dim, horizon=horizon, **choices)

    def to_dict(self) -> dict:
        """Plain data for config.json; `from_dict` undoes it."""
        data = dataclasses.asdict(self)
        data["vqgan"]["channels"] = list(self.vqgan.channels)
        return data

    @classmethod
    def from_dict(cls, data: object) -> "ModelConfig":
        """Strict: every field present, none unknown; only fields newer than a folder may be absent.

        Raises ModelConfigError.
        """
        newer = {"action_vocab": 0, "future_frame": False, "vision_positions": "none"}
        return _from_dict(cls, newer | data if isinstance(data, dict) else data, "model")


_SIM_FRAMES = VQGANConfig(96, (16, 32, 64, 96), 2, 16, 1024, norm_groups=8)

SIZES = {
    # 64 px frames, 64 tokens each; about 3M parameters. Sequences are short, so theta is the classic 1e4.
    "vipra_tiny": ModelConfig(
        name="vipra_tiny",
        hidden=192,
        mlp_hidden=512,
        layers=6,
        heads=6,
        text_vocab=512,
        vision_vocab=514,
        vqgan=VQGANConfig(64, (16, 32, 64, 128), 2, 16, 512, norm_groups=8),
        max_positions=320,
        rope_theta=1e4,
    ),
    # 96 px of the workspace, 144 tokens a frame; about 7M parameters.
    "vipra_sim": ModelConfig(
        name="vipra_sim",
        hidden=256,
        mlp_hidden=704,
        layers=8,
        heads=8,
        text_vocab=512,
        vision_vocab=1026,
        vqgan=_SIM_FRAMES,
        max_positions=640,
        rope_theta=1e4,
        vision_positions="grid",
    ),
    # The same pictures, half the arithmetic for tokens, a quarter for the rest: 1.2M parameters, for CPUs.
    "vipra_sim_small": ModelConfig(
        name="vipra_sim_small",
        hidden=128,
        mlp_hidden=352,
        layers=4,
        heads=4,
        text_vocab=512,
        vision_vocab=1026,
        vqgan=replace(_SIM_FRAMES, blocks_per_level=1),
        max_positions=640,
        rope_theta=1e4,
        vision_positions="grid",
    ),
    # Sequence lengths of the 7B model at a size that a CPU can time.
    "vipra_100m": ModelConfig(
        name="vipra_100m",
        hidden=768,
        mlp_hidden=2048,
        layers=12,
        heads=12,
        text_vocab=512,
        vision_vocab=8448,
        vqgan=VQGANConfig(256, (32, 64, 64, 128, 192), 2, 64, 8192),
    ),
    # LWM-Chat-1M's LLaMA-7B and VQGAN with ViPRA's heads.
    "vipra_7b": ModelConfig(
        name="vipra_7b",
        hidden=4096,
        mlp_hidden=11008,
        layers=32,
        heads=32,
        text_vocab=32000,
        vision_vocab=8448,
        vqgan=VQGANConfig(),
        time_embedding="official",
    ),
}
