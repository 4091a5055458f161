"""Stage 1 in the loop: clips in, a latent action model out. What a step minimises is in training.latent."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from config.training import LatentRecipe
from models.latent_action import folder as folders
from models.latent_action.config import SIZES
from models.latent_action.model import LatentActionModel, to_clip
from models.latent_action.vit import load_vit
from training import latent, plots
from training.data.sampling import Samples
from training.data.windows import Clips
from training.distributed import Ranks
from training.loop import Batch, Stage, evaluate
from training.run import Run, TrainingError


class Objective(nn.Module):
    """The model and its loss."""

    def __init__(self, model: LatentActionModel, recipe: LatentRecipe, terms: latent.Terms):
        super().__init__()
        self.model, self.recipe = model, recipe
        self.terms = [terms]  # a list hides the frozen networks from the parameters

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        clip = to_clip(batch["frames"], self.model.config.image_size)
        loss, metrics = latent.loss(
            self.model,
            clip,
            step,
            self.recipe.objective,
            self.terms[0],
            batch.get("valid"),
            batch.get("paired"),
        )
        return {**metrics, "loss": loss}


class LatentStage(Stage):
    sharded = False

    def __init__(self, recipe: LatentRecipe, model: LatentActionModel, terms: latent.Terms):
        self.recipe, self.model = recipe, model
        self.module = Objective(model, recipe, terms)
        self.layers = [
            *model.encoder.blocks,
            *model.decoder.blocks,
        ]  # never the quantiser: it counts its codes

    def samples(self) -> Samples:
        return self.training

    def groups(self, recipe: LatentRecipe) -> list[dict]:
        decay = recipe.optimizer.weight_decay
        groups = latent.parameter_groups(self.model, 1.0, recipe.vit_lr_scale, decay)
        return [{**group, "scale": group["lr"]} for group in groups]

    def example(self, count: int) -> Batch:
        side, recipe = self.model.config.image_size, self.recipe
        shape = (count, *((recipe.views,) if recipe.views > 1 else ()), recipe.clip_frames, side, side, 3)
        return {"frames": torch.zeros(shape, dtype=torch.uint8, device="meta")}

    def after_step(self, step: int, ranks: Ranks) -> dict[str, float]:
        if not latent.refresh_due(step, self.recipe.objective.refresh):
            return {}
        return {"codes_replaced": float(latent.refresh(self.model, step, self.recipe.objective))}

    def validate(self, step: int, run: Run, ranks: Ranks, recipe: LatentRecipe) -> dict[str, float]:
        """Reconstruction against copying the last frame, on held-out clips and on the pixels that change
        by more than .05; and pictures.
        """
        picked = [self.held[n] for n in range(recipe.validation.samples)]
        if self.model.config.target != "pixels":
            return {}

        def measure(batch: Batch) -> dict[str, Tensor]:
            clip = to_clip(batch["frames"], self.model.config.image_size)
            clip = clip.flatten(0, 1) if clip.ndim == 6 else clip
            drawn = self.model(clip).frames.float().clamp(0, 1)
            truth, last = clip[:, 1:], clip[:, :-1]
            moved = ((truth - last).abs().amax(2, keepdim=True) > 0.05).float()
            sums = {"reconstruction": (drawn - truth).abs(), "copy": (last - truth).abs()}
            count, views = len(batch["frames"]), len(clip) // len(batch["frames"])

            def rows(x: Tensor) -> Tensor:
                return x.flatten(1).sum(1).unflatten(0, (count, views)).sum(1)

            out = {f"{name}_l1": rows(e) / (e[0].numel() * views) for name, e in sums.items()}
            out |= {f"{name}_moving": rows(e.mean(2, keepdim=True) * moved) for name, e in sums.items()}
            return out | {"moving": rows(moved)}

        means = evaluate(self, picked, ranks, recipe, measure)
        moving = max(float(means.pop("moving")), 1e-9)
        found = {k: float(v) / (moving if k.endswith("_moving") else 1.0) for k, v in means.items()}
        if run.rank == 0:
            self.draw(step, run, picked[0]["frames"])
        return found

    @torch.no_grad()
    def draw(self, step: int, run: Run, frames: np.ndarray) -> None:
        frames = frames[0] if frames.ndim == 5 else frames
        device = next(self.model.parameters()).device
        clip = to_clip(torch.from_numpy(frames)[None].to(device), self.model.config.image_size)
        drawn = self.model(clip).frames[0].float().clamp(0, 1)

        def bytes_of(x: Tensor) -> list[np.ndarray]:
            return list((x.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy())

        run.picture(step, "reconstruction", plots.tiles([bytes_of(clip[0, 1:]), bytes_of(drawn)]))

    def export(self, folder: Path, run: Run, ranks: Ranks) -> str | None:
        return folders.save(folder, self.model) if ranks.first else None


def model_for(recipe: LatentRecipe) -> LatentActionModel:
    if recipe.model not in SIZES:
        raise TrainingError(f"model: {recipe.model!r} is not one of {', '.join(SIZES)}")
    torch.manual_seed(recipe.seed)
    return LatentActionModel(SIZES[recipe.model])


def plan(recipe: LatentRecipe) -> LatentStage:
    with torch.device("meta"):
        model = model_for(recipe)
    stage, objective = LatentStage(recipe, model, latent.Terms()), recipe.objective
    weights = {"LPIPS": objective.lpips_weight, "RAFT": objective.flow_weight}
    if stage.model.config.target == "pixels":
        stage.uncounted = [name for name, weight in weights.items() if weight]
    return stage


def build(recipe: LatentRecipe, ranks: Ranks, run: Run) -> LatentStage:
    model = model_for(recipe)
    if model.config.target == "features" and recipe.weights.dino is None:
        raise TrainingError(f"{recipe.model} predicts DINOv2 features: give --set weights.dino=PATH")
    if recipe.weights.dino:
        load_vit(model.encoder.vit, recipe.weights.dino)
    else:
        run.say("image encoder starts random: no weights.dino given")
    terms, notes = latent.build_terms(
        recipe.objective, model.config.target, recipe.weights.vgg, recipe.weights.raft, ranks.device
    )
    for note in notes:
        run.say(note)
    stage = LatentStage(recipe, model, terms)
    window = Clips(recipe.clip_frames, model.config.image_size, recipe.views)
    stage.training = Samples(recipe.data, window, recipe.seed, recipe.augmentation)
    held = recipe.data.validation_share > 0
    stage.held = Samples(recipe.data, window, recipe.seed, subset="validation") if held else stage.training
    return stage
