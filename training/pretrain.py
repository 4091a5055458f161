"""Stage 2: predict the frame H steps ahead and the latent actions that lead there (paper section 4.2,
appendix C).

Reads what `vipra label` wrote. Everything is tokens, so a step needs no video and no frame tokenizer.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from config.training import VALIDATION_SHARE, PretrainRecipe
from models import checkpoint, sequence
from models.config import ModelConfig
from models.decode import imagine
from models.policy import Policy
from training import plots
from training.data.sampling import held_out, permuted, quotas, turn
from training.distributed import Ranks
from training.export import Gathered
from training.loop import Batch, Stage, evaluate, to_device
from training.run import Run, TrainingError
from training.start import Start, parts, weights_source
from training.text import Prompts
from training.tokenizer import pictures

FREE_RUNNING_LIMIT = 200_000_000  # parameters up to which validation also lets the model run freely


MANIFEST = ("tokenizer", "latent_model", "horizon", "latent_tokens", "latent_codes", "datasets", "shards")


def _manifest(path: Path) -> dict:
    """Raises TrainingError."""
    try:
        found = json.loads(path.read_text())
        return {**found, **{key: found[key] for key in MANIFEST}}
    except FileNotFoundError as error:
        raise TrainingError(f"{path} is missing: finish `vipra label` first") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is damaged ({error}): run `vipra label` again") from error


def _shard(path: Path, digest: str) -> bytes:
    """A shard's bytes. Raises TrainingError where they are not those that were labelled."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}): run `vipra label` again") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise TrainingError(
            f"{path} is not what was labelled (SHA-256): delete it and run `vipra label` again"
        )
    return data


class Labels:
    """Rows of a label folder, in memory: T frames in all, episodes whole and in order."""

    def __init__(self, folder: Path | str, start: Start, config: ModelConfig):
        """Raises TrainingError when the folder is incomplete, damaged or made for another tokenizer."""
        folder = Path(folder).expanduser()
        self.manifest = _manifest(folder / "manifest.json")
        if self.manifest["tokenizer"] != start.hash:
            raise TrainingError(
                f"{folder} holds tokens of tokenizer {self.manifest['tokenizer'][:12]}, {start.path} is "
                f"{start.hash[:12]}: label again with --tokenizer {start.path}"
            )
        made = tuple(self.manifest[key] for key in ("horizon", "latent_tokens", "latent_codes"))
        wanted = (config.horizon, config.latent_tokens, config.latent_codes)
        if made != wanted:
            raise TrainingError(
                f"{folder} has (horizon, tokens a step, codes) {made}, model {config.name} takes {wanted}"
            )
        columns: dict[str, list] = {"codes": [], "latents": [], "valid": []}
        keys, self.instructions, stride = [], {}, []
        for name, digest in self.manifest["shards"].items():
            table = pq.read_table(pa.BufferReader(_shard(folder / name, digest)))
            if not len(table):
                continue
            for column, values in columns.items():
                flat = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                values.append(flat.reshape(len(table), -1))
            keys += table["key"].to_pylist()
            stride.append(table["stride"].to_numpy())
            self.instructions |= dict(
                zip(table["key"].to_pylist(), table["instruction"].to_pylist(), strict=True)
            )
        if not keys:
            raise TrainingError(
                f"{folder} holds no frames: every episode was skipped (see its manifest.json)"
            )
        self.codes, self.latents, self.valid = (np.concatenate(values) for values in columns.values())
        self.stride = np.concatenate(stride)
        self.latents = self.latents.reshape(len(keys), config.horizon, -1)
        self.keys, self.episode = np.unique(np.array(keys), return_inverse=True)
        edges = np.flatnonzero(np.diff(self.episode)) + 1
        begins, ends = np.r_[0, edges], np.r_[edges, len(keys)]
        self.first, self.last = (np.repeat(x, ends - begins) for x in (begins, ends - 1))
        self.horizon = config.horizon

    def row(self, i: int) -> dict:
        """frames: codes of o_{t-1}, o_t, o_{t+H} [3, tokens], clamped to the clip; latents [H, 16]; valid
        [H].
        """
        step = self.stride[i]
        at = np.clip([i - step, i, i + self.horizon * step], self.first[i], self.last[i])
        return {
            "frames": self.codes[at].astype(np.int64),
            "latents": self.latents[i].astype(np.int64),
            "valid": self.valid[i],
            "instruction": self.instructions[self.keys[self.episode[i]]],
        }


