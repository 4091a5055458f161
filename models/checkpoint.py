"""A checkpoint is a folder; nothing in it is ever unpickled.

    config.json               sizes and choices (models.config)
    model-00001-of-0000n.safetensors ...
    vqgan.safetensors
    tokenizer.json            HF tokenizers
    embodiment.yaml           the action vector's names and units; opaque here
    normalization.json        models.normalization
    manifest.json             size and SHA-256 of every file above; written last, so its folder is complete

`save` and `load` are inverses. `init_checkpoint` writes random weights of any size shard by shard, never the
whole model at once.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.config import ModelConfig, ModelConfigError
from models.normalization import NormalizationError, Normalizer
from models.policy import Policy
from models.tokenizer import Tokenizer, TokenizerError
from models.vqgan import VQGAN

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint folder is missing, damaged or does not fit; the message names the file and tensor."""


@dataclass
class Checkpoint:
    config: ModelConfig
    policy: Policy
    vqgan: VQGAN
    tokenizer: Tokenizer
    normalizer: Normalizer
    embodiment: str  # YAML text
    hash: str = ""  # SHA-256 over the manifest, hex


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards(tensors: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Group (name, bytes) in order so that no group exceeds `limit` unless one tensor does."""
    groups, size = [[]], 0
    for name, count in tensors:
        if groups[-1] and size + count > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    return groups


def _write(
    folder: Path | str,
    config: ModelConfig,
    shapes: dict[str, torch.Size],
    tensor: "TensorSource",
    vqgan: dict[str, Tensor],
    texts: dict[str, str],
    dtype: torch.dtype,
    shard_bytes: int,
) -> str:
    """Write a folder beside its final place, then swap it in. Returns the hash."""
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} holds something that is not a checkpoint: choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    texts = {"config.json": json.dumps({"format": FORMAT, "model": config.to_dict()}, indent=1), **texts}
    for name, text in texts.items():
        (partial / name).write_text(text, encoding="utf-8")
    width = torch.empty((), dtype=dtype).element_size()
    groups = _shards(((name, shape.numel() * width) for name, shape in shapes.items()), shard_bytes)
    for i, names in enumerate(groups, 1):
        shard = {name: tensor(name).to(dtype).contiguous().cpu() for name in names}
        save_file(shard, partial / f"model-{i:05d}-of-{len(groups):05d}.safetensors")
    save_file(vqgan, partial / "vqgan.safetensors")
    for path in partial.glob("*.safetensors"):
        path.chmod(0o644)  # the library writes 0600; a server under another account must read them
    files = sorted(path for path in partial.iterdir())
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files}
    text = json.dumps({"format": FORMAT, "files": manifest}, indent=1)
    (partial / MANIFEST).write_text(text)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return hashlib.sha256(text.encode()).hexdigest()


class TensorSource:
    """Tensors of a module by name."""

    def __init__(self, module: nn.Module):
        self.tensors = dict(module.named_parameters())

    def __call__(self, name: str) -> Tensor:
        return self.tensors[name].detach()


def save(
    folder: Path | str, checkpoint: Checkpoint, dtype: torch.dtype | None = None, shard_bytes: int = 4 << 30
) -> str:
    """Write `checkpoint` (replacing one that is there) and return its hash. dtype: of the policy's weights;
    None: as is.
    """
    policy = checkpoint.policy
    if policy.backbone.text_head is None:
        raise CheckpointError("a policy loaded for serving lacks heads: load with serving=False to save it")
    return _write(
        folder,
        checkpoint.config,
        {name: p.shape for name, p in policy.named_parameters()},
        TensorSource(policy),
        _compact(checkpoint.vqgan),
        _texts(checkpoint.tokenizer, checkpoint.normalizer, checkpoint.embodiment),
        dtype or policy.dtype,
        shard_bytes,
    )


def _compact(module: nn.Module) -> dict[str, Tensor]:
    """Weights in bf16 if that loses nothing, else fp32: rounding a trained tokenizer would flip codes."""
    weights = {name: p.detach().cpu().float().contiguous() for name, p in module.named_parameters()}
    short = {name: p.bfloat16() for name, p in weights.items()}
    return short if all(torch.equal(short[name].float(), p) for name, p in weights.items()) else weights


def _texts(tokenizer: Tokenizer, normalizer: Normalizer, embodiment: str) -> dict[str, str]:
    return {
        "tokenizer.json": tokenizer.to_json(),
        "normalization.json": normalizer.to_json(),
        "embodiment.yaml": embodiment,
    }


def random_tensor(name: str, shape: torch.Size, seed: int, device="cpu") -> Tensor:
    """Initial fp32 weights of the tensor `name`: the same for a name, shape, seed and kind of device.

    Norms 1, biases 0, tables and matrices N(0, .02) (LLaMA), convolutions He (1 / fan-in), codebook uniform.
    """
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big"))
    kind = {"generator": generator, "device": device}
    if name.endswith(".bias"):
        return torch.zeros(shape, device=device)
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    if name == "quantize.embedding.weight":
        return (torch.rand(shape, **kind) * 2 - 1) / shape[0]
    if len(shape) == 4:
        return torch.randn(shape, **kind) * (shape[1] * shape[2] * shape[3]) ** -0.5
    if name.startswith("action_encoder."):
        return torch.randn(shape, **kind) * shape[1] ** -0.5
    return torch.randn(shape, **kind) * 0.02


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fill a module (on any device but meta) with `random_tensor`s."""
    for name, parameter in module.named_parameters():
        parameter.copy_(random_tensor(name, parameter.shape, seed, parameter.device))


def init_checkpoint(
    config: ModelConfig,
    folder: Path | str,
    tokenizer: Tokenizer,
    normalizer: Normalizer,
    embodiment: str,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard_bytes: int = 4 << 30,
) -> str:
    """Write random weights of `config`, made on `device` one tensor at a time. Returns the hash.

    Peak memory is one shard. Raises CheckpointError when the parts do not fit each other.
    """
    check_parts(config, tokenizer, normalizer)
    with torch.device("meta"):
        policy, vqgan = Policy(config), VQGAN(config.vqgan)
    shapes = {name: p.shape for name, p in policy.named_parameters()}
    return _write(
        folder,
        config,
        shapes,
        lambda name: random_tensor(name, shapes[name], seed, device).to(dtype),
        {name: random_tensor(name, p.shape, seed, "cpu") for name, p in vqgan.named_parameters()},
        _texts(tokenizer, normalizer, embodiment),
        dtype,
        shard_bytes,
    )


def check_parts(config: ModelConfig, tokenizer: Tokenizer, normalizer: Normalizer) -> None:
    """Sizes and choices of the parts agree. Raises CheckpointError."""
    if tokenizer.vocab_size > config.text_vocab:
        raise CheckpointError(
            f"tokenizer has {tokenizer.vocab_size} ids, the model's text table {config.text_vocab}"
        )
    if len(normalizer.names) != config.action_dim:
        raise CheckpointError(
            f"normalization has {len(normalizer.names)} dimensions, the model {config.action_dim}"
        )
    if normalizer.representation != config.representation:
        raise CheckpointError(
            f"normalization is for {normalizer.representation} joints, the model for {config.representation}"
        )


def read_hash(folder: Path | str) -> str:
    """Content hash of a folder, from its manifest alone. Raises CheckpointError."""
    return hashlib.sha256(_read(Path(folder), MANIFEST).encode()).hexdigest()


def _read(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder / name} is missing: not a complete checkpoint") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / name} is not readable: {error}") from error


