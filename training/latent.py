"""Stage 1: what a step of latent action learning minimises (paper section 4.1, equation 2, table 3).

    terms, notes = build_terms(objective, vgg, raft)     # frozen LPIPS and RAFT, or the reason why not
    value, metrics = loss(model, clip, step, objective, terms, valid)
    ... backward, clip, optimizer.step() ...
    if refresh_due(step, objective.refresh):
        refresh(model, step, objective)                  # on every rank

MVP-LAM: `cross_weight` above 0 and clips of two or more synchronised views add the reconstruction of every
view from another view's latent actions; a batch of single views trains on the self term alone. LAPA: a model
with `decoder: cross`, clips of two frames, `pixel_loss: l2` and both perceptual weights 0.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from config.training import LatentObjective
from models.latent_action.losses import flow_loss, load_lpips, load_raft, perceptual_loss, pixel_loss
from models.latent_action.model import LatentActionModel


@dataclass
class Terms:
    """Frozen networks of the perceptual terms; None: that term is off."""

    lpips: nn.Module | None = None
    raft: nn.Module | None = None


def build_terms(
    objective: LatentObjective,
    target: str = "pixels",
    vgg: Path | str | None = None,
    raft: Path | str | None = None,
    device="cpu",
) -> tuple[Terms, list[str]]:
    """Load what has weights; one sentence about each term that the objective asks for and that stays off.

    target: the model's (`LatentActionConfig.target`). Raises models.latent_action.vit.WeightsError.
    """
    terms, notes = Terms(), []

    def wanted(name: str, weight: float, path: Path | str | None) -> bool:
        if weight and target != "pixels":
            notes.append(f"{name} term is off: the model predicts features, not pixels")
        elif weight and path is None:
            notes.append(f"{name} term is off: no weights given")
        return bool(weight) and target == "pixels" and path is not None

    if wanted("LPIPS (VGG16)", objective.lpips_weight, vgg):
        terms.lpips = load_lpips(vgg).to(device)
    if wanted("optical flow (RAFT)", objective.flow_weight, raft):
        terms.raft = load_raft(raft, objective.flow_network).to(device)
    return terms, notes


def flow_weight(objective: LatentObjective, step: int) -> float:
    """lambda_flow at `step`: 0 until the start step, then a linear ramp (official; equation 2 has a jump)."""
    if step <= objective.flow_start:
        return 0.0
    return objective.flow_weight * min(1.0, (step - objective.flow_start) / max(objective.flow_ramp, 1))


def valid_transitions(valid: Tensor) -> Tensor:
    """Real frames [B, T] bool -> transitions between two real frames [B, T - 1]."""
    return valid[:, 1:] & valid[:, :-1]


def loss(
    model: nn.Module,
    clip: Tensor,
    step: int,
    objective: LatentObjective,
    terms: Terms,
    valid: Tensor | None = None,
    paired: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scalar loss and detached metrics of one micro-batch; calls `model` (or what wraps it) exactly once.

    clip: [B, T, 3, s, s] or [B, V, T, 3, s, s] in [0, 1]. valid: [B, T] bool, False for repeat-padded
    frames. paired: [B] bool, False where the views are not of one moment: no cross term there. Noise and
    dropout come from torch's global generators.
    """
    views = clip.shape[1] if clip.ndim == 6 else 1
    out = model(clip, cross=objective.cross_weight > 0)
    mask = None if valid is None else valid_transitions(valid).repeat_interleave(views, 0)
    metrics = {"pixel": pixel_loss(out.frames, out.target, mask, objective.pixel_loss)}
    total = metrics["pixel"]
    if terms.lpips is not None:
        metrics["lpips"] = perceptual_loss(terms.lpips, out.frames, out.target, mask)
        total = total + objective.lpips_weight * metrics["lpips"]
    weight = flow_weight(objective, step)
    if terms.raft is not None and weight > 0:
        metrics["flow"] = flow_loss(terms.raft, out.frames, out.target, mask)
        total = total + weight * metrics["flow"]
    if out.crossed is not None:
        both = mask
        if paired is not None:
            both = paired.repeat_interleave(views)[:, None].expand(out.codes.shape[:2])
            both = both if mask is None else both & mask
        metrics["cross"] = pixel_loss(out.crossed, out.target, both, objective.pixel_loss)
        total = total + objective.cross_weight * metrics["cross"]
    metrics["loss"] = total
    share = out.chosen / out.chosen.sum().clamp(min=1)
    metrics["codes_used"] = (out.chosen > 0).sum()
    metrics["perplexity"] = torch.special.entr(share).sum().exp()
    return total, {name: value.detach() for name, value in metrics.items()}


def refresh_due(step: int, schedule: tuple[tuple[int, int], ...]) -> bool:
    """True after optimiser step `step` (the first is 1) when the codebook is to be refreshed."""
    every = next((every for until, every in schedule if step <= until), 0)
    return step > 0 and every > 0 and step % every == 0


def refresh(model: LatentActionModel, step: int, objective: LatentObjective) -> int:
    """Restart rarely chosen codes; the same on every rank and after a resume. Returns how many moved."""
    return model.quantizer.refresh(objective.refresh_threshold, torch.Generator().manual_seed(step))


def parameter_groups(
    model: LatentActionModel, lr: float, vit_lr_scale: float = 0.1, weight_decay: float = 0.0
) -> list[dict]:
    """For AdamW: a lower rate for the (pretrained) ViT, no decay on vectors and on the codebook. Frozen
    parameters are left out.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name != "quantizer.codebook"
            groups.setdefault((name.startswith("encoder.vit."), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * (vit_lr_scale if vit else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (vit, decays), parameters in groups.items()
    ]
