"""How much GPU memory an engine needs, before anything is loaded."""

import functools

import torch

from models.config import ModelConfig
from models.folder import CheckpointError
from models.fp8 import MATRICES
from models.policy import ALIGNED, Policy
from models.vqgan import VQGAN

CACHED_TASKS = 16  # prompts whose keys and values an engine keeps
FRAMES_PER_ROW = 2  # prefetched frames it keeps, for each row of a full batch
BRIDGE_TOKENS = 16  # text after the frames, generously
RESERVE = 512 << 20  # workspaces of CUDA's libraries and the graphs themselves
GIB = 2**30


@functools.cache
def _weights(config: ModelConfig) -> tuple[int, int, int]:
    """Number of weights of the policy as served, of those in its large matrices, and of the VQGAN."""
    with torch.device("meta"):
        policy, vqgan = Policy(config, serving=True), VQGAN(config.vqgan)
    sizes = {name: p.numel() for name, p in policy.named_parameters()}
    matrices = sum(n for name, n in sizes.items() if name.split(".")[-2] in MATRICES)
    return sum(sizes.values()), matrices, sum(p.numel() for p in vqgan.parameters())


def estimate(
    config: ModelConfig, dtype: torch.dtype, quantization: str, max_batch: int, vqgan_bytes: int = 4
) -> dict[str, int]:
    """Bytes by use, as `Engine.memory` has them, and `peak`: the most at any time, loading included."""
    width, d = dtype.itemsize, config.hidden
    policy, matrices, vqgan = _weights(config)
    loaded = weights = width * policy + vqgan_bytes * vqgan
    if quantization == "fp8":
        weights -= (width - 1) * matrices
        loaded += 5 * 2 * d * config.mlp_hidden  # the largest matrix on its way: fp32 and fp8

    tokens = config.vision_tokens + BRIDGE_TOKENS + config.horizon
    if config.action_heads == "ar":
        tokens += config.horizon * config.action_dim
    slots = config.max_text_tokens + tokens + ALIGNED
    token = 2 * config.layers * d * width  # keys and values
    kept = CACHED_TASKS * config.max_text_tokens + FRAMES_PER_ROW * max_batch * (config.frame_tokens + 1)
    # widest moment of a layer: what its matrices read and write, rotation in fp32
    prefill = max_batch * tokens * (width * (10 * d + 4 * config.mlp_hidden) + 24 * d)
    # widest moment of the encoder: about eight maps of its first level
    encode = max_batch * 2 * 8 * width * config.vqgan.image_size**2 * config.vqgan.channels[0]
    out = {
        "weights": weights,
        "cache": max_batch * slots * token,
        "buffers": kept * token,
        "graphs": max(prefill, encode) + RESERVE,
    }
    return out | {"peak": max(loaded, sum(out.values()))}


def require(free: int, config: ModelConfig, dtype: torch.dtype, quantization: str, max_batch: int) -> None:
    """Raises CheckpointError unless `free` bytes are enough; it says how many are missing and what fits."""
    needed = estimate(config, dtype, quantization, max_batch)["peak"]
    if needed <= free:
        return
    smaller = [n for n in (8, 4, 2, 1) if n < max_batch]
    options = [("fp8", max_batch), *((quantization, n) for n in smaller), *(("fp8", n) for n in smaller)]
    fits = []
    for kind, rows in options:
        if (kind, rows) != (quantization, max_batch) and estimate(config, dtype, kind, rows)["peak"] <= free:
            changes = [f"quantization: {kind}"] if kind != quantization else []
            changes += [f"max_batch: {rows}"] if rows != max_batch else []
            fits.append(" with ".join(changes))
    advice = f"What fits: {' or '.join(fits[:2])}" if fits else "No option fits: free the GPU or use another"
    raise CheckpointError(
        f"{config.name} at max_batch {max_batch} needs {needed / GIB:.1f} GiB of GPU memory, "
        f"{free / GIB:.1f} GiB are free, {(needed - free) / GIB:.1f} GiB are missing. {advice}"
    )
