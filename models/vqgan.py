"""VQGAN frame tokenizer: image <-> grid of codebook indices. Frozen in the policy, trained here in "stage 0".

Layout and tensor names are those of `diffusers.VQModel` without attention, which reproduces LWM's VQGAN:
GroupNorm eps 1e-6, SiLU, downsampling pads bottom and right only, one more residual block a level in the
decoder. `set_encoder` makes encoding fast; choosing the code stays in the weights' precision.

Images are [B, 3, h, w] in [-1, 1] (`to_input` from uint8 RGB). Train with

    x = vqgan.to_input(frames)                       # frames uint8 [B, h, w, 3]
    out = vqgan(x)
    loss = (out.reconstruction - x).abs().mean() + out.loss
    vqgan.restart_codes(out.latents, out.codes)      # now and then: unused codes start again at seen latents
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import VQGANConfig


@dataclass
class Reconstruction:
    reconstruction: Tensor  # [B, 3, h, w], about [-1, 1]
    latents: Tensor  # [B, z, grid, grid], encoder output before quantisation
    codes: Tensor  # [B, grid * grid] int64
    loss: Tensor  # scalar: codebook + 0.25 commitment (van den Oord et al. 2017)


def _norm(channels: int, config: VQGANConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, config: VQGANConfig):
        super().__init__()
        self.norm1 = _norm(inputs, config)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(outputs, config)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution."""

    def __init__(self, inputs: int, outputs: int, blocks: int, config: VQGANConfig, **resample: nn.Module):
        super().__init__()
        widths = [inputs] + [outputs] * blocks
        self.resnets = nn.ModuleList(ResnetBlock(a, b, config) for a, b in pairwise(widths))
        self.resample = next(iter(resample), None)
        for name, module in resample.items():
            self.add_module(name, nn.ModuleList([module]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x if self.resample is None else getattr(self, self.resample)[0](x)


class Encoder(nn.Module):
    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths, last = config.channels, len(config.channels) - 1
        stem = config.stem_channels or widths[0]
        self.conv_in = nn.Conv2d(3, stem, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                widths[i - 1] if i else stem,
                width,
                config.blocks_per_level,
                config,
                **({"downsamplers": Downsample(width)} if i < last else {}),
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = Level(widths[-1], widths[-1], 2, config)
        self.conv_norm_out = _norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths, last = config.channels[::-1], len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Level(widths[0], widths[0], 2, config)
        self.up_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.blocks_per_level + 1,
                config,
                **({"upsamplers": Upsample(width)} if i < last else {}),
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = _norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Quantizer(nn.Module):
    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.latent_channels)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)


class VQGAN(nn.Module):
    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(z, z, 1)
        self.quantize = Quantizer(config)
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder = Decoder(config)

    def to_input(self, frames: Tensor) -> Tensor:
        """uint8 RGB [B, h, w, 3] -> [B, 3, h, w] in [-1, 1], in the encoder's dtype (LWM: x / 127.5 - 1)."""
        x = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
        return x.to(self.encoder.conv_in.weight.dtype)

    def set_encoder(self, dtype: torch.dtype) -> None:
        """How frames are encoded: in `dtype`, convolutions channels-last (faster on a CPU too); in place.

        bf16 changes 2 to 3 % of the codes, those near a tie; fp32 with TF32 products, torch's default for
        convolutions, a tenth of that.
        """
        self.encoder.to(dtype=dtype, memory_format=torch.channels_last)

    def latents(self, x: Tensor) -> Tensor:
        """Encoder output before quantisation, [B, z, grid, grid]."""
        return self.quant_conv(self.encoder(x).to(self.quant_conv.weight.dtype))

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest codebook vector (L2), row-major [B, grid * grid] int64."""
        z = latents.flatten(2).transpose(1, 2).float()  # [B, n, z]
        codebook = self.quantize.embedding.weight.float()
        # |z|^2 is the same for every code and left out
        return (codebook.square().sum(1) - 2 * z @ codebook.T).argmin(-1)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, h, w] in [-1, 1] -> codes [B, grid * grid] int64, row-major."""
        return self.nearest(self.latents(x))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, grid * grid] -> codebook vectors [B, z, grid, grid]."""
        grid = self.config.grid
        return self.quantize.embedding(codes).transpose(1, 2).unflatten(2, (grid, grid))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, grid * grid] -> image [B, 3, h, w], about [-1, 1] (clip before use)."""
        return self.decoder(self.post_quant_conv(self.lookup(codes)))

    def forward(self, x: Tensor) -> Reconstruction:
        """Straight-through reconstruction and quantisation losses, for training."""
        latents = self.latents(x)
        codes = self.nearest(latents.detach())
        quantized = self.lookup(codes)
        loss = F.mse_loss(quantized, latents.detach()) + 0.25 * F.mse_loss(latents, quantized.detach())
        straight_through = latents + (quantized - latents).detach()
        return Reconstruction(self.decoder(self.post_quant_conv(straight_through)), latents, codes, loss)

    @torch.no_grad()
    def restart_codes(self, latents: Tensor, codes: Tensor, generator: torch.Generator | None = None) -> int:
        """Move every codebook vector that `codes` never uses onto a random one of `latents` [B, z, g, g].

        Returns how many moved. A codebook left to itself collapses onto few codes.
        """
        used = torch.bincount(codes.flatten(), minlength=self.config.codebook_size) > 0
        unused = (~used).nonzero().squeeze(1)
        vectors = latents.detach().flatten(2).transpose(1, 2).flatten(0, 1)
        pick = torch.randint(len(vectors), (len(unused),), generator=generator, device="cpu").to(
            vectors.device
        )
        self.quantize.embedding.weight[unused] = vectors[pick].to(self.quantize.embedding.weight.dtype)
        return len(unused)
