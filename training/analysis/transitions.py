"""A dataset's steps as a latent action model sees them: codes, latent vectors, actions, motion."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from config.dataset import DatasetConfig, Mixture
from models.latent_action.model import LatentActionModel, encode_labels, to_clip
from training.analysis.arrays import AnalysisError
from training.analysis.motion import clip_motion
from training.analysis.probe import net_actions
from training.data.augment import prepare
from training.data.episode import DataError, Episode, Reader
from training.data.open import open_dataset
from training.data.sampling import held_out
from training.data.windows import pick_view

Tick = Callable[[int, int], None]  # (episodes done, of)


@dataclass(frozen=True)
class Transitions:
    """n steps from one frame to the next; None for what was not asked for."""

    codes: np.ndarray  # int64 [n, N]
    latents: np.ndarray  # float32 [n, N * code_dim], the codes' vectors
    episodes: np.ndarray  # int64 [n], which episode each is of
    actions: np.ndarray | None = None  # float64 [n, D], what the robot did in the step
    motion: np.ndarray | None = None  # float64 [n, 2], training.analysis.motion
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (episode, what is wrong)


def each_episode(
    mixture: Mixture,
    limit: int | None = None,
    tick: Tick | None = None,
    skipped: list | None = None,
) -> Iterator[tuple[DatasetConfig, Reader, Episode]]:
    """Readable episodes of at least `min_frames`, up to `limit` a dataset: those the mixture holds out, or
    all where it holds none out. Others go to `skipped`, or end it where the mixture says so.
    """
    share, wanted = mixture.validation_share, []
    readers = [open_dataset(config) for config in mixture.datasets]
    for reader in readers:
        out = held_out([reader.key(i) for i in range(len(reader))], share)
        wanted.append(np.flatnonzero(out == (share > 0))[:limit].tolist())
    done, total = 0, sum(map(len, wanted))
    for config, reader, indices in zip(mixture.datasets, readers, wanted, strict=True):
        for index in indices:
            try:
                episode = reader.episode(index)
                if episode.length < config.min_frames:
                    raise DataError(f"{episode.key}: has {episode.length} frames, needs {config.min_frames}")
                yield config, reader, episode
            except DataError as error:
                if mixture.on_error == "raise" or skipped is None:
                    raise
                skipped.append((reader.key(index), str(error)))
            done += 1
            if tick:
                tick(done, total)


def windows(length: int, frames: int) -> list[range]:
    """Runs of `frames` frames that cover every step of a clip; the last ones may share steps."""
    if length <= frames:
        return [range(length)]
    starts = [*range(0, length - frames, frames - 1), length - frames]
    return [range(start, start + frames) for start in starts]


def encode(model: LatentActionModel, frames: np.ndarray, clip_frames: int) -> np.ndarray:
    """uint8 RGB [T, s, s, 3] -> codes int64 [T - 1, N], each from a window of `clip_frames` frames."""
    if len(frames) < 2:
        raise AnalysisError(f"{len(frames)} frames hold no step: at least 2 are needed")
    device, size = model.quantizer.codebook.device, model.config.image_size
    parts = windows(len(frames), clip_frames)
    clips = torch.from_numpy(np.stack([frames[part.start : part.stop] for part in parts]))
    found = torch.cat([encode_labels(model, to_clip(c.to(device), size)).cpu() for c in clips.split(16)])
    codes = np.empty((len(frames) - 1, found.shape[-1]), np.int64)
    for part, labels in zip(parts, found.numpy(), strict=True):
        codes[part.start : part.stop - 1] = labels
    return codes


def vectors(model: LatentActionModel, codes: np.ndarray) -> np.ndarray:
    """Codes [n, N] -> their vectors side by side, float32 [n, N * code_dim]."""
    table = model.quantizer.codebook.detach().float().cpu().numpy()
    return table[codes].reshape(len(codes), -1)


def grippers_of(reader: Reader) -> tuple[int, ...]:
    """Action dimensions that the dataset names grippers."""
    return tuple(i for i, name in enumerate(reader.action_names or ()) if "gripper" in name)


def read(
    model: LatentActionModel,
    mixture: Mixture,
    clip_frames: int = 8,
    actions: str | None = "absolute",
    grippers: tuple[int, ...] | None = None,
    motion: bool = False,
    limit: int | None = None,
    tick: Tick | None = None,
) -> Transitions:
    """Every step of every episode (`each_episode` says which), at each dataset's stride.

    actions: what the recorded ones are, absolute or deltas (`probe.net_actions`), or None to leave them out.
    grippers: their dimensions (default: those that the dataset names so). Raises DataError, AnalysisError.
    """
    parts, skipped = [], []
    for config, reader, episode in each_episode(mixture, limit, tick, skipped):
        at = np.arange(0, episode.length, config.stride)
        if len(at) < 2:
            skipped.append((episode.key, f"is shorter than a stride of {config.stride} frames"))
            continue
        frames = prepare(episode.frames(pick_view(episode, config.views), at), model.config.image_size)
        part = {"codes": encode(model, frames, clip_frames)}
        if actions:
            if episode.actions is None:
                raise AnalysisError(
                    f"{episode.key}: has no actions; set action_key, or leave the dataset out"
                )
            known = grippers_of(reader) if grippers is None else grippers
            part["actions"] = net_actions(episode.actions, at[:-1], config.stride, actions, known)
        if motion:
            part["motion"] = clip_motion(frames)
        parts.append(part)
    if not parts:
        raise AnalysisError(
            f"no episode could be used: {skipped[0][1] if skipped else 'the dataset is empty'}"
        )
    widths = {part["actions"].shape[1] for part in parts} if actions else set()
    if len(widths) > 1:
        raise AnalysisError(
            f"the datasets' actions have {sorted(widths)} dimensions: analyse one robot at a time"
        )
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    episodes = np.repeat(np.arange(len(parts)), [len(part["codes"]) for part in parts])
    return Transitions(latents=vectors(model, joined["codes"]), episodes=episodes, skipped=skipped, **joined)
