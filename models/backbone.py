"""LLaMA (LWM-Chat-1M's shape): RMSNorm, half-rotation RoPE, SwiGLU, separate text and vision tables and
heads.

Notable: QKV and gate/up are one matrix each; the KV cache is two static buffers; masks and positions are
explicit arguments, so training, prefill and cached steps are the same `forward`; the last layer computes
queries, output and MLP only for the `tail` positions that are read; few, large element-wise operations, since
a cached step on a GPU is otherwise bound by their number; the matrices may be fp8 (models.fp8).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelConfig
from models.fp8 import Fp8Linear


def rope(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, head_dim / 2] fp32 for integer `positions` [B, T].

    rope_precision bf16 rounds angles, sines and cosines to bf16, as the official code does (its pinned numpy
    1.26 does not round the frequencies: bit for bit the same cosines at 7B sizes).
    """
    dtype = torch.bfloat16 if config.rope_precision == "bf16" else torch.float32
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float64)
    angle = positions[:, None, :, None] * config.rope_theta ** -(half / config.head_dim)
    angle = angle.to(dtype)
    return angle.cos().float(), angle.sin().float()


def turns(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [B, 1, T, head_dim] fp32 of an element and of its partner in `rotate`."""
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, own: Tensor, partner: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of x [B, heads, T, head_dim] by `turns(cos, sin)`; fp32 inside."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * own, torch.cat([b, a], -1), partner).to(x.dtype)


class KVCache:
    """Keys and values of every layer in `slots` fixed places: two buffers [layers, batch, heads, slots,
    head_dim].

    Zero-filled, so that masked slots are finite from the start. Slots before `first` are not looked at: who
    knows that every row masks them may say so, to save time.
    """

    def __init__(self, config: ModelConfig, batch: int, slots: int, device="cpu", dtype=torch.float32):
        shape = (config.layers, batch, config.heads, slots, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.first = 0

    @property
    def slots(self) -> int:
        return self.k.shape[3]

    def update(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, heads, T, head_dim] at slots start.., return slots first.. of these B rows."""
        batch, end = k.shape[0], start + k.shape[2]
        self.k[layer, :batch, :, start:end] = k
        self.v[layer, :batch, :, start:end] = v
        return self.k[layer, :batch, :, self.first :], self.v[layer, :batch, :, self.first :]

    def place(self, row: int, end: int, k: Tensor, v: Tensor) -> None:
        """Copy keys and values [layers, heads, T, head_dim] into the row's slots before `end`."""
        start = end - k.shape[2]
        self.k[:, row, :, start:end] = k
        self.v[:, row, :, start:end] = v


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rows(linear: nn.Linear | Fp8Linear, x: Tensor, part: slice) -> Tensor:
    """Only the output features `part` of a bias-free linear layer."""
    return linear(x, part) if isinstance(linear, Fp8Linear) else F.linear(x, linear.weight[part])


class VisionTable(nn.Embedding):
    """Ids of frames, each N codes and its end, -> embeddings.

    With `vision_positions: grid` each place in a frame adds a vector of its own: RoPE alone tells how far two
    tokens are apart in the sequence, and from that a small model is slow to learn where in a picture one is.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config.vision_vocab, config.hidden)
        grid = config.vision_positions == "grid"
        places = nn.Parameter(torch.zeros(config.frame_tokens + 1, config.hidden)) if grid else None
        self.register_parameter("places", places)

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """ids [B, n], the first at place `first` of a frame -> [B, n, hidden]."""
        x = super().forward(ids)
        if self.places is None:
            return x
        end = first + ids.shape[1]
        return x + self.places.repeat(-(-end // len(self.places)), 1)[first:end]


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d, self.dropout = config.hidden, config.dropout
        self.heads, self.head_dim = config.heads, config.head_dim
        self.attention_norm = RMSNorm(d, config.norm_eps)
        self.qkv = nn.Linear(d, 3 * d, bias=False)  # rows: q, k, v
        self.out = nn.Linear(d, d, bias=False)
        self.mlp_norm = RMSNorm(d, config.norm_eps)
        self.gate_up = nn.Linear(d, 2 * config.mlp_hidden, bias=False)  # rows: gate, up
        self.down = nn.Linear(config.mlp_hidden, d, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, n * hidden] -> [B, n * heads, T, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self, x, own, partner, mask, cache: KVCache | None, index: int, start: int, tail: int | None
    ) -> Tensor:
        h = self.attention_norm(x)
        if tail is None:
            q_k, v = self.split(self.qkv(h)).split((2 * self.heads, self.heads), 1)
            q, k = rotate(q_k, own, partner).chunk(2, 1)
        else:
            d, first = x.shape[-1], x.shape[1] - tail
            k, v = self.split(rows(self.qkv, h, slice(d, None))).chunk(2, 1)
            k = rotate(k, own, partner)
        if cache is not None:
            k, v = cache.update(index, start, k, v)
            mask = mask[..., -k.shape[2] :]
        if tail == 0:
            return x[:, :0]
        if tail is not None:
            x, mask = x[:, first:], mask[:, :, first:]
            q = self.split(rows(self.qkv, h[:, first:], slice(d)))
            q = rotate(q, own[:, :, first:], partner[:, :, first:])
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
        self.vision_embedding = VisionTable(config)
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
        start.. ; with tail = 0 that is all that is computed.
        """
        own, partner = turns(*rotation)
        if x.is_cuda:  # what the kernels take: else every layer converts it again
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            x = layer(x, own, partner, mask, cache, index, start, tail if last else None)
        return x if tail == 0 else self.norm(x)
