"""Forward dynamics F(o_{t+1} | o_{0:t}, z_{0:t}): frames and latent actions -> the next frames.

`Decoder` is causal in time and takes z_t twice: as modulation before every block and as one more spatial
token. `CrossDecoder` is LAPA's: one frame at a time, cross-attending the codes of z_t.
"""

from torch import Tensor, cat, nn

from models.latent_action.blocks import (
    CrossBlock,
    FeedForward,
    PositionBias,
    SpatioTemporalBlock,
    temporal_rotation,
)
from models.latent_action.config import LatentActionConfig


class PatchEmbed(nn.Module):
    """Frames [n, 3, s, s] -> normalised patch tokens [n, grid * grid, width]."""

    def __init__(self, config: LatentActionConfig):
        super().__init__()
        self.projection = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, frames: Tensor) -> Tensor:
        return self.norm(self.projection(frames).flatten(2).transpose(1, 2))


class Head(nn.Module):
    """Patch tokens -> the next frame [..., 3, s, s], or its DINOv2 features [..., grid * grid, width]."""

    def __init__(self, config: LatentActionConfig):
        super().__init__()
        self.config = config
        size = 3 * config.patch**2 if config.target == "pixels" else config.width
        self.linear = nn.Linear(config.width, size)
        if config.residual:
            nn.init.normal_(self.linear.weight, std=1e-3)
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        """x [..., grid * grid, width]; frames [..., 3, s, s], the ones before."""
        config, x = self.config, self.linear(x)
        if config.target == "features":
            return x
        x = x.unflatten(-1, (3, config.patch, config.patch)).unflatten(-4, (config.grid, config.grid))
        x = x.movedim(-3, -5)  # [..., 3, row, column, y, x]
        x = x.transpose(-2, -3).flatten(-4, -3).flatten(-2, -1)
        return frames + x if config.residual else x


class Decoder(nn.Module):
    def __init__(self, config: LatentActionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.condition = nn.Linear(config.codes * config.code_dim, config.width)
        self.condition_mlp = FeedForward(config.width, config.dropout)
        self.bias = PositionBias(config.width, config.heads)
        self.blocks = nn.ModuleList(
            SpatioTemporalBlock(
                config.width, config.heads, config.head_dim, config.dropout, causal=True, conditioned=True
            )
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = Head(config)

    def forward(self, frames: Tensor, latents: Tensor) -> Tensor:
        """frames [B, T, 3, s, s], latents [B, T, codes, code_dim] -> frame t + 1 at t, [B, T, 3, s, s]."""
        config, (batch, steps) = self.config, frames.shape[:2]
        condition = self.condition_mlp(self.condition(latents.flatten(2)))  # [B, T, width]
        patches = self.patch_embed(frames.flatten(0, 1)).unflatten(0, (batch, steps))
        x = cat([patches, condition[:, :, None]], 2)
        bias = nn.functional.pad(self.bias(config.grid), (0, 1, 0, 1))  # none to and from the extra token
        rotation = temporal_rotation(steps, config.head_dim, frames.device)
        for block in self.blocks:
            x = block(x, config.grid, bias, rotation, condition)
        return self.head(self.norm(x)[:, :, :-1], frames)


class CrossDecoder(nn.Module):
    def __init__(self, config: LatentActionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.codes = nn.Linear(config.code_dim, config.width)
        self.bias = PositionBias(config.width, config.heads)
        self.blocks = nn.ModuleList(
            CrossBlock(config.width, config.heads, config.head_dim, config.dropout)
            for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = Head(config)

    def forward(self, frames: Tensor, latents: Tensor) -> Tensor:
        """As `Decoder`; each prediction sees only its own frame and latent action."""
        batch, steps = frames.shape[:2]
        x, codes = self.patch_embed(frames.flatten(0, 1)), self.codes(latents.flatten(0, 1))
        bias = self.bias(self.config.grid)
        for block in self.blocks:
            x = block(x, self.config.grid, bias, codes)
        return self.head(self.norm(x).unflatten(0, (batch, steps)), frames)