class Rows:
    """Endless `rows[n]` over some rows of the labels; a pure function of (seed, n). Datasets come in
    proportion to their weights; within one each row once an epoch.
    """

    broken = ()  # `vipra label` has listed what could not be read

    def __init__(self, labels: Labels, rows: np.ndarray, seed: int):
        """Raises DataError for a weight too small."""
        self.labels, self.seed = labels, seed
        dataset = np.array([int(key.split("/", 1)[0]) for key in labels.keys])[labels.episode[rows]]
        self.datasets = np.unique(dataset)  # those that have rows
        self.rows = [rows[dataset == number] for number in self.datasets]
        weights = [labels.manifest["datasets"][number]["weight"] for number in self.datasets]
        self.quota = tuple(int(q) for q in quotas(weights))

    def __getitem__(self, n: int) -> dict:
        at, earlier = turn(self.seed, n, self.quota)
        rows = self.rows[at]
        epoch, position = divmod(earlier, len(rows))
        key = int(np.random.SeedSequence([self.seed, epoch, at]).generate_state(1)[0])
        row = rows[permuted(position, len(rows), key)]
        return {"n": n, "errors": [], **self.labels.row(int(row))}


class Predictor(nn.Module):
    def __init__(self, policy: Policy, choice: sequence.Stage2, weights: dict[str, float], pack: int | None):
        super().__init__()
        self.policy, self.choice, self.weights, self.pack = policy, choice, weights, pack

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        parts = self.policy.pretrain_loss(
            batch["texts"], batch["frames"], batch["latents"], self.choice, batch["valid"], self.weights,
            self.pack,
        )  # fmt: skip
        return {name: value.clone() for name, value in parts.items()}  # FSDP2 wants no views


