"""A checkpoint is a folder; nothing in it is ever unpickled.

    config.json               sizes and choices (models.config)
    model-00001-of-0000n.safetensors ...
    vqgan.safetensors
    tokenizer.json            HF tokenizers
    embodiment.yaml           the action vector's names and units; opaque here
    normalization.json        models.normalization
    bins.json                 models.bins; where actions are tokens
    source.json               which released files it was converted from, if it was
    manifest.json             size and SHA-256 of every file above; written last, so its folder is complete

A pretrained checkpoint (`action_heads: none`) has no embodiment and no normalization. `save` and `load` are
inverses. `init_checkpoint` writes random weights of any size, one tensor at a time.
"""

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models import folder as folders
from models.bins import ActionBins, BinsError
from models.config import ModelConfig, ModelConfigError
from models.folder import FORMAT, SHARD_BYTES, CheckpointError, Progress, Weights, read_hash, read_text
from models.normalization import NormalizationError, Normalizer
from models.policy import Policy
from models.tokenizer import Tokenizer, TokenizerError
from models.vqgan import VQGAN

__all__ = ["Checkpoint", "CheckpointError", "init_checkpoint", "load", "read_hash", "save", "write"]


@dataclass
class Checkpoint:
    config: ModelConfig
    policy: Policy
    vqgan: VQGAN
    tokenizer: Tokenizer
    normalizer: Normalizer | None  # None: pretrained, without action heads
    embodiment: str | None  # YAML text; None as above
    hash: str = ""  # SHA-256 over the manifest, hex
    bins: ActionBins | None = None  # where actions are tokens


