"""Stage 0: the frame tokenizer (a small VQGAN) and the BPE vocabulary of every model that is not 7B.

L1 reconstruction plus the quantisation losses, with unused codes restarted at seen latents. The L1
term weighs each pixel by how much it varies over its dataset: the arms are a small part of a picture
that otherwise stands still. LPIPS only with real VGG weights: a random network would mean nothing.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from config.dataset import DatasetConfig
from config.training import TokenizerRecipe
from models import checkpoint, sequence
from models.latent_action.losses import load_lpips, perceptual_loss
from models.policy import Policy
from models.tokenizer import Tokenizer
from models.vqgan import VQGAN
from training import plots, truth
from training.data.augment import prepare
from training.data.episode import DataError
from training.data.sampling import Samples, held_out
from training.data.windows import Clips
from training.distributed import Ranks
from training.loop import Batch, Stage, evaluate
from training.run import Run
from training.start import size

SPREAD_SAMPLES = 256  # frames that say how much each pixel varies
TEXT_EPISODES = 20_000  # whose instructions teach the vocabulary


class Reconstructor(nn.Module):
    """VQGAN and its loss; keeps the step's latents, and which codes were used, for the restarts."""

    def __init__(self, vqgan: VQGAN, weight: Tensor, lpips: nn.Module | None, lpips_weight: float):
        super().__init__()
        self.vqgan, self.lpips_weight = vqgan, lpips_weight
        self.register_buffer("weight", weight, persistent=False)  # [datasets, h, w], mean 1
        self.register_buffer("used", torch.zeros(vqgan.config.codebook_size))  # since the last restart
        self.recent = torch.zeros(vqgan.config.codebook_size)  # in this step, on this rank
        self.latents: list[Tensor] = []  # of this step's micro-batches, on this rank
        self.lpips = [lpips] if lpips else []  # a list hides it from the parameters

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        x = self.vqgan.to_input(batch["frames"][:, 0])
        out = self.vqgan(x)
        if self.training:
            self.latents.append(out.latents.detach())
            self.recent = self.recent.to(x.device)
            self.recent.index_fill_(0, out.codes.flatten(), 1.0)
        weight = self.weight[batch["dataset"]][:, None]
        losses = {"l1": ((out.reconstruction - x).abs() * weight).mean(), "quantisation": out.loss}
        losses["loss"] = losses["l1"] + out.loss
        for network in self.lpips:
            pair = (t[:, None] / 2 + 0.5 for t in (out.reconstruction, x))
            losses["lpips"] = perceptual_loss(network.to(x.device), *pair, None)
            losses["loss"] = losses["loss"] + self.lpips_weight * losses["lpips"]
        return losses


