"""LLaMA (LWM-Chat-1M's shape): RMSNorm, half-rotation RoPE, SwiGLU, separate text and vision tables and
heads.

Notable: QKV and gate/up are one matrix each; the KV cache is two static buffers; masks and positions are
explicit arguments, so training, prefill and cached steps are the same `forward`; the last layer computes
queries, output and MLP only for the `tail` positions that are read.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelConfig


def rope(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, head_dim / 2] fp32 for integer `positions` [B, T].

    rope_precision bf16 rounds frequencies, angles, sines and cosines to bf16, as the official code does.
    """
    dtype = torch.bfloat16 if config.rope_precision == "bf16" else torch.float32
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device).to(dtype) / config.head_dim
    frequency = 1.0 / torch.pow(
        torch.full_like(exponent, config.rope_theta, dtype=torch.float32), exponent
    ).to(dtype)
    angle = (positions[:, None, :, None].float() * frequency.float()).to(dtype)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of x [B, heads, T, head_dim]; fp32 inside."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class KVCache:
    """Keys and values of every layer in `slots` fixed places: two buffers [layers, batch, heads, slots,
    head_dim].

    Zero-filled, so that masked slots are finite from the start.
    """

    def __init__(self, config: ModelConfig, batch: int, slots: int, device="cpu", dtype=torch.float32):
        shape = (config.layers, batch, config.heads, slots, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def slots(self) -> int:
        return self.k.shape[3]

    def update(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, heads, T, head_dim] at slots start.., return all slots of these B rows."""
        batch, end = k.shape[0], start + k.shape[2]
        self.k[layer, :batch, :, start:end] = k
        self.v[layer, :batch, :, start:end] = v
        return self.k[layer, :batch], self.v[layer, :batch]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d, self.heads, self.dropout = config.hidden, config.heads, config.dropout
        self.attention_norm = RMSNorm(d, config.norm_eps)
        self.qkv = nn.Linear(d, 3 * d, bias=False)  # rows: q, k, v
        self.out = nn.Linear(d, d, bias=False)
        self.mlp_norm = RMSNorm(d, config.norm_eps)
        self.gate_up = nn.Linear(d, 2 * config.mlp_hidden, bias=False)  # rows: gate, up
        self.down = nn.Linear(config.mlp_hidden, d, bias=False)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, x, cos, sin, mask, cache: KVCache | None, index: int, start: int, tail: int | None
    ) -> Tensor:
        h = self.attention_norm(x)
        if tail is None:
            q, k, v = (self.split(t) for t in self.qkv(h).chunk(3, -1))
            q = rotate(q, cos, sin)
        else:
            d = x.shape[-1]
            k, v = (self.split(t) for t in F.linear(h, self.qkv.weight[d:]).chunk(2, -1))
            x, mask = x[:, -tail:], mask[:, :, -tail:]
            q = rotate(
                self.split(F.linear(h[:, -tail:], self.qkv.weight[:d])), cos[:, :, -tail:], sin[:, :, -tail:]
            )
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(index, start, k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(attended), self.dropout, self.training)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + F.dropout(self.down(F.silu(gate) * up), self.dropout, self.training)


class Backbone(nn.Module):
    """`forward` maps embeddings to final hidden states; tables and token heads are attributes.

    `token_heads=False` leaves text and vision heads out: continuous actions never need them.
    """

    def __init__(self, config: ModelConfig, token_heads: bool = True):
        super().__init__()
        self.config = config
        self.text_embedding = nn.Embedding(config.text_vocab, config.hidden)
        self.vision_embedding = nn.Embedding(config.vision_vocab, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.text_head = nn.Linear(config.hidden, config.text_vocab, bias=False) if token_heads else None
        self.vision_head = nn.Linear(config.hidden, config.vision_vocab, bias=False) if token_heads else None

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: KVCache | None = None,
        start: int = 0,
        tail: int | None = None,
    ) -> Tensor:
        """Embeddings x [B, T, hidden] -> normalised hidden states [B, T, hidden], or [B, tail, hidden].

        rotation: `rope(...)` of the T positions. mask: bool [B, 1, T, S], True where a query may look; S = T,
        or the cache's slots. Every query needs at least one True. With a cache, the T keys go to slots
        start.. .
        """
        cos, sin = rotation
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            x = layer(x, cos, sin, mask, cache, index, start, tail if last else None)
        return self.norm(x)
