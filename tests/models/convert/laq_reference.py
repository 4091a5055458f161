"""The released latent action model by its own names and conventions, in plain numpy: for tests only.

`weights` makes a small random set of tensors with every name of a released file; `encode` and `decode`
compute what that file means, in float64, without any of our modules.
"""

import numpy as np
from PIL import Image
from scipy.special import erf

SIZES = {
    "dim": 128,  # two DINOv2 heads of 64
    "heads": 3,
    "dim_head": 8,
    "quant_dim": 6,
    "codes": 8,
    "patch": 2,
    "image": 32,
    "vit_layers": 2,
    "registers": 4,
    "pretrained_grid": 18,
    "enc_depth": 2,
    "dec_depth": 2,
}
GRID = SIZES["image"] // SIZES["patch"]
Weights = dict[str, np.ndarray]


def weights(seed: int = 0) -> Weights:
    """float32 tensors by upstream's names, in a file's order of modules."""
    s, rng, out = SIZES, np.random.default_rng(seed), {}
    dim, inner, attention = s["dim"], int(4.0 * (2 / 3) * s["dim"]), s["heads"] * s["dim_head"]

    def put(name: str, *shape: int, scale: float | None = None, mean: float = 0.0) -> None:
        scale = (np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.2) if scale is None else scale
        out[name] = (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        put(f"{name}.weight", outputs, inputs)
        if bias:
            put(f"{name}.bias", outputs)

    def gain(name: str) -> None:
        put(f"{name}.gamma", dim, mean=1.0)
        out[f"{name}.beta"] = np.zeros(dim, np.float32)

    def norm(name: str) -> None:
        put(f"{name}.weight", dim, mean=1.0)
        put(f"{name}.bias", dim)

    def feed_forward(name: str) -> None:
        gain(f"{name}.0")
        linear(f"{name}.1", dim, 2 * inner, bias=False)
        linear(f"{name}.4", inner, dim, bias=False)

    for side in ("enc", "dec"):
        for index, sizes in (("0", (2, dim)), ("2", (dim, dim)), ("4", (dim, s["heads"]))):
            linear(f"{side}_spatial_rel_pos_bias.net.{index}", *sizes)
    vit = "enc_spatial_transformer.model"
    put(f"{vit}.cls_token", 1, 1, dim)
    put(f"{vit}.pos_embed", 1, 1 + s["pretrained_grid"] ** 2, dim, scale=0.5)
    put(f"{vit}.register_tokens", 1, s["registers"], dim)
    put(f"{vit}.mask_token", 1, dim)
    put(f"{vit}.patch_embed.proj.weight", dim, 3, s["patch"], s["patch"])
    put(f"{vit}.patch_embed.proj.bias", dim)
    for i in range(s["vit_layers"]):
        block = f"{vit}.blocks.{i}"
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", dim, 3 * dim)
        linear(f"{block}.attn.proj", dim, dim)
        put(f"{block}.ls1.gamma", dim, mean=0.5)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", dim, 4 * dim)
        linear(f"{block}.mlp.fc2", 4 * dim, dim)
        put(f"{block}.ls2.gamma", dim, mean=0.5)
    norm(f"{vit}.norm")
    for name, depth in (("enc_st_transformer", s["enc_depth"]), ("dec_transformer", s["dec_depth"])):
        for i in range(depth):
            layer = f"{name}.layers.{i}"
            if name == "dec_transformer":
                linear(f"{layer}.0.to_alpha_beta", dim, 2 * dim)
                linear(f"{layer}.0.ffn.0", dim, 4 * dim)
                linear(f"{layer}.0.ffn.2", 4 * dim, dim)
            put(f"{layer}.1.dsconv.weight", dim, 1, 3, 3, 3)
            put(f"{layer}.1.dsconv.bias", dim)
            for index in ("2", "3"):
                put(f"{layer}.{index}.q_scale", s["dim_head"], mean=1.0)
                put(f"{layer}.{index}.k_scale", s["dim_head"], mean=1.0)
                gain(f"{layer}.{index}.norm")
                gain(f"{layer}.{index}.context_norm")
                linear(f"{layer}.{index}.to_q", dim, attention, bias=False)
                linear(f"{layer}.{index}.to_kv", dim, 2 * attention, bias=False)
                linear(f"{layer}.{index}.to_out", attention, dim, bias=False)
            feed_forward(f"{layer}.4")
        gain(f"{name}.norm_out")
    linear("vq_project_in", dim, s["quant_dim"])
    for index in ("0", "2"):
        put(f"vq_encoder.{index}.weight", s["quant_dim"], s["quant_dim"], 3, 3, 3)
        put(f"vq_encoder.{index}.bias", s["quant_dim"])
    put("vq.codebooks", s["codes"], s["quant_dim"], scale=0.5)
    out["vq.codebooks_used"] = np.arange(s["codes"])
    linear("vq_to_cond.1", 16 * s["quant_dim"], dim)
    feed_forward("vq_to_cond.2")
    put("dec_patchify.proj.weight", dim, 3, s["patch"], s["patch"])
    put("dec_patchify.proj.bias", dim)
    norm("dec_patchify.norm")
    linear("fusion_layer.0", 2 * dim, 2 * inner)
    linear("fusion_layer.2", 2 * inner, dim)
    linear("to_pixels.0", dim, 3 * s["patch"] ** 2)
    return out


def _linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T.astype(np.float64) + w.get(f"{name}.bias", np.zeros(1))


def _standardise(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def _norm(w: Weights, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    return _standardise(x, eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _gain(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return _standardise(x, 1e-5) * w[f"{name}.gamma"] + w[f"{name}.beta"]


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def _leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.1 * x)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _patches(w: Weights, name: str, frames: np.ndarray) -> np.ndarray:
    """A convolution whose stride is its kernel: frames [n, 3, s, s] -> [n, grid * grid, dim]."""
    n, p = len(frames), SIZES["patch"]
    x = frames.reshape(n, 3, GRID, p, GRID, p).transpose(0, 2, 4, 1, 3, 5).reshape(n, GRID * GRID, -1)
    return x @ w[f"{name}.weight"].reshape(SIZES["dim"], -1).T.astype(np.float64) + w[f"{name}.bias"]


def _conv3d(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, stride: int, front: int) -> np.ndarray:
    """x [channels, T, h, w]; kernel [out, in or 1 (depthwise), 3, 3, 3]; `front` frames of padding before,
    the rest of two after.
    """
    channels, frames, height, width = x.shape
    x = np.pad(x, ((0, 0), (front, 2 - front), (1, 1), (1, 1)))
    out = np.zeros((len(kernel), frames, height // stride, width // stride)) + bias[:, None, None, None]
    for dt in range(3):
        for dy in range(3):
            for dx in range(3):
                part = x[:, dt : dt + frames, dy : dy + height : stride, dx : dx + width : stride]
                tap = kernel[:, :, dt, dy, dx].astype(np.float64)
                out += (
                    tap[:, :, None, None] * part
                    if tap.shape[1] == 1 < channels
                    else np.einsum("oi,ithw->othw", tap, part)
                )
    return out


def _dino(w: Weights, frames: np.ndarray) -> np.ndarray:
    vit, s = "enc_spatial_transformer.model", SIZES
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = _patches(w, f"{vit}.patch_embed.proj", (frames - mean[:, None, None]) / std[:, None, None])
    table = w[f"{vit}.pos_embed"][0, 1:].reshape(s["pretrained_grid"], s["pretrained_grid"], -1)
    resized = [  # bicubic with antialiasing: Pillow's resize is just that
        np.asarray(Image.fromarray(table[:, :, i]).resize((GRID, GRID), Image.Resampling.BICUBIC))
        for i in range(s["dim"])
    ]
    x = x + np.stack(resized, -1).reshape(GRID * GRID, -1)
    n, first = len(x), w[f"{vit}.cls_token"][0] + w[f"{vit}.pos_embed"][0, :1]
    rows = np.concatenate([first, w[f"{vit}.register_tokens"][0]])
    x = np.concatenate([np.broadcast_to(rows, (n, *rows.shape)), x], 1)
    for i in range(s["vit_layers"]):
        block = f"{vit}.blocks.{i}"
        qkv = _linear(w, f"{block}.attn.qkv", _norm(w, f"{block}.norm1", x, 1e-6))
        q, k, v = qkv.reshape(n, -1, 3, s["dim"] // 64, 64).transpose(2, 0, 3, 1, 4)
        attended = (_softmax(q @ k.transpose(0, 1, 3, 2) / 8) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + w[f"{block}.ls1.gamma"] * _linear(w, f"{block}.attn.proj", attended)
        hidden = _gelu(_linear(w, f"{block}.mlp.fc1", _norm(w, f"{block}.norm2", x, 1e-6)))
        x = x + w[f"{block}.ls2.gamma"] * _linear(w, f"{block}.mlp.fc2", hidden)
    return _norm(w, f"{vit}.norm", x, 1e-6)[:, 1 + s["registers"] :]


def _position_bias(w: Weights, name: str) -> np.ndarray:
    """[heads, grid^2, grid^2], pair by pair."""
    axis = (np.arange(GRID) + 0.5) / GRID
    place = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    offset = place[:, None] - place[None]
    x = np.sign(offset) * np.log1p(np.abs(offset))
    x = _leaky(_linear(w, f"{name}.net.0", x))
    return _linear(w, f"{name}.net.4", _leaky(_linear(w, f"{name}.net.2", x))).transpose(2, 0, 1)


def _attention(
    w: Weights, name: str, x: np.ndarray, bias: np.ndarray | float, rotary: bool, causal: bool
) -> np.ndarray:
    """x [b, n, dim]. Keys and values come from x before its norm."""
    heads, size, n = SIZES["heads"], SIZES["dim_head"], x.shape[1]
    q = _linear(w, f"{name}.to_q", _gain(w, f"{name}.norm", x))
    k, v = np.split(_linear(w, f"{name}.to_kv", x), 2, -1)
    q, k, v = (a.reshape(len(x), n, heads, size).transpose(0, 2, 1, 3) for a in (q, k, v))
    if rotary:
        half = size // 2
        angle = np.arange(n)[:, None] / 1e4 ** (np.arange(half) / half)
        turn = np.exp(1j * angle)

        def rotate(a: np.ndarray) -> np.ndarray:
            z = (a[..., :half] + 1j * a[..., half:]) * turn
            return np.concatenate([z.real, z.imag], -1)

        q, k = rotate(q), rotate(k)
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    logits = 8 * (q * w[f"{name}.q_scale"]) @ (k * w[f"{name}.k_scale"]).transpose(0, 1, 3, 2) + bias
    if causal:
        logits = np.where(np.tril(np.ones((n, n), bool)), logits, -np.inf)
    out = (_softmax(logits) @ v).transpose(0, 2, 1, 3).reshape(len(x), n, -1)
    return _linear(w, f"{name}.to_out", out)


def _feed_forward(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    value, gate = np.split(_linear(w, f"{name}.1", _gain(w, f"{name}.0", x)), 2, -1)
    return _linear(w, f"{name}.4", _gelu(gate) * value)


def _transformer(
    w: Weights, name: str, depth: int, x: np.ndarray, bias: np.ndarray, condition: np.ndarray | None
) -> np.ndarray:
    """x [T, n, dim] of one clip; conditioned means causal."""
    causal, frames, patches = condition is not None, len(x), GRID * GRID
    for i in range(depth):
        layer = f"{name}.layers.{i}"
        if condition is not None:
            alpha, beta = np.split(_linear(w, f"{layer}.0.to_alpha_beta", condition)[:, None], 2, -1)
            hidden = _gelu(_linear(w, f"{layer}.0.ffn.0", _standardise(x, 1e-5) * (1 + alpha) + beta))
            x = x + _linear(w, f"{layer}.0.ffn.2", hidden)
        volume = x[:, :patches].reshape(frames, GRID, GRID, -1).transpose(3, 0, 1, 2)
        kernel, offset = w[f"{layer}.1.dsconv.weight"], w[f"{layer}.1.dsconv.bias"]
        moved = _conv3d(volume, kernel, offset, 1, front=2 if causal else 1)
        moved = moved.transpose(1, 2, 3, 0).reshape(frames, patches, -1)
        x = np.concatenate([x[:, :patches] + moved, x[:, patches:]], 1)
        rows = x.transpose(1, 0, 2)
        x = x + _attention(w, f"{layer}.3", rows, 0.0, True, causal).transpose(1, 0, 2)
        x = x + _attention(w, f"{layer}.2", x, bias, False, False)
        x = x + _feed_forward(w, f"{layer}.4", x)
    return _gain(w, f"{name}.norm_out", x)


def encode(w: Weights, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One clip [T, 3, s, s] -> latents [T - 1, 16, quant_dim] before quantisation, and codes [T - 1, 16]."""
    x = _dino(w, clip.astype(np.float64))
    bias = _position_bias(w, "enc_spatial_rel_pos_bias")
    x = _transformer(w, "enc_st_transformer", SIZES["enc_depth"], x, bias, None)[1:]
    x = _linear(w, "vq_project_in", x).reshape(len(x), GRID, GRID, -1).transpose(3, 0, 1, 2)
    x = _leaky(_conv3d(x, w["vq_encoder.0.weight"], w["vq_encoder.0.bias"], 2, front=1))
    x = _conv3d(x, w["vq_encoder.2.weight"], w["vq_encoder.2.bias"], 2, front=1)
    latents = x.transpose(1, 2, 3, 0).reshape(x.shape[1], 16, -1)
    distance = ((latents[:, :, None] - w["vq.codebooks"]) ** 2).sum(-1)
    return latents, distance.argmin(-1)


def decode(w: Weights, frames: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Frames [T, 3, s, s] and codes [T, 16] of one clip -> the next frames [T, 3, s, s]."""
    steps, p = len(frames), SIZES["patch"]
    condition = _linear(w, "vq_to_cond.1", w["vq.codebooks"][codes].reshape(steps, -1))
    condition = _feed_forward(w, "vq_to_cond.2", condition)
    x = _norm(w, "dec_patchify.norm", _patches(w, "dec_patchify.proj", frames.astype(np.float64)), 1e-5)
    x = np.concatenate([x, condition[:, None]], 1)
    bias = np.pad(_position_bias(w, "dec_spatial_rel_pos_bias"), ((0, 0), (0, 1), (0, 1)))
    x = _transformer(w, "dec_transformer", SIZES["dec_depth"], x, bias, condition)
    x = _linear(w, "to_pixels.0", x[:, :-1]).reshape(steps, GRID, GRID, 3, p, p)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(frames.shape)
