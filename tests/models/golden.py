"""Reads the released byte formats of `shared/data/golden` into our modules: loaders for these tests only."""

import json
import pickle
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "data" / "golden"


def folder(name: str) -> Path:
    """A folder of golden data, or skip."""
    path = GOLDEN / name
    if not path.is_dir():
        pytest.skip(f"no golden data at {path}")
    return path


class NumpyUnpickler(pickle.Unpickler):
    """Plain containers and numpy arrays; any other class is refused."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "scalar"})

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"refused {module}.{name}")


def flatten(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    out = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def vqgan_state(path: Path, levels: int, blocks: int) -> dict[str, torch.Tensor]:
    """LWM's VQGAN (flax names, HWIO kernels) -> our names."""
    with path.open("rb") as file:
        source = flatten(NumpyUnpickler(file).load())
    out = {"quantize.embedding.weight": torch.from_numpy(source.pop("quantize/embeddings"))}

    def take(old: str, new: str) -> None:
        for a, b in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
            if (array := source.pop(f"{old}/{a}", None)) is not None:
                array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
                out[f"{new}.{b}"] = torch.from_numpy(np.ascontiguousarray(array))

    def resnet(old: str, new: str) -> None:
        names = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "GroupNorm_1": "norm2", "Conv_1": "conv2"}
        for a, b in (names | {"Conv_2": "conv_shortcut"}).items():
            take(f"{old}/{a}", f"{new}.{b}")

    for half, old_level, new_level, resample, count in (
        ("encoder", "DownsamplingBlock", "down_blocks", ("Downsample_0", "downsamplers"), blocks),
        ("decoder", "UpsamplingBlock", "up_blocks", ("Upsample_0", "upsamplers"), blocks + 1),
    ):
        for name, new in (("Conv_0", "conv_in"), ("GroupNorm_0", "conv_norm_out"), ("Conv_1", "conv_out")):
            take(f"{half}/{name}", f"{half}.{new}")
        for j in range(2):
            resnet(f"{half}/MidBlock_0/ResnetBlock_{j}", f"{half}.mid_block.resnets.{j}")
        for i in range(levels):
            for j in range(count):
                resnet(f"{half}/{old_level}_{i}/ResnetBlock_{j}", f"{half}.{new_level}.{i}.resnets.{j}")
            take(
                f"{half}/{old_level}_{i}/{resample[0]}/Conv_0", f"{half}.{new_level}.{i}.{resample[1]}.0.conv"
            )
    take("quant_conv", "quant_conv")
    take("post_quant_conv", "post_quant_conv")
    assert not source, f"left over: {sorted(source)}"
    return out


def _array(code: int, data: bytes) -> np.ndarray:
    assert code == 1
    shape, dtype, raw = msgpack.unpackb(data, raw=False)
    if dtype == "bfloat16":
        bits = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    return np.frombuffer(raw, dtype).reshape(shape)


def streaming(path: Path) -> dict[str, np.ndarray]:
    """A msgpack stream of (key tuple, flax-serialised array), fp32."""
    out = {}
    with path.open("rb") as file:
        for key, value in msgpack.Unpacker(file, raw=False, use_list=False, max_buffer_size=2**30):
            out["/".join(key)] = msgpack.unpackb(value, ext_hook=_array, raw=False)
    return out


def half_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection [heads * n, in] from interleaved pairs (2i, 2i + 1) to halves (i, i + n / 2)."""
    rows = weight.reshape(heads, -1, 2, weight.shape[-1])
    return rows.transpose(0, 2, 1, 3).reshape(weight.shape)


def backbone_state(source: dict[str, np.ndarray], heads: int) -> dict[str, torch.Tensor]:
    """LWM's LLaMA (kernels [in, out], leading layer axis, interleaved RoPE) -> our names."""
    source = dict(source)
    out = {
        "text_embedding.weight": source.pop("transformer/wte/embedding"),
        "vision_embedding.weight": source.pop("transformer/vte/embedding"),
        "norm.weight": source.pop("transformer/ln_f/kernel"),
        "text_head.weight": source.pop("lm_head/kernel").T,
        "vision_head.weight": source.pop("vision_head/kernel").T,
    }
    prefix = "transformer/h/scan_decoder/"
    layer = {key.removeprefix(prefix): source.pop(key) for key in sorted(source) if key.startswith(prefix)}
    assert not source, f"left over: {sorted(source)}"
    for i in range(len(layer["attention_norm/kernel"])):
        q, k, v, o = (layer[f"attention/w{name}/kernel"][i].T for name in "qkvo")
        gate, down, up = (layer[f"feed_forward/w{n}/kernel"][i].T for n in (1, 2, 3))
        out |= {
            f"layers.{i}.attention_norm.weight": layer["attention_norm/kernel"][i],
            f"layers.{i}.mlp_norm.weight": layer["ffn_norm/kernel"][i],
            f"layers.{i}.qkv.weight": np.concatenate([half_rope(q, heads), half_rope(k, heads), v]),
            f"layers.{i}.out.weight": o,
            f"layers.{i}.gate_up.weight": np.concatenate([gate, up]),
            f"layers.{i}.down.weight": down,
        }
    return {name: torch.from_numpy(np.array(value, np.float32)) for name, value in out.items()}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
