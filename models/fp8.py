"""The backbone's large matrices in fp8 (e4m3): half the bytes to read, which is what a cached step costs.

Weights carry one scale an output channel, fixed when quantised; activations one a token, found as they come.
The product sums in fp32 and is scaled back: `torch._scaled_mm` on a GPU of compute capability 9.0 or later
(Hopper), elsewhere the same rounding emulated, for measuring accuracy (slow). Norms, tables, heads, attention
and everything between the matrices stay as they are.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.normalization import Normalizer

MAX = 448.0  # largest e4m3 number (OCP 8-bit floating point, 2023); above it the conversion gives NaN
MATRICES = ("qkv", "out", "gate_up", "down")
UNIT = 16  # the kernels take sizes in multiples of this


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> q e4m3 [..., K] and fp32 scale [..., 1] with x = q * scale nearly; zeros stay zeros."""
    scale = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=torch.float32)
    scale = scale.clamp(min=1e-12) / MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Module):
    """A bias-free linear layer with e4m3 weights. Raises ValueError for sizes the kernels do not take."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        if linear.bias is not None or linear.in_features % UNIT or linear.out_features % UNIT:
            size = f"{linear.in_features} -> {linear.out_features}"
            raise ValueError(f"fp8 needs sizes in multiples of {UNIT} and no bias, this layer is {size}")
        weight, scale = to_fp8(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)  # [N, K]
        self.register_buffer("scale", scale.squeeze(-1))  # [N]

    def forward(self, x: Tensor, part: slice = slice(None)) -> Tensor:
        """x [..., K] -> its output features `part`, [..., n], in x's dtype."""
        weight, scale = self.weight[part], self.scale[part]
        q, token_scale = to_fp8(x.flatten(0, -2))
        if x.is_cuda:
            y = torch._scaled_mm(
                q, weight.t(), token_scale, scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
            )
        else:
            y = (q.float() @ weight.float().t()) * token_scale * scale
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def supported(device: torch.device) -> bool:
    """Whether this device multiplies fp8 with row-wise scales; the CPU emulates it."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


@torch.no_grad()
def quantize(policy: nn.Module, progress: Callable[[int, int], None] | None = None) -> None:
    """Replace the backbone's matrices, in place and one at a time: never much more memory than before.

    `policy.to(dtype)` afterwards would undo it. `progress(done, total)` counts layers. Raises ValueError.
    """
    layers = policy.backbone.layers
    for done, layer in enumerate(layers, 1):
        for name in MATRICES:
            if isinstance(matrix := getattr(layer, name), nn.Linear):
                setattr(layer, name, Fp8Linear(matrix))
        if progress is not None:
            progress(done, len(layers))


def twin(policy: nn.Module) -> nn.Module:
    """A second module over the same tensors: quantising it leaves `policy` as it is."""
    return copy.deepcopy(policy, {id(p): p for p in (*policy.parameters(), *policy.buffers())})


@dataclass(frozen=True)
class ActionError:
    """How far approximate actions are from exact ones."""

    relative: float  # norm of the difference over norm of the exact actions, normalised units
    max_normalised: float
    rms_rad: float = 0.0  # of joints, un-normalised; 0 without a normaliser
    max_rad: float = 0.0


def action_error(exact: Tensor, approximate: Tensor, normalizer: Normalizer | None = None) -> ActionError:
    """Compare normalised actions [B, H, D] of two precisions of one policy, noise and all else equal."""
    difference = (approximate - exact).double().cpu()
    relative = (difference.norm() / exact.double().norm().cpu()).item()
    rad = np.zeros(1)
    if normalizer is not None:
        rad = (difference.numpy() * normalizer.scale)[..., ~normalizer.gripper]
    rms, highest = float(np.sqrt(np.square(rad).mean())), float(np.abs(rad).max())
    return ActionError(relative, difference.abs().max().item(), rms, highest)
