"""Where a model begins: weights by name from a checkpoint folder, random where it has none."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from models import checkpoint, folder
from models.config import SIZES, ModelConfig, VQGANConfig
from models.policy import Policy
from models.tokenizer import Tokenizer
from models.vqgan import VQGAN
from training.run import TrainingError


@dataclass
class Start:
    """A checkpoint folder, read lazily: a 7B policy is never whole in memory."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    hash: str
    tensors: dict[str, Path]  # the policy's, by name

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.tensors[name], framework="pt", device="cpu") as file:
            return file.get_tensor(name)

    def codebook(self) -> Tensor:
        """Of the frame tokenizer, fp32 [codes, z]."""
        with safe_open(self.path / "vqgan.safetensors", framework="pt", device="cpu") as file:
            return file.get_tensor("quantize.embedding.weight").float()

    def vqgan(self, device: torch.device | str = "cpu") -> VQGAN:
        """The frozen frame tokenizer, fp32."""
        model = VQGAN(self.config.vqgan)
        folder.fill(model, [self.path / "vqgan.safetensors"])
        model.to(device, memory_format=torch.channels_last)  # on a CPU up to twice as fast
        return model.eval().requires_grad_(False)


def open_start(path: str | Path) -> Start:
    """Raises CheckpointError."""
    path = Path(path).expanduser()
    files = folder.read_manifest(path, verify=False)
    data = json.loads(folder.read_text(path, "config.json"))
    tensors = {}
    for name in sorted(name for name in files if name.startswith("model-")):
        with safe_open(path / name, framework="pt", device="cpu") as file:
            tensors |= dict.fromkeys(file.keys(), path / name)
    return Start(
        path=path,
        config=ModelConfig.from_dict(data["model"]),
        tokenizer=Tokenizer.from_json(folder.read_text(path, "tokenizer.json")),
        hash=folder.read_hash(path),
        tensors=tensors,
    )


def size(name: str) -> ModelConfig:
    """Raises TrainingError."""
    if name not in SIZES:
        raise TrainingError(f"model: {name!r} is not one of {', '.join(SIZES)}")
    return SIZES[name]


def planned(config: ModelConfig) -> Start:
    """Sizes alone, and a vocabulary that only counts: for estimates, without a folder on disk."""
    words = Tokenizer.train(["move the hand"], min(config.text_vocab, 300))
    return Start(path=Path("planned"), config=config, tokenizer=words, hash="", tensors={})


def parts(recipe, planning: bool = False) -> tuple[Start | None, Start, ModelConfig]:
    """(what the backbone starts from or None, what gives VQGAN and vocabulary, sizes) of a recipe with
    `model`, `start` and `tokenizer`; planning: neither is needed. Raises TrainingError or CheckpointError.
    """
    base = size(recipe.model)
    if not (recipe.start or recipe.tokenizer):
        if planning:
            return None, planned(base), base
        raise TrainingError(
            "no frame tokenizer: give --start CHECKPOINT, or --tokenizer with the one that "
            "`vipra train tokenizer` wrote"
        )
    start = open_start(recipe.start) if recipe.start else None
    frames = open_start(recipe.tokenizer) if recipe.tokenizer else start
    config = start.config if start else base
    if config.name != base.name:
        raise TrainingError(
            f"{start.path} is a {config.name}, the recipe is for model {base.name}: use a recipe in "
            f"config/training with `model: {config.name}`"
        )
    if _codes(frames.config.vqgan) != _codes(config.vqgan):
        raise TrainingError(
            f"{frames.path} has {frames.config.vqgan.grid}x{frames.config.vqgan.grid} codes of "
            f"{frames.config.vqgan.codebook_size}, model {base.name} needs {config.vqgan.grid}x"
            f"{config.vqgan.grid} of {config.vqgan.codebook_size}: use the tokenizer made for it"
        )
    if frames.tokenizer.vocab_size > config.text_vocab:
        raise TrainingError(
            f"{frames.path} has {frames.tokenizer.vocab_size} text ids, model {base.name} {config.text_vocab}"
        )
    if (
        start
        and frames is not start
        and folder.read_text(start.path, "tokenizer.json") != folder.read_text(frames.path, "tokenizer.json")
    ):
        raise TrainingError(
            f"{start.path} was trained with another tokenizer than {frames.path}: drop --tokenizer"
        )
    return start, frames, config


def _codes(vqgan: VQGANConfig) -> tuple[int, int, int]:
    return vqgan.image_size, vqgan.grid, vqgan.codebook_size


def weights_source(
    config: ModelConfig, start: Start | None, frames: Start, seed: int
) -> tuple[Callable[[str], Tensor], list[str]]:
    """`source(name)` for the parameters of Policy(config), and the names that begin random.

    A tensor of `start` is taken when its shape fits; heads of another action size begin anew. A new vision
    table begins as a random projection of the codebook of `frames`: codes that look alike begin alike.
    """
    shapes = checkpoint.parameter_shapes(Policy, config)
    known = checkpoint.parameter_shapes(Policy, start.config) if start else {}
    fresh = [name for name, shape in shapes.items() if known.get(name) != shape]

    def source(name: str) -> Tensor:
        if name not in fresh and start is not None:
            return start.tensor(name)
        tensor = checkpoint.random_tensor(name, shapes[name], seed)
        if name == "backbone.vision_embedding.weight":
            codes = frames.codebook()
            tensor[: len(codes)] = (codes - codes.mean(0)) / codes.std() @ tensor[: codes.shape[1]]
            tensor[: len(codes)] /= codes.shape[1] ** 0.5
        return tensor

    return source, fresh
