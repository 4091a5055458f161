"""What ViPRA adds to the video-language model: tables and heads for latent actions and for actions.

Actions are continuous (ViPRA-FM: noisy-action encoder, flow head) or discrete (ViPRA-AR: table, head).

Paper appendices C and D; where released weights differ from the paper, `ModelConfig` says which is meant.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelConfig


def time_embedding(s: Tensor, width: int, kind: str) -> Tensor:
    """Flow time s [B] -> [B, width] fp32 = [sin | cos].

    official: angle = s * 1e4^(-i / (n - 1)), n = width / 2 (no 2 pi). periods: angle = 2 pi s / period,
    periods geometric from 4e-3 to 4.
    """
    ramp = torch.arange(width // 2, device=s.device, dtype=torch.float32) / max(width // 2 - 1, 1)
    if kind == "official":
        frequency = torch.exp(-math.log(1e4) * ramp)
    else:
        frequency = 2 * math.pi / (4e-3 * torch.exp(math.log(4 / 4e-3) * ramp))
    angle = s.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)


class ActionEncoder(nn.Module):
    """E_gamma(x_s, s): noisy actions and flow time -> embeddings at the action positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        half, d = config.hidden // 2, config.hidden
        self.half, self.kind, self.dropout = half, config.time_embedding, config.dropout
        self.activation = F.silu if config.activation == "silu" else F.gelu
        self.linear_1 = nn.Linear(config.action_dim, half)
        self.linear_2 = nn.Linear(d, d)  # input: time, then action
        self.linear_3 = nn.Linear(d, d)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """x [B, H, D], s [B] in [0, 1] -> [B, H, hidden]."""
        dtype = self.linear_1.weight.dtype
        action = self.linear_1(x.to(dtype))
        time = time_embedding(s, self.half, self.kind).to(dtype)[:, None].expand_as(action)
        h = self.activation(self.linear_2(torch.cat([time, action], -1)))
        return self.linear_3(F.dropout(h, self.dropout, self.training))


class LatentHead(nn.Module):
    """H_psi: hidden states -> logits over K codes and the end of a step."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, out = config.hidden, config.latent_codes + 1
        if config.latent_head == "linear":
            self.layers = nn.Sequential(nn.Linear(d, out, bias=False))
        else:
            self.layers = nn.Sequential(nn.Linear(d, d // 2), nn.GELU(), nn.Linear(d // 2, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def latent_embedding(config: ModelConfig) -> nn.Embedding:
    """E_phi: table of K latent codes and the id that closes a step."""
    return nn.Embedding(config.latent_codes + 1, config.hidden)


def flow_head(config: ModelConfig) -> nn.Linear:
    """H_eta: hidden state at an action position -> that action's flow (read unshifted)."""
    return nn.Linear(config.hidden, config.action_dim)


def action_embedding(config: ModelConfig) -> nn.Embedding:
    """Table of a discrete action's codes, shared by all dimensions, and the id that ends an action."""
    return nn.Embedding(config.action_vocab, config.hidden)


def action_code_head(config: ModelConfig) -> nn.Linear:
    """Hidden state -> logits over the next code of a discrete action, or its end."""
    return nn.Linear(config.hidden, config.action_vocab, bias=False)
