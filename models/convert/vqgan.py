"""LWM's VQGAN (flax names, kernels height x width x in x out) -> models.vqgan."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import parameter_shapes
from models.config import ModelConfigError, VQGANConfig
from models.convert import ConvertError
from models.convert.pickles import load
from models.vqgan import VQGAN

_RESNET = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
    "conv_shortcut": "Conv_2",
}
_HALF = {"conv_in": "Conv_0", "conv_norm_out": "GroupNorm_0", "conv_out": "Conv_1"}


def source_name(name: str) -> str:
    """The released name of one of our parameters."""
    if name == "quantize.embedding.weight":
        return "quantize/embeddings"
    module, _, leaf = name.rpartition(".")
    leaf = "bias" if leaf == "bias" else "scale" if "norm" in module.rpartition(".")[2] else "kernel"
    half, _, rest = module.partition(".")
    if found := re.fullmatch(r"mid_block\.resnets\.(\d+)\.(\w+)", rest):
        rest = f"MidBlock_0/ResnetBlock_{found[1]}/{_RESNET[found[2]]}"
    elif found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", rest):
        rest = f"{found[1].title()}samplingBlock_{found[2]}/ResnetBlock_{found[3]}/{_RESNET[found[4]]}"
    elif found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv", rest):
        rest = f"{found[1].title()}samplingBlock_{found[2]}/{found[1].title()}sample_0/Conv_0"
    elif rest:
        rest = _HALF[rest]
    return "/".join(part for part in (half, rest, leaf) if part)


def sizes(source: dict[str, np.ndarray], image_size: int) -> VQGANConfig:
    """Levels, channels and codebook, read off the tensors. Raises ConvertError."""

    def count(pattern: str) -> int:
        return len({m[1] for name in source if (m := re.match(pattern, name))})

    level = r"encoder/DownsamplingBlock_{}/"
    try:
        return VQGANConfig(
            image_size=image_size,
            channels=tuple(
                source[f"{level.format(i)}ResnetBlock_0/Conv_0/kernel"].shape[-1]
                for i in range(count(level.format(r"(\d+)")))
            ),
            blocks_per_level=count(level.format(0) + r"ResnetBlock_(\d+)/"),
            latent_channels=source["encoder/Conv_1/kernel"].shape[-1],
            codebook_size=source["quantize/embeddings"].shape[0],
            stem_channels=source["encoder/Conv_0/kernel"].shape[-1],
        )
    except KeyError as error:
        raise ConvertError(f"not LWM's VQGAN: {error} is missing") from error
    except (IndexError, ModelConfigError) as error:
        raise ConvertError(f"not LWM's VQGAN: {error}") from error


def read(path: Path | str, image_size: int = 256) -> tuple[VQGANConfig, dict[str, Tensor]]:
    """Sizes and parameters (fp32) of the released pickle. image_size: px, not in the file.

    Raises ConvertError when a tensor is unknown, missing or of another shape.
    """
    source = load(path)
    try:
        config = sizes(source, image_size)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error
    shapes = parameter_shapes(VQGAN, config)
    names = {name: source_name(name) for name in shapes}
    unknown, missing = sorted(set(source) - set(names.values())), sorted(set(names.values()) - set(source))
    if unknown or missing:
        raise ConvertError(f"{path}: unknown tensors {unknown}, missing tensors {missing}")
    out = {}
    for name, old in names.items():
        array = source[old]
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
        if array.shape != tuple(shapes[name]):
            raise ConvertError(f"{path}: {old} gives {list(array.shape)}, expected {list(shapes[name])}")
        out[name] = torch.from_numpy(np.array(array, np.float32, order="C"))
        if not out[name].isfinite().all():
            raise ConvertError(f"{path}: {old} holds NaN or infinite weights")
    return config, out