class TokenizerStage(Stage):
    sharded = False
    truth: DatasetConfig | None = None  # a dataset that says where things are

    def __init__(self, recipe: TokenizerRecipe, vqgan: VQGAN, weight: Tensor, lpips: nn.Module | None = None):
        self.recipe, self.vqgan = recipe, vqgan
        self.module = Reconstructor(vqgan, weight, lpips, recipe.lpips)

    def samples(self) -> Samples:
        return self.training

    def groups(self, recipe: TokenizerRecipe) -> list[dict]:
        return [{"params": list(self.vqgan.parameters()), "scale": 1.0}]

    def example(self, count: int) -> Batch:
        side = self.vqgan.config.image_size
        frames = torch.zeros(count, 1, side, side, 3, dtype=torch.uint8, device="meta")
        return {"frames": frames, "dataset": torch.zeros(count, dtype=torch.long, device="meta")}

    def after_step(self, step: int, ranks: Ranks) -> dict[str, float]:
        recipe, module = self.recipe, self.module
        module.used += torch.tensor(ranks.sum(module.recent.tolist()), device=module.used.device)
        module.recent.zero_()
        seen, module.latents = module.latents, []
        if step % recipe.restart_every or step > recipe.restart_until * recipe.steps:
            return {}
        latents = torch.cat(ranks.gather(torch.cat(seen).float().cpu()))
        generator = torch.Generator().manual_seed(step)
        moved = self.vqgan.restart_codes(latents.to(ranks.device), module.used.nonzero(), generator)
        module.used.zero_()
        return {"codes_restarted": float(moved)}

    def validate(self, step: int, run: Run, ranks: Ranks, recipe: TokenizerRecipe) -> dict[str, float]:
        """Of held-out frames: l1, mean absolute error of 255, and the distinct codes used; and pictures."""
        picked = [self.held[n] for n in range(recipe.validation.samples)]
        used = torch.zeros(self.vqgan.config.codebook_size)

        def measure(batch: Batch) -> dict[str, Tensor]:
            frames = batch["frames"][:, 0]
            codes = self.vqgan.encode(self.vqgan.to_input(frames))
            used.index_fill_(0, codes.flatten().cpu(), 1.0)
            drawn = self.vqgan.decode(codes).permute(0, 2, 3, 1)
            return {"l1": ((drawn + 1) * 127.5 - frames).abs().mean((1, 2, 3))}

        l1 = float(evaluate(self, picked, ranks, recipe, measure)["l1"])
        counts = ranks.sum(used.tolist())
        if run.rank == 0:
            frames = np.stack([sample["frames"][0] for sample in picked[:8]])
            drawn = reconstruct(self.vqgan, frames)
            run.picture(step, "reconstruction", plots.tiles([list(frames), list(drawn)]))
        return {"l1": l1, "codes_used": float(np.count_nonzero(counts))}

    def gate(self, run: Run) -> None:
        """Say how far from the truth a linear probe sees hands and things, and write it to gate.json: from
        the tokens, and from the pixels at the tokenizer's size, which lack what the resolution loses.
        """

        @torch.no_grad()
        def tokens(frames: np.ndarray) -> np.ndarray:
            device, side = next(self.vqgan.parameters()).device, self.vqgan.config.image_size
            x = self.vqgan.to_input(torch.from_numpy(prepare(frames, side)).to(device))
            codes = self.vqgan.encode(x).cpu()
            return self.vqgan.quantize.embedding.weight.detach().float().cpu()[codes].flatten(1).numpy()

        def pixels(frames: np.ndarray) -> np.ndarray:
            return prepare(frames, self.vqgan.config.image_size).reshape(len(frames), -1) / np.float32(255)

        share = self.recipe.data.validation_share
        inputs = {"tokens": tokens, "pixels": pixels}
        found = truth.gate(self.truth, inputs, lambda keys: held_out(keys, share))
        off, apart = found["tokens"].off_mm, found["tokens"].told_apart
        passed = max(off.values()) < truth.LIMIT_MM
        run.say(
            f"gate {'passed' if passed else 'not passed'} (less than {truth.LIMIT_MM:g} mm): places that a "
            f"linear probe reads on held-out episodes of {self.truth.path}"
        )
        for name, distance in off.items():
            most = ", ".join(f"{other} {found[other].off_mm[name]:.0f} mm" for other in ("pixels", "mean"))
            told = f"; told from its like in {apart[name]:.0%}" if name in apart else ""
            run.say(f"  {name}: {distance:.0f} mm off (from the {most}){told}")
        about = {"limit_mm": truth.LIMIT_MM, "passed": passed}
        about |= {f"{name}_mm": seen.off_mm for name, seen in found.items()}
        about["told_apart"] = {name: seen.told_apart for name, seen in found.items()}
        run.write("gate.json", json.dumps(about, indent=1))

    def export(self, folder: Path, run: Run, ranks: Ranks) -> str | None:
        """A checkpoint that gives its VQGAN and vocabulary; its backbone is random."""
        if not ranks.first:
            return None
        if self.truth:
            self.gate(run)
        # in half the bytes, exactly: rounding later would flip codes
        weights = {
            name: p.detach().bfloat16().float().contiguous() for name, p in self.vqgan.named_parameters()
        }
        config = dataclasses.replace(size(self.recipe.model), action_heads="none", action_vocab=0)
        shapes = checkpoint.parameter_shapes(Policy, config)
        random = checkpoint.Weights(
            shapes,
            lambda name: checkpoint.random_tensor(name, shapes[name], self.recipe.seed),
            torch.bfloat16,
        )
        texts = checkpoint.texts(self.words, None, None)
        digest = checkpoint.write(folder, config, random, checkpoint.compact(weights), texts)
        measured = json.dumps(run.last(), indent=1)
        (folder / "README.md").write_text(CARD.format(name=folder.name, model=config.name, measured=measured))
        return digest


