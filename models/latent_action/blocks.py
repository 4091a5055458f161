"""Factorised spatio-temporal transformer blocks, as in the released model.

Tokens are [B, T, n, width]: grid * grid patches of a frame, row-major, then any extra token. A block is, each
with a residual: an optional conditioning module, a 3-D depthwise convolution over the patches (the only
absolute position), attention over time at each token, attention over the tokens of each frame, feed-forward.

Conventions of the released weights that a fresh design would not choose: layer norms have no bias; queries
see the normalised tokens, keys and values the tokens themselves; queries and keys are scaled to unit length
(after rotation) and then by learned vectors, logits by 8.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOGIT_SCALE = 8.0  # of unit-length queries and keys
ROPE_THETA = 1e4


def temporal_rotation(frames: int, head_dim: int, device=None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions 0..frames-1, each [frames, head_dim / 2], fp32."""
    half = head_dim // 2
    frequency = ROPE_THETA ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(frames, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions in half layout: element i pairs with i + head_dim / 2."""
    (cos, sin), (a, b) = rotation, x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class FeedForward(nn.Module):
    """Norm, GEGLU of 8/3 width, projection."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        inner = int(4.0 * (2 / 3) * width)
        self.norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, -1)
        return self.down(self.dropout(F.gelu(gate) * value))


class Attention(nn.Module):
    """Multi-head attention; with `cross`, keys and values come from a (normalised) context."""

    def __init__(self, width: int, heads: int, head_dim: int, cross: bool = False):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, bias=False)
        self.context_norm = nn.LayerNorm(width, bias=False) if cross else None
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.q_scale = nn.Parameter(torch.ones(head_dim))
        self.k_scale = nn.Parameter(torch.ones(head_dim))
        self.out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        causal: bool = False,
        context: Tensor | None = None,
    ) -> Tensor:
        """x [b, n, width]; bias [heads, n, n] is added to the logits; context [b, m, width]."""
        source = x if self.context_norm is None else self.context_norm(context)
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        mask = None if bias is None else bias.to(q.dtype)[None]
        out = F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, is_causal=causal, scale=LOGIT_SCALE
        )
        return self.out(out.transpose(1, 2).flatten(2))


class PositionBias(nn.Module):
    """Logit bias between patches from their offset (Liu et al. 2022): a small network of the signed
    logarithmic distance, in image sides.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width),
            nn.LeakyReLU(0.1),
            nn.Linear(width, width),
            nn.LeakyReLU(0.1),
            nn.Linear(width, heads),
        )

    def forward(self, grid: int) -> Tensor:
        """[heads, grid * grid, grid * grid]; evaluated once for each of the (2 grid - 1)^2 offsets."""
        weight = self.net[0].weight
        offsets = torch.arange(1 - grid, grid, device=weight.device, dtype=torch.float32) / grid
        offsets = offsets.sign() * offsets.abs().log1p()
        pairs = torch.cartesian_prod(offsets, offsets).to(weight.dtype)
        table = self.net(pairs)  # [(2 grid - 1)^2, heads]
        row, column = torch.meshgrid(*[torch.arange(grid, device=weight.device)] * 2, indexing="ij")
        row, column = row.flatten(), column.flatten()
        index = (row[:, None] - row + grid - 1) * (2 * grid - 1) + column[:, None] - column + grid - 1
        return table[index].permute(2, 0, 1)


class Conditioning(nn.Module):
    """x + FFN(LN(x)(1 + alpha) + beta), alpha and beta linear in the frame's latent action, zero at first
    (He et al. 2025).
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, T, n, width], condition [B, T, width]."""
        alpha, beta = self.modulation(condition)[:, :, None].chunk(2, -1)
        return x + self.down(F.gelu(self.up(self.norm(x) * (1 + alpha) + beta)))


def local_positions(conv: nn.Conv3d, x: Tensor, grid: int, causal: bool) -> Tensor:
    """Depthwise 3x3x3 convolution over the patches of x [B, T, n, width] (Chu et al. 2021), plus x; extra
    tokens pass through. causal: sees this frame and the two before.
    """
    patches, extra = x[:, :, : grid * grid], x[:, :, grid * grid :]
    volume = patches.unflatten(2, (grid, grid)).permute(0, 4, 1, 2, 3)
    volume = conv(F.pad(volume, (1, 1, 1, 1, *((2, 0) if causal else (1, 1)))))
    return torch.cat([patches + volume.permute(0, 2, 3, 4, 1).flatten(2, 3), extra], 2)


class SpatioTemporalBlock(nn.Module):
    def __init__(
        self, width: int, heads: int, head_dim: int, dropout: float, causal: bool, conditioned: bool
    ):
        super().__init__()
        self.causal = causal
        self.conditioning = Conditioning(width) if conditioned else None
        self.local = nn.Conv3d(width, width, 3, groups=width)
        self.temporal = Attention(width, heads, head_dim)
        self.spatial = Attention(width, heads, head_dim)
        self.feed_forward = FeedForward(width, dropout)

    def forward(
        self,
        x: Tensor,
        grid: int,
        bias: Tensor,
        rotation: tuple[Tensor, Tensor],
        condition: Tensor | None = None,
    ) -> Tensor:
        batch, frames = x.shape[:2]
        if self.conditioning is not None:
            x = self.conditioning(x, condition)
        x = local_positions(self.local, x, grid, self.causal)
        rows = x.transpose(1, 2).flatten(0, 1)  # [B * n, T, width]
        rows = self.temporal(rows, rotation=rotation, causal=self.causal)
        x = x + rows.unflatten(0, (batch, -1)).transpose(1, 2)
        x = x + self.spatial(x.flatten(0, 1), bias=bias).unflatten(0, (batch, frames))
        return x + self.feed_forward(x)


class CrossBlock(nn.Module):
    """LAPA's decoder block: one frame's patches attend to each other, then to the latent action's codes."""

    def __init__(self, width: int, heads: int, head_dim: int, dropout: float):
        super().__init__()
        self.local = nn.Conv3d(width, width, 3, groups=width)
        self.spatial = Attention(width, heads, head_dim)
        self.cross = Attention(width, heads, head_dim, cross=True)
        self.feed_forward = FeedForward(width, dropout)

    def forward(self, x: Tensor, grid: int, bias: Tensor, codes: Tensor) -> Tensor:
        """x [b, n, width], codes [b, N, width]."""
        x = local_positions(self.local, x[:, None], grid, causal=True)[:, 0]
        x = x + self.spatial(x, bias=bias)
        x = x + self.cross(x, context=codes)
        return x + self.feed_forward(x)