class Pretrain(Stage):
    def __init__(self, recipe: PretrainRecipe, planning: bool = False):
        self.recipe = recipe
        self.start, self.frames, config = parts(recipe, planning)
        choices = {
            "action_heads": "none",
            "action_vocab": 0,
            "future_frame": False,
            "dropout": recipe.dropout,
        }
        if self.start is None:
            choices["latent_head"] = recipe.latent_head
        self.config = dataclasses.replace(config, **choices)
        self.choice = sequence.stage2(self.frames.tokenizer, self.config, recipe.variant)
        with torch.device("meta"):
            policy = Policy(self.config)
        if not self.choice.steps:  # -LA: no latent action is read or predicted
            policy.latent_embedding.requires_grad_(False)
            policy.latent_head.requires_grad_(False)
        if recipe.text_weight == 0:
            policy.backbone.text_head.requires_grad_(False)
        self.source, self.fresh = self._source(recipe)
        weights = {"vision": recipe.image_weight, "latent": recipe.latent_weight, "text": recipe.text_weight}
        self.module = Predictor(
            policy, self.choice, {kind: w for kind, w in weights.items() if w}, recipe.pack
        )
        self.layers = policy.backbone.layers
        self.prompts = Prompts(self.frames.tokenizer, self.config.max_text_tokens)
        frames = (2 + self.choice.future) * (self.config.frame_tokens + 1)
        self.tokens_per_sample = frames + self.choice.steps * (self.config.latent_tokens + 1)
        longest = self.config.max_text_tokens + self.tokens_per_sample
        longest += len(self.choice.bridge) + len(self.choice.closing)
        if recipe.pack is not None and recipe.pack < longest:
            raise TrainingError(f"pack: {recipe.pack} is less than one sequence can have, {longest} tokens")

    def _source(self, recipe: PretrainRecipe):
        source, fresh = weights_source(self.config, self.start, self.frames, recipe.seed)
        return (lambda name: source(name.removeprefix("policy."))), fresh

    def samples(self) -> Rows:
        return self.training

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        return to_device({**batch, "texts": [self.prompts(t) for t in batch["instruction"]]}, device)

    def example(self, count: int) -> Batch:
        config, on = self.config, {"device": "meta"}
        return {
            "texts": [[0] * 48] * count,
            "frames": torch.zeros(count, 3, config.frame_tokens, dtype=torch.long, **on),
            "latents": torch.zeros(count, config.horizon, config.latent_tokens, dtype=torch.long, **on),
            "valid": torch.ones(count, config.horizon, dtype=torch.bool, **on),
        }

    def validate(self, step: int, run: Run, ranks: Ranks, recipe: PretrainRecipe) -> dict[str, float]:
        """Losses and accuracies of held-out frames; and, for a small model, what it imagines as a picture."""
        if not len(self.held):
            return {}
        spread = np.linspace(0, len(self.held) - 1, min(recipe.validation.samples, len(self.held)))
        picked = [self.labels.row(int(self.held[int(i)])) for i in spread]

        def measure(batch: Batch) -> dict[str, Tensor]:
            found = self.module(batch, step)
            return {key: value.expand(len(batch["frames"])) for key, value in found.items()}

        found = {k: float(v) for k, v in evaluate(self, picked, ranks, recipe, measure).items()}
        count = sum(p.numel() for p in self.module.parameters())
        if self.choice.future and count <= FREE_RUNNING_LIMIT:
            self.draw(step, run, ranks, picked[:: max(len(picked) // 4, 1)][:4])
        return found

    def draw(self, step: int, run: Run, ranks: Ranks, rows: list[dict]) -> None:
        """Rows of pictures: o_t, the real o_{t+H}, the imagined one; all through the frame tokenizer."""
        policy = self.module.policy
        self.module.unshard()  # its tables are read outside its forward
        frames = torch.from_numpy(np.stack([row["frames"] for row in rows])).to(ranks.device)
        texts = [self.prompts(row["instruction"]) for row in rows]
        dreamt = imagine(policy, texts, frames[:, :2], self.choice)
        self.module.reshard()
        if run.rank == 0:
            vqgan = self.frames.vqgan(ranks.device)
            with torch.no_grad():
                shown = torch.stack([frames[:, 1], frames[:, 2], dreamt.future], 1).flatten(0, 1)
                drawn = pictures(vqgan.decode(shown))
            run.picture(
                step,
                "now_future_imagined",
                plots.tiles([list(drawn[i : i + 3]) for i in range(0, len(drawn), 3)]),
            )

    def export(self, folder: Path, run: Run, ranks: Ranks) -> str | None:
        """A checkpoint without action heads, in bf16. Every rank calls it; rank 0 returns the hash."""
        shapes = checkpoint.parameter_shapes(Policy, self.config)
        gathered = Gathered(self.module.policy)
        if not ranks.first:
            gathered.follow(shapes)
            return None
        config = dataclasses.replace(self.config, dropout=0.0)
        vqgan = checkpoint.compact(dict(self.frames.vqgan().named_parameters()))
        texts = checkpoint.texts(self.frames.tokenizer, None, None)
        digest = checkpoint.write(
            folder, config, checkpoint.Weights(shapes, gathered, torch.bfloat16), vqgan, texts
        )
        recipe = self.recipe
        began = f"`{self.start.path.name}`" if self.start else "random weights"
        (folder / "README.md").write_text(
            CARD.format(
                name=folder.name, model=recipe.model, variant=recipe.variant, began=began, steps=recipe.steps,
                batch=recipe.global_batch, frames=len(self.labels.codes), episodes=len(self.labels.keys),
                latent=self.labels.manifest["latent_model"][:12], measured=json.dumps(run.last(), indent=1),
            )
        )  # fmt: skip
        return digest


CARD = """# {name}

{model}, pretrained to predict video and latent actions (variant {variant}), from {began}. It cannot act until
finetuned (`vipra train finetune --start`); `vipra imagine` shows what it expects.

- {frames:,} frames of {episodes:,} episodes, labelled by latent action model {latent}
- {steps} steps of {batch} samples. Last measured:

```json
{measured}
```
"""


def held_out_episodes(keys: np.ndarray, share: float, every: list[list[str]] | None = None) -> np.ndarray:
    """Which of `keys` ("dataset/episode") are held out, bool: those that the other stages hold out too.

    every: names of all episodes by dataset, skipped ones among them; None: of labels that do not say.
    """
    out = np.zeros(len(keys), bool)
    dataset, names = np.array([str(key).split("/", 1) for key in keys]).T
    for number in np.unique(dataset):
        mine = dataset == number
        known = np.array(every[int(number)] if every else names[mine])
        out[mine] = np.isin(names[mine], known[held_out(list(known), share)])
    return out


def plan(recipe: PretrainRecipe) -> Pretrain:
    return Pretrain(recipe, planning=True)


def build(recipe: PretrainRecipe, ranks: Ranks, run: Run) -> Pretrain:
    if recipe.labels is None:
        raise TrainingError("no labels: give --labels FOLDER, written by `vipra label`")
    stage = Pretrain(recipe)
    labels = Labels(recipe.labels, stage.frames, stage.config)
    stage.labels = labels
    for instruction in labels.instructions.values():
        stage.prompts(instruction)  # too long a one ends the run here
    share = recipe.validation_share
    if share is None:
        share = labels.manifest.get("validation_share") or VALIDATION_SHARE
    out = held_out_episodes(labels.keys, share, labels.manifest.get("keys"))
    if out.all():
        raise TrainingError(
            f"all {len(out)} labelled episodes are held out: label more, or --set validation_share=0"
        )
    out = out[labels.episode]
    stage.training = Rows(labels, np.flatnonzero(~out), recipe.seed)
    stage.held = np.flatnonzero(out)
    run.say(f"{len(labels.keys)} episodes, {(~out).sum()} frames; {out.sum()} frames held out")
    if stage.fresh and stage.start:
        run.say(f"random at the start: {', '.join(sorted({n.rsplit('.', 1)[0] for n in stage.fresh}))}")
    return stage