CARD = """# {name}

Frame tokenizer and vocabulary for {model} (`vipra train tokenizer`). **Its backbone is random**: give this
folder as `--tokenizer` to `vipra train pretrain` or `finetune`. Last measured:

```json
{measured}
```
"""


@torch.no_grad()
def reconstruct(model: VQGAN, frames: np.ndarray) -> np.ndarray:
    """uint8 RGB [n, s, s, 3] through the tokens and back."""
    device = next(model.parameters()).device
    drawn = model.decode(model.encode(model.to_input(torch.from_numpy(frames).to(device))))
    return pictures(drawn)


def pictures(decoded: Tensor) -> np.ndarray:
    """Decoder output [n, 3, s, s] -> uint8 RGB [n, s, s, 3]."""
    return ((decoded.float().permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255).round().byte().cpu().numpy()


def spread(samples: Samples) -> Tensor:
    """How much each pixel varies in each dataset, [datasets, h, w] of mean 1, within .3 and 5."""
    seen = [[] for _ in samples.readers]
    for n in range(SPREAD_SAMPLES):
        sample = samples[n]
        seen[sample["dataset"]].append(sample["frames"][0])
    side = samples.window.size
    varies = torch.ones(len(seen), side, side)
    for i, frames in enumerate(seen):
        if len(frames) > 1:
            varies[i] = torch.from_numpy(np.stack(frames).std(0).mean(-1))
    return (varies / varies.mean((1, 2), keepdim=True).clamp(min=1e-6)).clamp(0.3, 5.0)


def instructions(samples: Samples) -> list[str]:
    """Distinct instructions of the first episodes, sorted."""
    found = set()
    for reader in samples.readers:
        for index in range(min(len(reader), TEXT_EPISODES)):
            try:
                found.add(reader.episode(index).instruction)
            except DataError:
                continue
    return sorted(found)


def vocabulary(tasks: list[str], count: int) -> Tokenizer:
    """BPE trained on the prompts themselves: they become a few tokens, any other text still encodes."""
    prompts = [sequence.PROMPT.format(task=task) for task in tasks]
    tags = ["<vision>", "</vision> <action>", "</vision> <dynamics>", "</dynamics>", "</action>"]
    return Tokenizer.train([*prompts, *tags], count)


def plan(recipe: TokenizerRecipe) -> TokenizerStage:
    config = size(recipe.model).vqgan
    stage = TokenizerStage(recipe, VQGAN(config), torch.ones(1, config.image_size, config.image_size))
    stage.uncounted = ["LPIPS"] if recipe.lpips else []
    return stage


def build(recipe: TokenizerRecipe, ranks: Ranks, run: Run) -> TokenizerStage:
    config = size(recipe.model)
    window = Clips(frames=1, size=config.vqgan.image_size)
    training = Samples(recipe.data, window, recipe.seed, recipe.augmentation)
    side = config.vqgan.image_size
    weight = spread(training) if recipe.motion_weight else torch.ones(len(training.readers), side, side)
    lpips = load_lpips(recipe.lpips_weights) if recipe.lpips and recipe.lpips_weights else None
    if recipe.lpips and lpips is None:
        run.say("LPIPS term is off: no lpips_weights given")
    torch.manual_seed(recipe.seed)
    vqgan = VQGAN(config.vqgan).to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    stage = TokenizerStage(recipe, vqgan, weight, lpips)
    stage.training = training
    held = recipe.data.validation_share > 0
    stage.held = Samples(recipe.data, window, recipe.seed, subset="validation") if held else training
    stage.words = vocabulary(instructions(training), config.text_vocab)
    if held:
        stage.truth = truth.generated(recipe.data.datasets)
    return stage