def write(
    folder: Path | str,
    config: ModelConfig,
    policy: Weights,
    vqgan: Weights,
    texts: dict[str, str],
    shard_bytes: int = SHARD_BYTES,
    resume: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Write a checkpoint from tensors made one at a time; `models.folder.write` has the details."""
    return folders.write(
        folder,
        {"model": policy, "vqgan.safetensors": vqgan},
        {"config.json": json.dumps({"format": FORMAT, "model": config.to_dict()}, indent=1), **texts},
        shard_bytes,
        resume,
        progress,
    )


def save(
    folder: Path | str,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write `checkpoint` (replacing one that is there) and return its hash. dtype: of the policy's weights;
    None: as is.
    """
    policy = checkpoint.policy
    if policy.backbone.text_head is None:
        raise CheckpointError("a policy loaded for serving lacks heads: load with serving=False to save it")
    parts = (checkpoint.tokenizer, checkpoint.normalizer, checkpoint.embodiment, checkpoint.bins)
    check_parts(checkpoint.config, *parts)
    weights = dict(policy.named_parameters())
    return write(
        folder,
        checkpoint.config,
        _weights(weights, dtype or policy.dtype),
        compact(dict(checkpoint.vqgan.named_parameters())),
        texts(*parts),
        shard_bytes,
    )


def _weights(tensors: dict[str, Tensor], dtype: torch.dtype) -> Weights:
    return Weights({name: t.shape for name, t in tensors.items()}, tensors.__getitem__, dtype)


def compact(tensors: dict[str, Tensor]) -> Weights:
    """Weights in bf16 if that loses nothing, else fp32: rounding a trained tokenizer would flip codes."""
    wide = {name: t.detach().cpu().float() for name, t in tensors.items()}
    exact = all(torch.equal(t.bfloat16().float(), t) for t in wide.values())
    return _weights(wide, torch.bfloat16 if exact else torch.float32)


def texts(
    tokenizer: Tokenizer,
    normalizer: Normalizer | None,
    embodiment: str | None,
    bins: ActionBins | None = None,
) -> dict[str, str]:
    """File name -> content of the parts that are text."""
    out = {"tokenizer.json": tokenizer.to_json()}
    if normalizer:
        out["normalization.json"] = normalizer.to_json()
    if embodiment:
        out["embodiment.yaml"] = embodiment
    if bins:
        out["bins.json"] = bins.to_json()
    return out


def random_tensor(name: str, shape: torch.Size, seed: int, device="cpu") -> Tensor:
    """Initial fp32 weights of the tensor `name`: the same for a name, shape, seed and kind of device.

    Norms 1, biases 0, tables and matrices N(0, .02) (LLaMA), places in a frame sines, convolutions He (1 /
    fan-in), codebook uniform.
    """
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big"))
    kind = {"generator": generator, "device": device}
    if name.endswith(".bias"):
        return torch.zeros(shape, device=device)
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    if name.endswith("vision_embedding.places"):
        return _sines(shape).to(device)
    if name == "quantize.embedding.weight":
        return (torch.rand(shape, **kind) * 2 - 1) / shape[0]
    if len(shape) == 4:
        return torch.randn(shape, **kind) * (shape[1] * shape[2] * shape[3]) ** -0.5
    if name.startswith("action_encoder."):
        return torch.randn(shape, **kind) * shape[1] ** -0.5
    return torch.randn(shape, **kind) * 0.02


def _sines(shape: torch.Size) -> Tensor:
    """Places of a square frame [N + 1, hidden], its end last: sines and cosines of row and column, as large
    as a table's rows.
    """
    side, quarter = math.isqrt(shape[0] - 1), shape[1] // 4
    at = torch.arange(side, dtype=torch.float32)[:, None]
    angle = at * math.pi * torch.logspace(-math.log2(2 * side), 0, quarter, 2)
    line = torch.cat([angle.sin(), angle.cos()], 1)
    places = torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], 1)
    return 0.02 * math.sqrt(2) * torch.cat([places, torch.zeros(1, 4 * quarter)])


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fill a module (on any device but meta) with `random_tensor`s."""
    for name, parameter in module.named_parameters():
        parameter.copy_(random_tensor(name, parameter.shape, seed, parameter.device))


def init_checkpoint(
    config: ModelConfig,
    folder: Path | str,
    tokenizer: Tokenizer,
    normalizer: Normalizer | None,
    embodiment: str | None,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    bins: ActionBins | None = None,
) -> str:
    """Write random weights of `config`, made on `device` one tensor at a time. Returns the hash.

    Raises CheckpointError when the parts do not fit each other.
    """
    check_parts(config, tokenizer, normalizer, embodiment, bins)
    shapes, vqgan = parameter_shapes(Policy, config), parameter_shapes(VQGAN, config.vqgan)
    return write(
        folder,
        config,
        Weights(shapes, lambda name: random_tensor(name, shapes[name], seed, device), dtype),
        Weights(vqgan, lambda name: random_tensor(name, vqgan[name], seed), torch.float32),
        texts(tokenizer, normalizer, embodiment, bins),
        shard_bytes,
    )


class _NoInit(TorchFunctionMode):
    """Skips torch.nn.init, which without memory to fill would only import half of torch, for seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return function(*args, **(kwargs or {}))


def empty(kind: type[nn.Module], *arguments) -> nn.Module:
    """A module on the meta device: names and shapes, no memory."""
    with torch.device("meta"), _NoInit():
        return kind(*arguments)


def parameter_shapes(kind: type[nn.Module], config) -> dict[str, torch.Size]:
    """Names and shapes of a module's parameters, without making them."""
    return {name: p.shape for name, p in empty(kind, config).named_parameters()}


def check_parts(
    config: ModelConfig,
    tokenizer: Tokenizer,
    normalizer: Normalizer | None,
    embodiment: str | None,
    bins: ActionBins | None,
) -> None:
    """Sizes and choices of the parts agree. Raises CheckpointError."""
    if tokenizer.vocab_size > config.text_vocab:
        raise CheckpointError(
            f"tokenizer has {tokenizer.vocab_size} ids, the model's text table {config.text_vocab}"
        )
    acts = config.action_heads != "none"
    for name, part, wanted in (
        ("normalization", normalizer, acts),
        ("embodiment", embodiment, acts),
        ("bins", bins, config.action_heads == "ar"),
    ):
        if (part is not None) != wanted:
            verb = "needs" if wanted else "must not have"
            raise CheckpointError(f"a model with action_heads {config.action_heads} {verb} {name}")
    if normalizer is not None and len(normalizer.names) != config.action_dim:
        raise CheckpointError(
            f"normalization has {len(normalizer.names)} dimensions, the model {config.action_dim}"
        )
    if normalizer is not None and normalizer.representation != config.representation:
        raise CheckpointError(
            f"normalization is for {normalizer.representation} joints, the model for {config.representation}"
        )
    if normalizer is not None and normalizer.horizon not in (None, config.horizon):
        raise CheckpointError(
            f"normalization is of {normalizer.horizon} actions a chunk, the model has {config.horizon}"
        )
    if bins is not None and bins.names != normalizer.names:
        raise CheckpointError(f"bins are of {bins.names}, normalization of {normalizer.names}")
    if bins is not None and bins.vocab > config.action_vocab:
        raise CheckpointError(f"bins need {bins.vocab} action ids, the model has {config.action_vocab}")


