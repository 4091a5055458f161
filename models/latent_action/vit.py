"""DINOv2 with registers (Oquab et al. 2023, Darcet et al. 2024): the patch features of single frames.

ViT with pre-norm blocks, layer scale, class and register tokens. `load_vit` reads the authors' file
(`dinov2_vitb14_reg4_pretrain.pth`) or Hugging Face's folder (`facebook/dinov2-with-registers-base`).
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.latent_action.config import LatentActionConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in [0, 1]


class WeightsError(ValueError):
    """A file of weights is missing, damaged or does not fit; the message names the file and tensor."""


class VitBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.scale2 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.out(attended)
        return x + self.scale2 * self.down(F.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, config: LatentActionConfig):
        super().__init__()
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.registers = nn.Parameter(torch.randn(1, config.registers, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + config.grid**2, width) * 0.02)  # class, then patches
        self.blocks = nn.ModuleList(VitBlock(width, config.vit_heads) for _ in range(config.vit_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, frames: Tensor) -> Tensor:
        """RGB in [0, 1] [n, 3, h, w] -> normalised patch features [n, grid * grid, width], row-major."""
        mean, std = (frames.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        x = self.patch_embed((frames - mean) / std).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        registers = self.registers.expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1 + registers.shape[1] :])


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1, 1 + m * m, width] for another patch grid, as DINOv2 does with registers:
    bicubic with antialiasing, fp32.
    """
    old = round((positions.shape[1] - 1) ** 0.5)
    if old == grid:
        return positions
    table = positions[:, 1:].float().transpose(1, 2).unflatten(2, (old, old))
    table = F.interpolate(table, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1].float(), table.flatten(2).transpose(1, 2)], 1)


_OFFICIAL = (  # the authors' names -> ours
    (r"^cls_token$", "class_token"),
    (r"^register_tokens$", "registers"),
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"\.attn\.qkv\.", ".qkv."),
    (r"\.attn\.proj\.", ".out."),
    (r"\.mlp\.fc1\.", ".up."),
    (r"\.mlp\.fc2\.", ".down."),
    (r"\.ls([12])\.gamma$", r".scale\1"),
)
_HUGGING_FACE = (
    (r"^embeddings\.cls_token$", "class_token"),
    (r"^embeddings\.register_tokens$", "registers"),
    (r"^embeddings\.position_embeddings$", "positions"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed."),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".\1."),
    (r"\.attention\.output\.dense\.", ".out."),
    (r"\.mlp\.fc1\.", ".up."),
    (r"\.mlp\.fc2\.", ".down."),
    (r"\.layer_scale([12])\.lambda1$", r".scale\1"),
    (r"^layernorm\.", "norm."),
)


def rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def official_name(name: str) -> str:
    """Our name of a tensor that the DINOv2 authors' code calls `name`."""
    return rename(name, _OFFICIAL)


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, a folder that holds model.safetensors, or a PyTorch file (unpickled
    with weights_only). Raises WeightsError.
    """
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise WeightsError(f"{path} does not exist: give the local path of the weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a readable file of weights: {error}") from error
    except Exception as error:  # pickle.UnpicklingError and its kin
        raise WeightsError(f"{path} is refused, it holds more than tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise WeightsError(f"{path} is not a map of names to tensors")
    return tensors


@torch.no_grad()
def load_vit(vit: Vit, path: Path | str) -> None:
    """Fill `vit` with DINOv2's weights, position embeddings resized to its grid. Raises WeightsError."""
    source = read_weights(path)
    rules = _HUGGING_FACE if "embeddings.cls_token" in source else _OFFICIAL
    source = {rename(name, rules): tensor for name, tensor in source.items()}
    source.pop("mask_token", None)
    for name in [name for name in source if ".query." in name]:
        parts = [source.pop(name.replace(".query.", f".{part}."), None) for part in ("query", "key", "value")]
        if any(part is None for part in parts):
            raise WeightsError(f"{path}: key or value beside {name} is missing")
        source[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    if "positions" in source:
        grid = round((vit.positions.shape[1] - 1) ** 0.5)
        source["positions"] = resize_positions(source["positions"], grid)
    wanted = dict(vit.named_parameters())
    unknown, missing = sorted(set(source) - set(wanted)), sorted(set(wanted) - set(source))
    if unknown or missing:
        raise WeightsError(f"{path} is not this ViT: unknown {unknown[:4]}, missing {missing[:4]}")
    for name, parameter in wanted.items():
        if source[name].shape != parameter.shape:
            raise WeightsError(
                f"{path}: {name} is {list(source[name].shape)}, the model needs {list(parameter.shape)}"
            )
        parameter.copy_(source[name])