def _manifest(folder: Path, verify: bool) -> dict[str, dict]:
    """Check the folder against its manifest: names, sizes, and contents when `verify`."""
    try:
        data = json.loads(_read(folder, MANIFEST))
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in data["files"].items()}
        version = data["format"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {version}, this version reads {FORMAT}")
    for name, (size, digest) in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing: not a complete checkpoint")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {size}: copy it again"
            )
        if verify and _digest(path) != digest:
            raise CheckpointError(f"{path} differs from its manifest (SHA-256): copy it again")
    return files


def _tensors(paths: list[Path]) -> Iterator[tuple[Path, str, "safe_open"]]:
    for path in paths:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield path, name, file
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


@torch.no_grad()
def _fill(module: nn.Module, paths: list[Path], skip: set[str]) -> None:
    """Copy tensors from memory-mapped files straight into the module's storage; `skip`: known but unused
    names.
    """
    wanted = dict(module.named_parameters())
    seen, unknown = set(), []
    for path, name, file in _tensors(paths):
        if name in seen:
            raise CheckpointError(f"{path}: tensor {name} appears twice")
        seen.add(name)
        if name not in wanted:
            if name not in skip:
                unknown.append(name)
            continue
        tensor, parameter = file.get_tensor(name), wanted[name]
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{path}: {name} is {list(tensor.shape)}, the model needs {list(parameter.shape)}"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, not a floating-point tensor")
        parameter.copy_(tensor)
        if not parameter.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite weights")
    missing = sorted(set(wanted) - seen)
    if unknown or missing:
        where = paths[0].parent
        raise CheckpointError(f"{where}: unknown tensors {sorted(unknown)}, missing tensors {missing}")


def load(
    folder: Path | str,
    device="cpu",
    dtype: torch.dtype = torch.float32,
    serving: bool = False,
    verify: bool = True,
) -> Checkpoint:
    """Read a folder straight to `device` and `dtype` (the VQGAN in fp32), eval mode. Raises CheckpointError.

    serving: leave out heads that continuous actions do not use. verify: compare every file with its SHA-256.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} does not exist: write one with `vipra init-checkpoint`, or train or convert one"
        )
    files = _manifest(folder, verify)
    try:
        data = json.loads(_read(folder, "config.json"))
        if not isinstance(data, dict) or set(data) != {"format", "model"}:
            raise ModelConfigError("expected the keys format and model")
        config = ModelConfig.from_dict(data["model"])
        tokenizer = Tokenizer.from_json(_read(folder, "tokenizer.json"))
        normalizer = Normalizer.from_json(_read(folder, "normalization.json"))
    except (json.JSONDecodeError, ModelConfigError, TokenizerError, NormalizationError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    check_parts(config, tokenizer, normalizer)
    with torch.device("meta"):
        full, policy, vqgan = Policy(config), Policy(config, serving), VQGAN(config.vqgan)
    policy = policy.to(dtype).to_empty(device=device)
    vqgan = vqgan.to_empty(device=device)
    skip = {name for name, _ in full.named_parameters()}
    _fill(policy, [folder / name for name in sorted(files) if name.startswith("model-")], skip)
    _fill(vqgan, [folder / "vqgan.safetensors"], set())
    return Checkpoint(
        config=config,
        policy=policy.eval(),
        vqgan=vqgan.eval(),
        tokenizer=tokenizer,
        normalizer=normalizer,
        embodiment=_read(folder, "embodiment.yaml"),
        hash=read_hash(folder),
    )
