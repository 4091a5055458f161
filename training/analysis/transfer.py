"""Latent transfer (figure 5): the latent actions of one clip, decoded from another clip's first frame."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from config.dataset import Mixture
from models.latent_action.model import LatentActionModel, encode_labels, to_clip
from training.analysis.arrays import AnalysisError
from training.analysis.motion import STILL, clip_motion, cosine
from training.analysis.transitions import Tick, each_episode
from training.data.augment import prepare
from training.data.windows import pick_view

LEAST = 2  # moving clips
_WAYS = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])


@dataclass(frozen=True)
class Clips:
    frames: np.ndarray  # uint8 [n, T, s, s, 3], each of another episode
    motion: np.ndarray  # [n, 2], over the whole clip, as shares of the picture's width
    names: list[str]


def moving_clips(
    mixture: Mixture, size: int, frames: int, limit: int | None = None, tick: Tick | None = None
) -> Clips:
    """The `frames` frames in a row that move furthest, of every episode that moves: right, left, down and up
    in turn, or wherever the episode moves if it never goes there.

    Raises AnalysisError where fewer than LEAST episodes do.
    """
    found = []
    for config, _, episode in each_episode(mixture, limit, tick, skipped := []):
        at = np.arange(0, episode.length, config.stride)
        if len(at) < frames:
            skipped.append((episode.key, f"has {len(at)} frames, needs {frames}"))
            continue
        pictures = prepare(episode.frames(pick_view(episode, config.views), at), size)
        steps = np.concatenate([np.zeros((1, 2)), clip_motion(pictures).cumsum(0)])
        over = steps[frames - 1 :] - steps[: len(steps) - frames + 1]
        least = STILL * (frames - 1)
        along = over @ _WAYS[len(found) % len(_WAYS)]
        best = int(along.argmax() if along.max() >= least else np.linalg.norm(over, axis=1).argmax())
        if np.linalg.norm(over[best]) >= least:
            found.append((pictures[best : best + frames], over[best], episode.key))
    if len(found) < LEAST:
        why = f" ({skipped[0][1]})" if skipped else ""
        raise AnalysisError(
            f"{len(found)} episodes have {frames} frames that move in one direction, {LEAST} are needed"
            f"{why}: use more episodes, fewer --frames or a larger stride"
        )
    pictures, motion, names = zip(*found, strict=True)
    return Clips(np.stack(pictures), np.stack(motion), list(names))


def most_opposed(motion: np.ndarray) -> np.ndarray:
    """Motions [n, 2] -> a partner [n] for each clip, every clip once, that together oppose the most."""
    angle = cosine(motion[:, None], motion[None])
    np.fill_diagonal(angle, 1e3)
    return linear_sum_assignment(angle)[1]


@torch.no_grad()
def roll_out(model: LatentActionModel, first: np.ndarray, sources: np.ndarray, batch: int = 8) -> np.ndarray:
    """First frames uint8 [n, s, s, 3] and source clips [n, T, s, s, 3] -> uint8 [n, T, s, s, 3]: the first
    frame, then what the sources' latent actions make of it, each frame from those before.
    """
    device, size = model.quantizer.codebook.device, model.config.image_size
    out = []
    for at in range(0, len(first), batch):
        clips = to_clip(torch.from_numpy(sources[at : at + batch]).to(device), size)
        start = to_clip(torch.from_numpy(first[at : at + batch, None]).to(device), size)
        drawn = model.rollout(start, encode_labels(model, clips))
        frames = torch.cat([start, drawn.to(start.dtype)], 1).permute(0, 1, 3, 4, 2)
        out.append((frames * 255).round().byte().cpu().numpy())
    return np.concatenate(out)


def _agreement(moved: np.ndarray, wanted: np.ndarray, steps: int) -> dict:
    """How motions [n, 2] point the way of others [n, 2]; those that all but stand still count as 0."""
    angle = np.where(np.linalg.norm(moved, axis=1) < STILL * steps, 0.0, cosine(moved, wanted))
    return {"mean_cosine": float(angle.mean()), "same_way": float((angle > 0.5).mean())}


def transfer(model: LatentActionModel, clips: Clips) -> tuple[dict, np.ndarray, np.ndarray]:
    """(numbers, rollouts uint8 [n, T, s, s, 3], targets [n]): every clip's latent actions from the first
    frame of a clip that moves against it.

    mean_cosine: between the direction of change and the source's; same_way: share within 60 degrees.
    `transferred` is the rollouts against their sources. To hold it against: `own`, the latents decoded from
    their own first frame, is the most to hope for; `target`, what the target clips really do, is what a
    decoder that ignores the latents would at best show; `other_source`, every rollout against the sources
    it was not made from, is what chance gives.
    """
    steps = clips.frames.shape[1] - 1
    targets = most_opposed(clips.motion)
    rolled = roll_out(model, clips.frames[targets, 0], clips.frames)
    own = roll_out(model, clips.frames[:, 0], clips.frames)
    moved, moved_own = (np.stack([clip_motion(c).sum(0) for c in r]) for r in (rolled, own))
    apart = ~np.eye(len(targets), dtype=bool)
    every = (
        np.broadcast_to(moved[:, None], (*apart.shape, 2)),
        np.broadcast_to(clips.motion, (*apart.shape, 2)),
    )
    numbers = {
        "clips": len(targets),
        "steps": steps,
        "transferred": _agreement(moved, clips.motion, steps),
        "own": _agreement(moved_own, clips.motion, steps),
        "target": _agreement(clips.motion[targets], clips.motion, steps),
        "other_source": _agreement(*(motion[apart] for motion in every), steps),
        "motion_of_sources": float(np.linalg.norm(clips.motion, axis=1).mean()),
        "motion_of_rollouts": float(np.linalg.norm(moved, axis=1).mean()),
        "pairs": [
            {
                "source": clips.names[i],
                "target": clips.names[j],
                "source_motion": clips.motion[i].tolist(),
                "target_motion": clips.motion[j].tolist(),
                "rollout_motion": moved[i].tolist(),
            }
            for i, j in enumerate(targets)
        ],
    }
    return numbers, rolled, targets
