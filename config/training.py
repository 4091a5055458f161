"""Training recipes: one YAML a run, `config/training/*.yaml`; `stage` says which of the four it is.

`load_recipe("finetune_tiny", ["steps=50", "optimizer.learning_rate=1e-4"])` reads, overrides, checks.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, model_validator

from config.dataset import Augmentation, Mixture
from config.loading import ConfigError, Strict, find, parse

VALIDATION_SHARE = 0.1  # of the episodes, where --data names a dataset and nothing else is said
Probability = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Strict):
    """AdamW."""

    learning_rate: float = Field(gt=0, le=1)
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class Schedule(Strict):
    """Learning rate over the run: linear warm-up, then constant or half a cosine."""

    kind: Literal["constant", "cosine"] = "constant"
    warmup: int = Field(0, ge=0, description="steps")
    final: float = Field(0.0, ge=0, le=1, description="share of the learning rate left at the end (cosine)")


class Validation(Strict):
    """On the held-out episodes (data.validation_share)."""

    every: int = Field(gt=0, description="steps between validations; the last step always validates")
    samples: int = Field(256, gt=0, description="drawn from them, the same every time")


class Lora(Strict):
    """Low-rank adapters (peft) on the backbone's matrices; merged when the checkpoint is written."""

    rank: int = Field(16, ge=1, le=512)
    alpha: float = Field(32, gt=0, description="the adapter's output is scaled by alpha / rank")
    dropout: Probability = 0.0
    targets: tuple[Literal["qkv", "out", "gate_up", "down"], ...] = Field(
        ("qkv", "out", "gate_up", "down"), min_length=1
    )


class Recipe(Strict):
    """What every stage shares."""

    KIND: ClassVar[str] = "training"

    stage: str
    model: str = Field(
        description="a size: vipra_tiny, vipra_sim, vipra_sim_small, vipra_100m, vipra_7b; stage latent: "
        "laq_tiny, laq_sim, laq_base, lapa_tiny, lapa_base, mvp_lam_base"
    )
    data: Mixture | None = Field(None, description="what to read; the command line's --data replaces it")
    augmentation: Augmentation | None = None
    seed: int = Field(0, ge=0)
    steps: int = Field(gt=0)
    global_batch: int = Field(gt=0, description="samples an optimiser step, over all ranks")
    micro_batch: int = Field(gt=0, description="samples one rank computes at once; divides global_batch")
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the arithmetic; weights, gradient sums and optimiser stay float32"
    )
    activation_checkpointing: bool = Field(False, description="recompute layers in the backward pass")
    compile: bool = Field(False, description="torch.compile every layer (GPU)")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights that are exported")
    log_every: int = Field(10, gt=0, description="steps")
    checkpoint_every: int = Field(500, gt=0, description="steps")
    keep: int = Field(2, ge=1, description="newest training checkpoints kept")
    validation: Validation
    workers: int = Field(0, ge=0, description="data-loading processes a rank; 0: in the training process")

    @model_validator(mode="after")
    def _whole_batches(self):
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}"
            )
        return self


class TokenizerRecipe(Recipe):
    """Stage 0: VQGAN and BPE vocabulary of a small model."""

    stage: Literal["tokenizer"]
    lpips: float = Field(0.0, ge=0, description="weight of the perceptual term; needs lpips_weights")
    lpips_weights: str | None = Field(None, description="VGG16 state dict (torchvision) on this machine")
    motion_weight: bool = Field(
        True, description="weigh each pixel's L1 by how much it varies over the data: arms are small"
    )
    restart_every: int = Field(50, gt=0, description="steps between restarts of unused codes")
    restart_until: float = Field(0.8, gt=0, le=1, description="of the run")


class LatentObjective(Strict):
    """Terms of the stage-1 loss and the codebook's care (training.latent)."""

    pixel_loss: Literal["l1", "l2"] = Field("l1", description="l2: LAPA")
    lpips_weight: float = Field(0.5, ge=0)
    flow_weight: float = Field(0.1, ge=0)
    flow_start: int = Field(60_000, ge=0, description="step")
    flow_ramp: int = Field(10_000, ge=0, description="steps over which the term grows")
    flow_network: Literal["raft_large", "raft_small"] = "raft_large"
    refresh: tuple[tuple[int, int], ...] = Field(
        ((100, 10), (1000, 100), (10_000, 1000)), description="codebook: until this step, every so many"
    )
    refresh_threshold: float = Field(0.015, ge=0, le=1, description="share of use below which a code is new")
    cross_weight: float = Field(0.0, ge=0, description="MVP-LAM: decode each view with the other's latents")

    @model_validator(mode="after")
    def _increasing(self):
        until = [step for step, _ in self.refresh]
        if until != sorted(set(until)) or any(every < 1 for _, every in self.refresh):
            raise ValueError(
                f"refresh {self.refresh} must be (until step, every), steps increasing, every >= 1"
            )
        return self


class LatentWeights(Strict):
    """Pretrained networks on this machine; a term without its network is off, and the run says so."""

    dino: str | None = Field(None, description="DINOv2-with-registers ViT-B (safetensors or folder)")
    vgg: str | None = Field(None, description="VGG16 of LPIPS, torchvision state dict")
    raft: str | None = Field(None, description="RAFT, torchvision state dict")