def load(
    folder: Path | str,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    serving: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Checkpoint:
    """Read a folder straight to `device` and `dtype` (the VQGAN in fp32), eval mode. Raises CheckpointError.

    serving: leave out heads that continuous actions do not use. verify: compare every file with its SHA-256,
    in threads beside the copy, so that each byte is read from disk once. progress: called for each tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} does not exist: write one with `vipra init-checkpoint`, or train or convert one"
        )
    files = folders.read_manifest(folder, verify=False)
    big = [name for name in sorted(files) if name.endswith(".safetensors")]
    if verify:
        for name in sorted(set(files) - set(big)):
            folders.require_digest(folder / name, folders.digest(folder / name), files[name])
    config = read_config(folder)
    if serving and config.future_frame:
        raise CheckpointError(
            f"{folder} was finetuned with +SP3: before each chunk it draws a frame of {config.frame_tokens} "
            "tokens, which serving does not do: finetune with future_weight: 0"
        )
    parts = _read_parts(folder, config, files)
    policy, vqgan = empty(Policy, config, serving), empty(VQGAN, config.vqgan)
    policy, vqgan = policy.to(dtype).to_empty(device=device), vqgan.to_empty(device=device)
    skip = set(parameter_shapes(Policy, config))
    total, done = sum((folder / name).stat().st_size for name in big), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("reading checkpoint", done, total)

    with ThreadPoolExecutor(4) as pool:
        found = {name: pool.submit(folders.digest, folder / name) for name in big} if verify else {}

        def compare() -> None:
            for name, value in found.items():
                folders.require_digest(folder / name, value, files[name])

        try:
            models = [folder / name for name in big if name.startswith("model-")]
            if not models:
                raise CheckpointError(f"{folder} holds a frame tokenizer and no policy")
            folders.fill(policy, models, skip, advance)
            folders.fill(vqgan, [folder / "vqgan.safetensors"], advance=advance)
        except CheckpointError:
            compare()  # a damaged copy explains whatever it led to
            raise
        compare()
    advance(total - done)
    return Checkpoint(config, policy.eval(), vqgan.eval(), hash=read_hash(folder), **parts)


def read_config(folder: Path | str) -> ModelConfig:
    """Sizes and choices of a folder, nothing else of it. Raises CheckpointError."""
    try:
        data = json.loads(read_text(Path(folder), "config.json"))
        if not isinstance(data, dict) or set(data) != {"format", "model"}:
            raise ModelConfigError("expected the keys format and model")
        return ModelConfig.from_dict(data["model"])
    except (json.JSONDecodeError, ModelConfigError) as error:
        raise CheckpointError(f"{folder}: config.json: {error}") from error


def _read_parts(folder: Path, config: ModelConfig, files: dict[str, str]) -> dict:
    """The parts that are text, by their field of Checkpoint. Raises CheckpointError."""

    def optional(name: str) -> str | None:
        return read_text(folder, name) if name in files else None

    try:
        normalization, bins = optional("normalization.json"), optional("bins.json")
        parts = {
            "tokenizer": Tokenizer.from_json(read_text(folder, "tokenizer.json")),
            "normalizer": normalization and Normalizer.from_json(normalization),
            "embodiment": optional("embodiment.yaml"),
            "bins": bins and ActionBins.from_json(bins),
        }
    except (TokenizerError, NormalizationError, BinsError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    check_parts(config, **parts)
    return parts
