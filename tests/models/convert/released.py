"""Writes small random files in the released byte formats: a writer of its own, from the formats' description.

Weights are numpy arrays under the source's names; bf16 is spelled as uint16 bit patterns.
"""

import pickle
from pathlib import Path

import msgpack
import numpy as np

GIB = 1 << 30


def bf16(x: np.ndarray) -> np.ndarray:
    """fp32 -> bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    """Bits of bf16 -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _ext(array: np.ndarray) -> msgpack.ExtType:
    name = "bfloat16" if array.dtype == np.uint16 else array.dtype.name
    return msgpack.ExtType(1, msgpack.packb((array.shape, name, array.tobytes())))


def serialise(array: np.ndarray, chunk_bytes: int = GIB) -> bytes:
    """flax.serialization.to_bytes of one array: cut into flat chunks above `chunk_bytes`."""
    if array.nbytes <= chunk_bytes:
        return msgpack.packb(_ext(array), strict_types=True)
    flat, size = array.reshape(-1), max(1, chunk_bytes // array.itemsize)
    chunks = [flat[i : i + size] for i in range(0, flat.size, size)]
    return msgpack.packb(
        {
            "__msgpack_chunked_array__": True,
            "shape": {str(i): n for i, n in enumerate(array.shape)},
            "chunks": {str(i): _ext(chunk) for i, chunk in enumerate(chunks)},
        }
    )


def write_stream(path: Path, arrays: dict[str, np.ndarray], chunk_bytes: int = GIB, prefix: str = "") -> Path:
    packer = msgpack.Packer()
    with path.open("wb") as file:
        for name, array in arrays.items():
            key = tuple((prefix + name).split("/"))
            file.write(packer.pack((key, serialise(array, chunk_bytes))))
    return path


def train_state(path: Path, arrays: dict[str, np.ndarray], chunk_bytes: int = GIB) -> Path:
    """The official script's `streaming_train_state`: step, weights, and an optimiser's moments of each."""
    packer = msgpack.Packer()
    with path.open("wb") as file:
        entries = {("step",): np.array(7, np.int32)}
        entries |= {("params", "params", *name.split("/")): value for name, value in arrays.items()}
        entries[("opt_state", "0", "count")] = np.array(7, np.int32)
        for moment in ("mu", "nu"):
            for name, value in arrays.items():
                entries[("opt_state", "0", moment, "params", *name.split("/"))] = np.zeros_like(value)
        for key, value in entries.items():
            file.write(packer.pack((key, serialise(value, chunk_bytes))))
    return path


def llama(
    rng: np.random.Generator,
    hidden: int = 64,
    mlp: int = 128,
    layers: int = 3,
    text: int = 512,
    vision: int = 320,
    latent: int | None = None,
    actions: int | None = None,
) -> dict[str, np.ndarray]:
    """Weights under the source's names, fp32. latent: rows of `late`; actions: D of the flow heads."""

    def normal(*shape: int, scale: float | None = None) -> np.ndarray:
        return (rng.standard_normal(shape) * (scale or shape[-2] ** -0.5)).astype(np.float32)

    def around_one(*shape: int) -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(shape)).astype(np.float32)

    stack = "transformer/h/scan_decoder"
    out = {
        "transformer/wte/embedding": normal(text, hidden, scale=1.0),
        "transformer/vte/embedding": normal(vision, hidden, scale=1.0),
        f"{stack}/attention_norm/kernel": around_one(layers, hidden),
        f"{stack}/ffn_norm/kernel": around_one(layers, hidden),
        **{f"{stack}/attention/w{n}/kernel": normal(layers, hidden, hidden) for n in "qkvo"},
        f"{stack}/feed_forward/w1/kernel": normal(layers, hidden, mlp),
        f"{stack}/feed_forward/w2/kernel": normal(layers, mlp, hidden),
        f"{stack}/feed_forward/w3/kernel": normal(layers, hidden, mlp),
        "transformer/ln_f/kernel": around_one(hidden),
        "lm_head/kernel": normal(hidden, text),
        "vision_head/kernel": normal(hidden, vision),
    }
    if latent is not None:
        out["transformer/late/embedding"] = normal(latent, hidden, scale=1.0)
        out["latent_actions_head/kernel"] = normal(hidden, latent)
    if actions is not None:
        sizes = {1: (actions, hidden // 2), 2: (hidden, hidden), 3: (hidden, hidden)}
        for i, (a, b) in sizes.items():
            out[f"transformer/action_encoder/linear_{i}/kernel"] = normal(a, b)
            out[f"transformer/action_encoder/linear_{i}/bias"] = normal(b, 1)[:, 0] * 0.1
        out["action_head/kernel"] = normal(hidden, actions)
        out["action_head/bias"] = normal(actions, 1)[:, 0] * 0.1
    return out


def vqgan(
    rng: np.random.Generator, channels=(64, 32, 32), blocks: int = 2, stem: int = 32, z: int = 16, codes=256
) -> dict:
    """A nested dict as LWM pickles it: kernels height x width x in x out."""

    def conv(a: int, b: int, size: int = 3) -> dict:
        kernel = rng.standard_normal((size, size, a, b)) * (a * size * size) ** -0.5
        return {"kernel": kernel.astype(np.float32), "bias": np.zeros(b, np.float32)}

    def norm(a: int) -> dict:
        return {"scale": np.ones(a, np.float32), "bias": np.zeros(a, np.float32)}

    def resnet(a: int, b: int) -> dict:
        out = {"GroupNorm_0": norm(a), "Conv_0": conv(a, b), "GroupNorm_1": norm(b), "Conv_1": conv(b, b)}
        return out | ({"Conv_2": conv(a, b, 1)} if a != b else {})

    def half(widths: tuple[int, ...], first: int, count: int, name: str, change: str) -> dict:
        levels, width = {}, first
        for i, level in enumerate(widths):
            levels[f"{name}_{i}"] = {
                f"ResnetBlock_{j}": resnet(width if j == 0 else level, level) for j in range(count)
            }
            if i < len(widths) - 1:
                levels[f"{name}_{i}"][change] = {"Conv_0": conv(level, level)}
            width = level
        return levels

    last = channels[-1]
    middle = {"MidBlock_0": {f"ResnetBlock_{j}": resnet(last, last) for j in range(2)}}
    return {
        "encoder": half(channels, stem, blocks, "DownsamplingBlock", "Downsample_0")
        | middle
        | {"Conv_0": conv(3, stem), "GroupNorm_0": norm(last), "Conv_1": conv(last, z)},
        "decoder": half(channels[::-1], last, blocks + 1, "UpsamplingBlock", "Upsample_0")
        | middle
        | {"Conv_0": conv(z, last), "GroupNorm_0": norm(channels[0]), "Conv_1": conv(channels[0], 3)},
        "quantize": {"embeddings": rng.uniform(-1, 1, (codes, z)).astype(np.float32)},
        "quant_conv": conv(z, z, 1),
        "post_quant_conv": conv(z, z, 1),
    }


def write_vqgan(path: Path, tree: dict) -> Path:
    path.write_bytes(pickle.dumps(tree))
    return path