class LatentRecipe(Recipe):
    """Stage 1: latent action model."""

    stage: Literal["latent"]
    clip_frames: int = Field(8, ge=2, le=32, description="frames of a clip, L + 1")
    views: Literal[1, 2] = Field(1, description="synchronised views of a clip; cross_weight needs 2")
    vit_lr_scale: float = Field(0.1, gt=0, le=1, description="of the image encoder's learning rate")
    objective: LatentObjective = LatentObjective()
    weights: LatentWeights = LatentWeights()

    @model_validator(mode="after")
    def _consistent(self):
        if self.objective.cross_weight > 0 and self.views < 2:
            raise ValueError(
                "objective.cross_weight above 0 decodes one view with another's latents: views: 2"
            )
        return self


class PretrainRecipe(Recipe):
    """Stage 2: joint future-frame and latent-action prediction."""

    stage: Literal["pretrain"]
    start: str | None = Field(
        None, description="checkpoint folder whose backbone continues (LWM converted); null: random weights"
    )
    tokenizer: str | None = Field(
        None, description="checkpoint folder that gives VQGAN and vocabulary; null: those of start"
    )
    labels: str | None = Field(None, description="folder written by `vipra label`")
    validation_share: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="of the labelled episodes, held out; null: as the labelled mixture, or .1",
    )
    variant: Literal["full", "ac", "sp2", "la"] = Field(
        "full", description="table 2: ac one-step latents, sp2 no future frame, la no latents"
    )
    image_weight: float = Field(1.0, ge=0)
    latent_weight: float = Field(1.0, ge=0)
    text_weight: float = Field(0.0, ge=0)
    dropout: Probability = 0.0
    latent_head: Literal["linear", "mlp"] = "linear"
    pack: int | None = Field(
        None, ge=1, description="tokens of a row that holds several sequences; null: one a row, padded"
    )


class FinetuneRecipe(Recipe):
    """Stage 3: action chunks."""

    stage: Literal["finetune"]
    start: str | None = Field(
        None, description="pretrained or finetuned checkpoint folder (Scratch: LWM); null: random weights"
    )
    tokenizer: str | None = Field(
        None, description="checkpoint folder that gives VQGAN and vocabulary; null: those of start"
    )
    embodiment: str = Field(description="file in config/embodiments, or a path")
    horizon: int | None = Field(
        None, ge=1, le=64, description="actions in a chunk instead of the embodiment's; 1: -AC (table 2)"
    )
    future_weight: float = Field(
        0.0, ge=0, description="above 0, +SP3 (table 2): predict o_{t+H} before the actions; of its loss"
    )
    head: Literal["flow", "ar"] = "flow"
    samples: int = Field(
        1, ge=1, le=16, description="draws of noise and flow time that share one prefix (flow)"
    )
    bins: int = Field(255, ge=2, le=4096, description="quantile bins a dimension (ar)")
    representation: Literal["absolute", "relative"] = "absolute"
    normalization: Literal["mean_std", "quantile"] = "mean_std"
    normalize_each_action: bool = Field(
        False, description="statistics of each action of a chunk: relative ones move further at its end"
    )
    chunk_attention: Literal["causal", "bidirectional"] = "causal"
    dropout: Probability = 0.0
    activation: Literal["silu", "gelu"] = "silu"
    time_embedding: Literal["official", "periods"] = "periods"
    history_lags: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (0.0, 1.0),
        min_length=1,
        description="share of samples whose o_{t-1} lies 0, 1, 2 .. history_seconds back",
    )
    lora: Lora | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if abs(sum(self.history_lags) - 1) > 1e-6:
            raise ValueError(f"history_lags {self.history_lags} must sum to 1")
        if self.augmentation and self.history_lags != (0.0, 1.0):
            raise ValueError("history_lags need augmentation: null (frames are encoded once)")
        if self.augmentation and self.future_weight:
            raise ValueError("future_weight needs augmentation: null (frames are encoded once)")
        if self.head == "ar" and (self.representation, self.samples) != ("absolute", 1):
            raise ValueError("head: ar needs representation: absolute and samples: 1")
        return self


STAGES: dict[str, type[Recipe]] = {
    "tokenizer": TokenizerRecipe,
    "latent": LatentRecipe,
    "pretrain": PretrainRecipe,
    "finetune": FinetuneRecipe,
}


def override(data: dict, assignments: Sequence[str]) -> dict:
    """`data` with `key.sub=value` assignments applied; values are YAML. Raises ConfigError."""
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {text}: write key=value, e.g. --set optimizer.learning_rate=1e-4")
        *parents, last = path.split(".")
        place: Any = data
        for key in parents:
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
            if not isinstance(place, dict):
                raise ConfigError(f"--set {text}: {key} holds no keys of its own")
        place[last] = _value(value)
    return data


def _value(text: str) -> Any:
    """YAML, with 1e-4 a number as everyone writes it."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set: {text!r} is not YAML: {error}") from error
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load_recipe(
    name: str, assignments: Sequence[str] = (), stage: str | None = None, data: dict | None = None
) -> Recipe:
    """Recipe `name` (a file in config/training, or a path) with `--set` assignments.

    stage: refuse any other. data: keys of a mixture, datasets among them, that replace the recipe's. Raises
    ConfigError naming file, key and fix.
    """
    path = find(Recipe.KIND, name)
    try:
        fields = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(fields, dict) or fields.get("stage") not in STAGES:
        found = fields.get("stage") if isinstance(fields, dict) else None
        raise ConfigError(f"{path}: stage: {found!r} must be one of {', '.join(STAGES)}")
    if stage and fields["stage"] != stage:
        raise ConfigError(f"{path} is for `vipra train {fields['stage']}`, not {stage}")
    if data:
        fields["data"] = {"validation_share": VALIDATION_SHARE, **(fields.get("data") or {}), **data}
    return parse(STAGES[fields["stage"]], override(fields, list(assignments)), str(path))
