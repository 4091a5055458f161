"""LWM's LLaMA (kernels in x out, layers stacked, RoPE on neighbouring pairs) -> models.backbone.

A `Plan` is made from the file's heads alone: which of our tensors come from which of theirs, and that the
sizes fit. Nothing is read until a tensor's turn to be written comes.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.checkpoint import parameter_shapes, random_tensor
from models.config import SIZES, ModelConfig, VQGANConfig
from models.convert import ConvertError
from models.convert.streaming import Stream
from models.folder import Weights
from models.policy import Policy

LLAMA_HEAD = 128  # every LLaMA's head size; the number of heads is not in the file
TRAIN_STATE = "params/params/"  # prefix of the weights in `streaming_train_state`
NOT_WEIGHTS = ("opt_state", "step")  # the rest of it
STACK = "transformer/h/scan_decoder"


@dataclass(frozen=True)
class Recipe:
    """One of our tensors: `make` of the source's tensors, or of their entry `layer`."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    layer: int | None = None


def same(x: Tensor) -> Tensor:
    return x


def linear(kernel: Tensor) -> Tensor:
    return kernel.T


def half_rope(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection [heads * n, in] from pairs (2i, 2i + 1) to halves (i, i + n / 2)."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def recipes(config: ModelConfig) -> dict[str, Recipe]:
    """Tables, layers and token heads, in the order of our parameters."""
    heads = config.heads

    def qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([half_rope(q.T, heads), half_rope(k.T, heads), v.T])

    def gate_up(gate: Tensor, up: Tensor) -> Tensor:
        return torch.cat([gate.T, up.T])

    def stacked(*names: str) -> tuple[str, ...]:
        return tuple(f"{STACK}/{name}/kernel" for name in names)

    out = {
        "text_embedding.weight": Recipe(("transformer/wte/embedding",), same),
        "vision_embedding.weight": Recipe(("transformer/vte/embedding",), same),
    }
    for i in range(config.layers):
        q_k_v = stacked("attention/wq", "attention/wk", "attention/wv")
        out |= {
            f"layers.{i}.attention_norm.weight": Recipe(stacked("attention_norm"), same, i),
            f"layers.{i}.qkv.weight": Recipe(q_k_v, qkv, i),
            f"layers.{i}.out.weight": Recipe(stacked("attention/wo"), linear, i),
            f"layers.{i}.mlp_norm.weight": Recipe(stacked("ffn_norm"), same, i),
            f"layers.{i}.gate_up.weight": Recipe(stacked("feed_forward/w1", "feed_forward/w3"), gate_up, i),
            f"layers.{i}.down.weight": Recipe(stacked("feed_forward/w2"), linear, i),
        }
    out |= {
        "norm.weight": Recipe(("transformer/ln_f/kernel",), same),
        "text_head.weight": Recipe(("lm_head/kernel",), linear),
        "vision_head.weight": Recipe(("vision_head/kernel",), linear),
    }
    return {f"backbone.{name}": recipe for name, recipe in out.items()}


class Source:
    """The weights of a streaming file, with or without a train state around them."""

    def __init__(self, stream: Stream):
        inside = any(name.startswith(TRAIN_STATE) for name in stream.names)
        self.stream, self.prefix = stream, TRAIN_STATE if inside else ""
        rest = [name for name in stream.names if not name.startswith(self.prefix)]
        tops = Counter(name.partition("/")[0] for name in rest)
        self.ignored = {top: tops.pop(top) for top in NOT_WEIGHTS if inside and top in tops}
        self.names = {name.removeprefix(self.prefix) for name in stream.names if name.startswith(self.prefix)}
        self.names |= {name for name in rest if name.partition("/")[0] not in self.ignored}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stream.array(self.prefix + name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.stream.array(self.prefix + name).dtype

    def read(self, recipe: Recipe) -> Tensor:
        tensors = [self.stream.read(self.prefix + name, recipe.layer) for name in recipe.sources]
        if not all(tensor.isfinite().all() for tensor in tensors):
            where = "" if recipe.layer is None else f" (layer {recipe.layer})"
            raise ConvertError(f"{self.stream.path}: {recipe.sources}{where} hold NaN or infinite weights")
        return recipe.make(*tensors)


@dataclass(frozen=True)
class Plan:
    """What becomes of a file: sizes, a recipe for each of our tensors, and what has none or is not used."""

    source: Source
    config: ModelConfig
    recipes: dict[str, Recipe]
    fresh: tuple[str, ...]  # ours that the file lacks: random
    ignored: dict[str, int]  # its names (first part) that are not weights -> how many

    @property
    def dtype(self) -> torch.dtype:
        """bf16 if every tensor is, else fp32."""
        used = {self.source.dtype(name) for recipe in self.recipes.values() for name in recipe.sources}
        return torch.bfloat16 if used == {torch.bfloat16} else torch.float32

    def weights(self, seed: int = 0, dtype: torch.dtype | None = None) -> Weights:
        """seed: of the tensors the file lacks."""
        shapes = parameter_shapes(Policy, self.config)

        def tensor(name: str) -> Tensor:
            if name in self.fresh:
                return random_tensor(name, shapes[name], seed)
            return self.source.read(self.recipes[name])

        return Weights(shapes, tensor, dtype or self.dtype)


def sizes(source: Source, vqgan: VQGANConfig, heads: int | None) -> ModelConfig:
    """LLaMA's sizes, read off the tensors. Raises ConvertError or ModelConfigError."""
    try:
        text_vocab, hidden = source.shape("transformer/wte/embedding")
        vision_vocab, _ = source.shape("transformer/vte/embedding")
        layers, _, mlp_hidden = source.shape(f"{STACK}/feed_forward/w1/kernel")
    except KeyError as error:
        raise ConvertError(f"{source.stream.path}: {error} is missing: not an LWM or ViPRA file") from error
    except ValueError as error:
        raise ConvertError(f"{source.stream.path}: tables or stacked layers have wrong axes") from error
    if heads is None and hidden % LLAMA_HEAD:
        raise ConvertError(f"{source.stream.path}: hidden size {hidden}: give the number of --heads")
    official = SIZES["vipra_7b"]
    full_size = (hidden, layers) == (official.hidden, official.layers)
    return dataclasses.replace(
        official,
        name=official.name if full_size else f"converted_{hidden}x{layers}",
        hidden=hidden,
        mlp_hidden=mlp_hidden,
        layers=layers,
        heads=heads or hidden // LLAMA_HEAD,
        text_vocab=text_vocab,
        vision_vocab=vision_vocab,
        vqgan=vqgan,
        action_heads="none",
        latent_head="linear",
        time_embedding="official",
        activation="silu",
    )


def check(source: Source, config: ModelConfig, found: dict[str, Recipe], fresh: tuple[str, ...]) -> Plan:
    """Every tensor of the source is used or known, each of ours is made, and sizes fit: one error lists all
    that does not. Raises ConvertError.
    """
    shapes = parameter_shapes(Policy, config)
    used = {name for recipe in found.values() for name in recipe.sources}
    problems = []
    if unknown := sorted(source.names - used):
        problems.append(f"unknown tensors {unknown}")
    if missing := sorted(used - source.names):
        problems.append(f"missing tensors {missing}")
    for name, recipe in found.items():
        if set(recipe.sources) - source.names:
            continue
        whole = [source.shape(old) for old in recipe.sources]
        if recipe.layer is not None and {shape[:1] for shape in whole} != {(config.layers,)}:
            problems.append(f"{recipe.sources} have {whole}, expected {config.layers} layers")
            continue
        parts = [shape if recipe.layer is None else shape[1:] for shape in whole]
        if _made(recipe, parts) != shapes[name]:
            problems.append(f"{recipe.sources} of {parts} do not make {name} {list(shapes[name])}")
    if problems:
        raise ConvertError(f"{source.stream.path}: {'; '.join(dict.fromkeys(problems))}")
    assert set(found) | set(fresh) == set(shapes), "a parameter without a recipe"
    return Plan(source, config, found, fresh, source.ignored)


def _made(recipe: Recipe, parts: list[tuple[int, ...]]) -> torch.Size | None:
    """Shape of the result, None where the parts do not go together."""
    if any(math.prod(part) == 0 for part in parts):
        return None
    try:
        return recipe.make(*(torch.empty(part, device="meta") for part in parts)).shape
    except (RuntimeError, IndexError):
        return None


def plan(stream: Stream, vqgan: VQGANConfig, heads: int | None = None) -> Plan:
    """LWM-Chat-1M-Jax `params`: no latent actions yet, so their table and head begin random (N(0, .02), as
    upstream begins its pretraining); fp32 RoPE, as LWM was trained. Raises ConvertError.
    """
    source = Source(stream)
    config = sizes(source, vqgan, heads)
    if "transformer/late/embedding" in source.names:
        raise ConvertError(
            f"{stream.path} has latent actions, so it is a ViPRA file: use `vipra convert vipra`"
        )
    return check(source, config, recipes(config), ("latent_embedding.weight", "latent_head.layers.0.weight"))
